"""Whole runs on CUDA: resumed ones take the same steps, compiled ones nearly so."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import checkpoint as ck
import launch
from faulttol.inject import Fault
from launch import Job, RankContext
from tests.gpu.devices import needs_gpus
from tests.test_trainsys import runs, test_hf
from tests.test_trainsys.test_resume import assert_equal_state
from trainsys import drill, elastic, folder, metrics, recipe, session, trainer

pytestmark = [*needs_gpus(1), pytest.mark.slow]
WORLDS = [pytest.param(1, id="1 GPU"), pytest.param(2, id="2 GPUs", marks=needs_gpus(2))]


def deterministic_rank(context: RankContext, payload: Mapping[str, Any]) -> dict[str, Any]:
    """The trainer's entry, with kernels that give the same bits each time."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # what torch asks for before it promises determinism
    torch.use_deterministic_algorithms(True)
    return trainer.run_rank(context, payload)


def train(settings: list[str], run_dir: Path, *, resume: bool) -> None:
    resolved = recipe.load(settings[:1], [*settings[1:], f"--run_dir={run_dir}"])
    config = resolved.config
    with folder.open_run(resolved, resume=resume) as run:
        job = Job(
            entry=f"{__name__}:deterministic_rank",
            payload=session.rank_payload(config, run, resume=resume),
            world_size=config.parallel.replicate,
            log_dir=run.logs,
            name=config.name,
        )
        interval_s = config.faulttol.heartbeat_interval_s
        result = launch.run(
            job,
            config.launch,
            heartbeat_interval_s=interval_s,
            on_output=lambda output: None,
            observation=elastic.observation_of(config, run),
            recovery=elastic.recovery_of(config, run),
        )
    assert result.outcome == "completed", runs.logs(run_dir)


def copy_up_to_step_6(whole: Path, part: Path) -> None:
    """Copy a run as it was after step 6, if it kept all its checkpoints."""
    shutil.copytree(whole, part)
    with ck.Checkpointer(part / "checkpoints") as checkpointer:
        later = [info.path for info in checkpointer.list() if info.step > 6]
    assert len(later) == 2
    for path in later:
        shutil.rmtree(path)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write_text(tmp_path_factory.mktemp("text") / "corpus")


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize(
    "overrides",
    [
        ("--engine.zero_stage=2", "--engine.precision=fp32"),
        ("--engine.zero_stage=1", "--engine.precision=fp16"),
        ("--engine.zero_stage=3", "--engine.precision=bf16", "--engine.recompute=full"),
    ],
    ids=" ".join,
)
def test_a_run_resumed_from_its_checkpoint_takes_the_steps_of_the_run_that_went_on(
    world_size: int, overrides: tuple[str, ...], tmp_path: Path, text: Path
) -> None:
    """Bit for bit; with dropout, so that a CUDA generator that did not come back would show in the losses."""
    settings = runs.arguments(
        f"--data.path={text}",
        "--engine.device=cuda",
        f"--parallel.replicate={world_size}",
        "--model.dropout=0.1",
        "--checkpoint.keep_last=9",
        *overrides,
    )
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train(settings, whole, resume=False)
    copy_up_to_step_6(whole, resumed)
    train(settings, resumed, resume=True)
    assert "resumes after step 6" in (resumed / "logs/rank0.log").read_text()
    assert runs.losses(resumed) == runs.losses(whole)
    assert_equal_state(whole, resumed)
    assert (resumed / "model/model.safetensors").read_bytes() == (whole / "model/model.safetensors").read_bytes()


@pytest.mark.parametrize("stage", [2, 3])
def test_compiled_blocks_take_the_steps_of_plain_ones(stage: int, tmp_path: Path, text: Path) -> None:
    """fp32: the compiler fuses and reorders, and does nothing else."""
    settings = runs.arguments(
        f"--data.path={text}",
        "--engine.device=cuda",
        "--parallel.replicate=1",
        f"--engine.zero_stage={stage}",
        "--evaluation.sequences=0",
        "--profile.start_step=6",
        "--profile.num_steps=1",
    )
    runs.succeed("launch", *settings, "--run_dir=plain", cwd=tmp_path)
    runs.succeed("launch", *settings, "--run_dir=compiled", "--engine.compile=true", cwd=tmp_path, timeout_s=400)
    assert "triton_" not in (tmp_path / "plain/profile/rank0.json").read_text()
    assert "triton_" in (tmp_path / "compiled/profile/rank0.json").read_text(), "the compiler's kernels ran"
    plain, compiled = (runs.losses(tmp_path / name) for name in ("plain", "compiled"))
    print(f"stage {stage}: losses differ by {max(abs(compiled[s] / plain[s] - 1) for s in plain):.1e}")
    assert compiled == pytest.approx(plain, rel=1e-5)


def test_a_record_of_a_gpu_run_says_what_the_gpu_did(tmp_path: Path, text: Path) -> None:
    settings = runs.arguments(
        f"--data.path={text}",
        "--engine.device=cuda",
        "--engine.precision=bf16",
        "--parallel.replicate=1",
        "--profile.start_step=8",
        "--profile.num_steps=2",
    )
    runs.succeed("launch", *settings, "--run_dir=run", cwd=tmp_path)
    records = [record for record in metrics.read(tmp_path / "run/metrics.jsonl") if "train/loss" in record]
    trace = json.loads((tmp_path / "run/profile/rank0.json").read_text())
    assert any(event.get("cat") == "kernel" for event in trace["traceEvents"])
    assert len(records) == 12
    for record in records[2:]:
        phases = [record[f"time/{phase}_s"] for phase in ("forward", "backward", "update")]
        assert all(seconds > 0 for seconds in phases)
        assert sum(phases) < 1.5 * record["time/step_s"]
        assert 0 < record["speed/mfu"] < 1
        assert 0 < record["memory/peak_bytes"] < torch.cuda.get_device_properties(0).total_memory


