"""Whole runs on CUDA: resumed ones take the same steps, compiled ones nearly so."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import checkpoint as ck
import launch
from launch import Job, RankContext
from tests.gpu.devices import needs_gpus
from tests.test_trainsys import runs
from tests.test_trainsys.test_resume import assert_equal_state
from trainsys import folder, metrics, recipe, trainer

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
    run = folder.open_run(resolved, resume=resume)
    job = Job(
        entry=f"{__name__}:deterministic_rank",
        payload=trainer.rank_payload(config, run, resume=resume),
        world_size=config.parallel.replicate,
        log_dir=run.logs,
        name=config.name,
    )
    interval_s = config.faulttol.heartbeat_interval_s
    result = launch.run(job, config.launch, heartbeat_interval_s=interval_s, on_output=lambda output: None)
    assert result.outcome == "completed", runs.logs(run_dir)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write_text(tmp_path_factory.mktemp("text") / "corpus")


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize(
    "overrides",
    [
        ("--engine.zero_stage=2", "--engine.precision=fp32"),
        ("--engine.zero_stage=1", "--engine.precision=fp16"),
        ("--engine.zero_stage=3", "--engine.precision=bf16", "--engine.activation_checkpointing=true"),
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
    shutil.copytree(whole, resumed)
    with ck.Checkpointer(resumed / "checkpoints") as checkpointer:
        later = [info.path for info in checkpointer.list() if info.step > 6]
    assert len(later) == 2
    for path in later:
        shutil.rmtree(path)
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
