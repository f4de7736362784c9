"""A run that loses ranks goes on in its processes, and ends as if nothing had happened."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from faulttol import fence
from faulttol.inject import Fault, fired
from faulttol.ship import shipped
from tests.test_trainsys import runs
from trainsys import ConfigError, drill, recipe
from trainsys.check import check
from trainsys.elastic import smaller_sizes, with_ranks
from trainsys.folder import RunFolder
from trainsys.session import launch_ranks

_SETTINGS = (
    *("--steps=14", "--parallel.replicate=3", "--batch.global_sequences=12", "--checkpoint.every=1"),
    *("--evaluation.every=0", "--evaluation.sequences=0", "--evaluation.sample_tokens=0", "--model.dropout=0.1"),
)
_RECOVERING = (
    *("--faulttol.mode=act", "--faulttol.drill=true", "--faulttol.heartbeat_interval_s=0.2"),
    # A slow machine must not look like a fault, and there is always a spare to come.
    *("--faulttol.health.frozen_after_s=20", "--faulttol.health.stuck_after_s=20", "--faulttol.policy.shrink=false"),
    "--faulttol.policy.abort_timeout_s=20",
)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write_text(tmp_path_factory.mktemp("text") / "corpus")


@pytest.fixture(scope="module")
def undisturbed(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing happens to, by torch's engine."""
    folder = tmp_path_factory.mktemp("undisturbed")
    runs.succeed("launch", *_arguments(text, folder / "run", "--engine.backend=torch"), cwd=folder)
    return folder / "run"


def _arguments(text: Path, run_dir: Path, *settings: str) -> list[str]:
    return runs.arguments(f"--data.path={text}", f"--run_dir={run_dir}", *_SETTINGS, *settings)


def _order(run_dir: Path, *faults: Fault) -> None:
    run_dir.mkdir()
    for fault in faults:
        drill.order(RunFolder(run_dir), fault)


def _recoveries(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "events" / "recoveries.jsonl").read_text().splitlines()]


def _faults(run_dir: Path) -> list[tuple[str, int]]:
    return [(fault.kind, fault.rank) for fault in fired(drill.record(RunFolder(run_dir)))]


@pytest.mark.slow
def test_losing_a_rank_and_then_rank_0_changes_no_bit_of_the_run(tmp_path: Path, text: Path, undisturbed: Path) -> None:
    """SIGKILL of one, SIGSTOP of the other; spares take their places, and the launcher makes new ones."""
    run = tmp_path / "run"
    _order(run, Fault(kind="kill", rank=1, step=4), Fault(kind="freeze", rank=0, step=9))
    settings = _arguments(text, run, "--engine.backend=torch", *_RECOVERING, "--launch.spares=1")
    output = runs.succeed("launch", *settings, cwd=tmp_path)
    assert _faults(run) == [("kill", 1), ("freeze", 0)]
    losses = [[(loss["rank"], loss["kind"]) for loss in recovery["losses"]] for recovery in _recoveries(run)]
    assert losses == [[(1, "dead")], [(0, "frozen")]]
    assert "generation 2: go on with 3 ranks; 1 spare(s) step in" in output
    assert runs.losses(run) == runs.losses(undisturbed)
    model = "model/model.safetensors"
    assert (run / model).read_bytes() == (undisturbed / model).read_bytes()


@pytest.mark.slow
def test_a_flipped_bit_is_found_its_rank_replaced_and_the_run_goes_on_from_before_it(
    tmp_path: Path, text: Path
) -> None:
    """Then two ranks are stopped at once; there is one spare, and another on its way."""
    run, undisturbed = tmp_path / "run", tmp_path / "undisturbed"
    flip = Fault(kind="bit_flip", rank=1, step=5, element=7, bit=22)
    _order(run, flip, *(Fault(kind="freeze", rank=rank, step=8) for rank in (0, 2)))
    whole = ("--engine.backend=torch", "--engine.zero_stage=0")
    runs.succeed("launch", *_arguments(text, undisturbed, *whole), cwd=tmp_path)
    looked_for = ("--faulttol.corruption.replicas_every=1", "--faulttol.corruption.products_every=5")
    looked_for = (*looked_for, f"--faulttol.ship_to={tmp_path / 'kept'}")
    settings = _arguments(text, run, *whole, *looked_for, *_RECOVERING)
    output = runs.succeed("launch", *settings, "--launch.spares=1", "--checkpoint.keep_last=3", cwd=tmp_path)
    assert _faults(run)[0] == ("bit_flip", 1)
    first, *others = _recoveries(run)
    assert [(loss["rank"], loss["kind"]) for loss in first["losses"]] == [(1, "numeric")]
    assert "differs on rank 1 in bits 22; the state after step 3 was right" in first["losses"][0]["detail"]
    assert {(loss["rank"], loss["kind"]) for one in others for loss in one["losses"]} == {(0, "frozen"), (2, "frozen")}
    assert "resumes after step 3" in output, "the copy of step 4 may have been made after the bit had flipped"
    assert not (run / "distrusted.json").exists(), "it was heeded"
    generations = range(1 + len(_recoveries(run)))
    kept = {(record.rank, record.generation) for record in shipped(str(tmp_path / "kept"))}
    assert kept == {(rank, generation) for rank in range(3) for generation in generations}
    assert runs.losses(run) == runs.losses(undisturbed)
    model = "model/model.safetensors"
    assert (run / model).read_bytes() == (undisturbed / model).read_bytes()