@pytest.mark.parametrize(("first", "then"), [("cuda", "cpu"), ("cpu", "cuda")])
def test_a_run_goes_on_upon_the_other_kind_of_device(first: str, then: str, tmp_path: Path, text: Path) -> None:
    settings = (f"--data.path={text}", "--parallel.replicate=1", "--checkpoint.keep_last=9")
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    train(runs.arguments(*settings, f"--engine.device={first}"), whole, resume=False)
    copy_up_to_step_6(whole, moved)
    train(runs.arguments(*settings, f"--engine.device={then}"), moved, resume=True)
    expected = runs.losses(whole)
    assert runs.losses(moved) == pytest.approx(expected, rel=1e-5)
    assert [runs.losses(moved)[step] for step in range(7, 13)] != [expected[step] for step in range(7, 13)]


def test_a_llama_takes_the_steps_on_a_gpu_that_it_takes_on_the_cpu(tmp_path: Path) -> None:
    corpus = test_hf.write_jsonl(tmp_path)
    llama = test_hf.write_llama(tmp_path / "llama", corpus)
    settings = [
        *("--model.kind=hf", f"--model.path={llama}", f"--data.path={corpus}", "--data.text_key=body"),
        *(f"--data.tokenizer={llama}", "--parallel.replicate=1", "--engine.zero_stage=3", "--evaluation.sequences=0"),
    ]
    for device in ("cuda", "cpu"):
        runs.succeed(
            "launch", *runs.arguments(*settings, f"--engine.device={device}", f"--run_dir={device}"), cwd=tmp_path
        )
    assert runs.losses(tmp_path / "cuda") == pytest.approx(runs.losses(tmp_path / "cpu"), rel=1e-4)


@pytest.mark.ray
@pytest.mark.parametrize("world_size", WORLDS)
def test_ray_actors_on_their_own_gpus_take_the_same_steps(world_size: int, tmp_path: Path, text: Path) -> None:
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    settings = (f"--data.path={text}", "--engine.device=cuda", f"--parallel.replicate={world_size}")
    runs.succeed("launch", *runs.arguments(*settings, "--run_dir=local"), cwd=tmp_path)
    ray = ("--launch.kind=ray", "--launch.gpus_per_rank=1", "--run_dir=ray")
    output = runs.succeed("launch", *runs.arguments(*settings, *ray), cwd=tmp_path)
    assert f"{world_size} rank(s) on cuda" in output
    assert runs.losses(tmp_path / "ray") == pytest.approx(runs.losses(tmp_path / "local"), rel=1e-6)


@pytest.mark.parametrize("world_size", [pytest.param(2, id="2 GPUs", marks=needs_gpus(2))])
def test_a_killed_rank_ends_the_run_of_those_that_wait_for_it_on_their_gpus(
    world_size: int, tmp_path: Path, text: Path
) -> None:
    settings = runs.arguments(
        f"--data.path={text}", "--engine.device=cuda", f"--parallel.replicate={world_size}", "--steps=100000"
    )
    with runs.running("launch", *settings, "--run_dir=run", cwd=tmp_path) as process:
        runs.wait_for_step(process, tmp_path / "run", 5)
        ranks = psutil.Process(process.pid).children()  # and not what those start
        (victim,) = [rank for rank in ranks if rank.environ().get("RANK") == "1"]
        victim.kill()
        assert process.wait(timeout=30) == 1
        assert "rank 1" in (tmp_path / "background.log").read_text()
        _, alive = psutil.wait_procs(ranks, timeout=10)
        assert not alive


@pytest.mark.parametrize("world_size", [pytest.param(2, id="2 GPUs", marks=needs_gpus(2))])
def test_losing_a_rank_and_then_rank_0_changes_no_bit_of_a_run_on_gpus(
    world_size: int, tmp_path: Path, text: Path
) -> None:
    """SIGKILL of one, SIGSTOP of the other, under NCCL; spares take their GPUs."""
    settings = runs.arguments(
        *(
            f"--data.path={text}",
            "--engine.device=cuda",
            f"--parallel.replicate={world_size}",
            "--engine.backend=torch",
        ),
        *("--steps=14", "--checkpoint.every=1", "--evaluation.every=0", "--evaluation.sequences=0"),
        *("--evaluation.sample_tokens=0", "--model.dropout=0.1"),
    )
    recovering = ("--faulttol.mode=act", "--faulttol.drill=true", "--launch.spares=1", "--faulttol.policy.shrink=false")
    undisturbed, run = tmp_path / "undisturbed", tmp_path / "run"
    train(settings, undisturbed, resume=False)
    run.mkdir()
    for fault in (Fault(kind="kill", rank=1, step=4), Fault(kind="freeze", rank=0, step=9)):
        drill.order(folder.RunFolder(run), fault)
    train([*settings, *recovering], run, resume=False)
    recoveries = [json.loads(line) for line in (run / "events" / "recoveries.jsonl").read_text().splitlines()]
    print("seconds to each state:", [recovery["after_s"] for recovery in recoveries])
    losses = [[(loss["rank"], loss["kind"]) for loss in recovery["losses"]] for recovery in recoveries]
    assert losses == [[(1, "dead")], [(0, "frozen")]]
    assert runs.losses(run) == runs.losses(undisturbed)
    model = "model/model.safetensors"
    assert (run / model).read_bytes() == (undisturbed / model).read_bytes()