@pytest.mark.slow
def test_a_slow_link_of_a_run_that_is_observed_is_named_by_probes(tmp_path: Path, text: Path) -> None:
    run = tmp_path / "run"
    _order(run, Fault(kind="slow_link", rank=1, to_rank=0, step=120, rate_bytes_per_s=1_000_000))
    settings = runs.arguments(
        *(f"--data.path={text}", f"--run_dir={run}", *_SETTINGS[1:3], *_SETTINGS[4:], "--steps=150"),
        *("--checkpoint.every=0", "--engine.backend=torch", "--engine.zero_stage=0"),
        *("--faulttol.mode=observe", "--faulttol.drill=true", "--faulttol.detector.warmup_steps=2"),
    )
    output = runs.succeed("launch", *settings, cwd=tmp_path)
    assert "slow is the link 1 -> 0" in output
    findings = [json.loads(line) for line in (run / "events" / "findings.jsonl").read_text().splitlines()]
    named = [(one["rank"], one["to_rank"]) for found in findings for one in found["suspects"]]
    assert (1, 0) in named


@pytest.mark.slow
def test_a_slow_rank_is_replaced_once_it_has_cost_as_much_as_that(tmp_path: Path, text: Path) -> None:
    """A gradient goes wrong long before that, so that there are healthy steps enough to learn what is usual."""
    run = tmp_path / "run"
    _order(run, Fault(kind="gradient", rank=2, step=9, factor=1e6), Fault(kind="slow", rank=1, step=50, seconds=0.3))
    settings = runs.arguments(
        *(f"--data.path={text}", f"--run_dir={run}", *_SETTINGS[1:], "--steps=90", "--launch.spares=1"),
        *("--engine.backend=torch", "--engine.zero_stage=0", "--faulttol.corruption.gradient_norms=true"),
        "--faulttol.corruption.replicas_every=10",
        *(*_RECOVERING, "--faulttol.policy.recovery_cost_s=0.5", "--faulttol.detector.warmup_steps=2"),
    )
    runs.succeed("launch", *settings, "--checkpoint.keep_last=20", cwd=tmp_path)
    losses = [(loss["rank"], loss["kind"]) for recovery in _recoveries(run) for loss in recovery["losses"]]
    assert losses == [(2, "numeric"), (1, "slow")]
    assert sorted(runs.losses(run)) == list(range(1, 91))


@pytest.mark.slow
def test_a_launch_that_was_killed_is_resumed_behind_a_fence_that_keeps_its_ranks_out(
    tmp_path: Path, text: Path, undisturbed: Path
) -> None:
    run = tmp_path / "run"
    settings = _arguments(text, run, "--engine.backend=torch", *_RECOVERING)
    with runs.running("launch", *settings, cwd=tmp_path) as launcher:
        runs.wait_for_step(launcher, run, 4)
        launcher.send_signal(signal.SIGKILL)
        launcher.wait(30)
    assert fence.current_generation(run / "generation") == 0
    runs.succeed("launch", *settings, "--resume", cwd=tmp_path)
    with pytest.raises(fence.Fenced, match="generation 0 is over, the job is in generation 1"):
        fence.Fence(run / "generation", 0).check()
    assert runs.losses(run) == runs.losses(undisturbed)


@pytest.mark.slow
def test_a_rank_that_hangs_is_found_by_its_not_leaving_and_the_run_shrinks_without_spares(
    tmp_path: Path, text: Path
) -> None:
    """DeepSpeed; two of three ranks go on with the whole batch, so the losses stay close."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    deepspeed = ("--engine.backend=deepspeed", "--model.dropout=0", "--steps=8")
    settings = [setting for setting in _SETTINGS if not setting.startswith(("--steps", "--model.dropout"))]
    common = [f"--data.path={text}", *settings, *deepspeed]
    runs.succeed("launch", *runs.arguments(*common, f"--run_dir={whole}"), cwd=tmp_path)
    _order(run, Fault(kind="hang", rank=1, step=4))
    recovering = [setting for setting in _RECOVERING if "shrink" not in setting and "abort" not in setting]
    stall = ("--faulttol.health.stalled_after_s=2", "--faulttol.policy.spare_wait_s=0")
    runs.succeed("launch", *runs.arguments(*common, *recovering, *stall, f"--run_dir={run}"), cwd=tmp_path)
    recovery, *later = _recoveries(run)
    assert [(loss["rank"], loss["kind"]) for loss in recovery["losses"]] == [(1, "hung")]
    assert recovery["world_size"] == 2
    assert not any(one["losses"] for one in later), "a process that was started anew may have come before the end"
    found, expected = runs.losses(run), runs.losses(whole)
    assert found.keys() == expected.keys()
    for step, loss in expected.items():
        assert found[step] == pytest.approx(loss, rel=1e-4), "fp32 sums in another order"


@pytest.mark.slow
def test_an_error_that_comes_back_in_its_step_ends_the_run_with_its_traceback(tmp_path: Path, text: Path) -> None:
    run = tmp_path / "run"
    _order(run, *(Fault(kind="raise", rank=1, step=5, seed=seed) for seed in range(2)))
    done = runs.run("launch", *_arguments(text, run, "--engine.backend=torch", *_RECOVERING), cwd=tmp_path)
    assert done.returncode == 1
    assert _faults(run) == [("raise", 1), ("raise", 1)]
    first, last = _recoveries(run)
    assert first["world_size"] == 3, "the first time it may have been chance"
    assert last["decision"].startswith("recovery is given up (user error)")
    told = done.stdout + done.stderr
    assert "recovery was given up (user error): InjectedFault in step 4, 2 times" in told
    assert "InjectedFault: injected at step 5 of rank 1" in told
    assert "Traceback" in told


@pytest.mark.slow
@pytest.mark.ray
def test_a_run_on_ray_actors_goes_on_when_one_is_stopped(tmp_path: Path, text: Path, undisturbed: Path) -> None:
    """Ray knows nothing of a stopped actor; its node's agent does."""
    run = tmp_path / "run"
    _order(run, Fault(kind="freeze", rank=1, step=6))
    ray = ("--launch.kind=ray", "--launch.cpus_per_rank=0.5", "--launch.spares=1")
    runs.succeed(
        "launch", *_arguments(text, run, "--engine.backend=torch", *_RECOVERING, *ray), cwd=tmp_path, timeout_s=240
    )
    assert _faults(run) == [("freeze", 1)]
    (recovery,) = _recoveries(run)
    assert [(loss["rank"], loss["kind"]) for loss in recovery["losses"]] == [(1, "frozen")]
    assert runs.losses(run) == runs.losses(undisturbed)


def _config(*settings: str) -> Any:
    return recipe.load(["tiny"], ["--optim.kind=adamw", *settings]).config


def test_a_run_shrinks_by_whole_replicas_that_share_the_same_batch() -> None:
    config = _config(
        "--parallel.replicate=6",
        "--parallel.tensor=2",
        "--batch.global_sequences=12",
        "--engine.zero_stage=0",
        "--batch.micro_sequences=1",
        "--engine.backend=torch",
        "--engine.precision=fp32",
    )
    assert list(smaller_sizes(config)) == [8, 6, 4, 2], "5 replicas do not share 12 sequences"
    smaller = with_ranks(config, 8)
    assert (smaller.parallel.replicate, smaller.parallel.tensor) == (4, 2)
    assert smaller.batch == config.batch
    with pytest.raises(ConfigError, match="no whole number of replicas of 2 ranks"):
        with_ranks(config, 7)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (["--launch.spares=1"], "launch.spares: 1 would never step in; set faulttol.mode = 'act'"),
        (["--faulttol.mode=act", "--checkpoint.every=0"], "faulttol.mode: 'act' has nothing to go on from"),
        (
            ["--faulttol.mode=act", "--faulttol.health.stuck_after_s=1"],
            "faulttol.health.stuck_after_s: 1 s is under four heartbeats",
        ),
    ],
)
def test_recovery_that_cannot_work_is_refused_with_the_reason(settings: list[str], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem.replace("(", r"\(")):
        check(_config(*settings))


def test_copies_on_other_hosts_are_refused_where_all_ranks_are_on_one() -> None:
    settings = ["--launch.kind=local", "--checkpoint.memory.every=1"]
    with pytest.raises(ConfigError, match=r"checkpoint\.memory\.peers: 1 copies on other hosts.*allowed: 0"):
        launch_ranks(recipe.load(["tiny"], settings), resume=False, on_output=lambda _: None)
