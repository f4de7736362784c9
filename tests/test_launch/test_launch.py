"""What `run` refuses, how a failure is told, and the module as a command."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import launch
from faulttol import fence
from faulttol.config import HealthConfig, PolicyConfig
from launch.errors import RankNote
from tests.sources import ROOT


def run(tmp_path: Path, job: dict[str, Any], config: dict[str, Any], interval_s: float = 0.5) -> None:
    launch.run(
        launch.Job(**{"entry": "a:b", "log_dir": tmp_path / "logs", "name": "job", **job}),
        launch.LaunchConfig(**config),
        heartbeat_interval_s=interval_s,
        on_output=lambda output: None,
    )


@pytest.mark.parametrize(
    ("job", "config", "message"),
    [
        ({"entry": "no_colon"}, {}, "job.entry: 'no_colon' is not of the form 'package.module:function'"),
        ({"world_size": 0}, {}, "job.world_size: 0 is not at least 1"),
        ({"payload": {"a": {1}}}, {}, "job.payload: cannot be written as JSON: "),
        ({}, {"kind": "slurm"}, "launch.kind: 'slurm' is none of local, ray"),
        ({}, {"gpus_per_rank": -1.0}, "launch.gpus_per_rank: -1.0 is below 0"),
        ({}, {"stop_grace_s": 0.0}, "launch.stop_grace_s: 0.0 is not above 0"),
        ({}, {"frozen_timeout_s": 1.0}, "launch.frozen_timeout_s: 1.0 s is under three heartbeats of 0.5 s"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_starts(
    tmp_path: Path, job: dict[str, Any], config: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError) as caught:
        run(tmp_path, job, config)
    assert str(caught.value).startswith(message)
    assert not (tmp_path / "logs").exists()


def test_all_that_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        run(tmp_path, {}, {"start_timeout_s": 0.0, "cpus_per_rank": -1.0}, interval_s=0.0)
    assert str(caught.value).splitlines() == [
        "faulttol.heartbeat_interval_s: 0.0 is not above 0",
        "launch.cpus_per_rank: -1.0 is not above 0",
        "launch.start_timeout_s: 0.0 is not above 0",
    ]


def note(rank: int, summary: str, *, traceback: str = "", log_tail: str = "") -> RankNote:
    return RankNote(rank=rank, summary=summary, traceback=traceback, log=f"rank{rank}.log", log_tail=log_tail)


def failure(rank: int, *notes: RankNote) -> launch.RankFailed:
    return launch.RankFailed(job_name="job", rank=rank, reason="raised", exit_code=1, signal=None, notes=notes)


def test_a_failure_tells_of_the_rank_at_fault_first_and_its_traceback_once() -> None:
    traceback = "Traceback (most recent call last):\n  File ...\nValueError: boom\n"
    error = failure(
        1,
        note(0, "running, at step 3 (forward)", log_tail="step 1\nstep 2\nstep 3\n"),
        note(1, "raised ValueError: boom", traceback=traceback, log_tail=f"step 1\n{traceback}"),
    )
    assert str(error).splitlines() == [
        "job: rank 1 of 2: raised ValueError: boom",
        *traceback.splitlines(),
        "  --- end of rank1.log",
        "  | step 1",
        "  | (the traceback above)",
        "rank 0: running, at step 3 (forward)",
        "  --- end of rank0.log",
        "  | step 1",
        "  | step 2",
        "  | step 3",
    ]
    assert (error.rank, error.reason, error.exit_code, error.signal) == (1, "raised", 1, None)
    assert error.traceback == traceback
    assert error.log_tails[0] == "step 1\nstep 2\nstep 3\n"


def test_a_failure_shows_little_of_the_other_ranks() -> None:
    long = "".join(f"line {index}\n" for index in range(1000))
    lines = str(failure(0, note(0, "died", log_tail=long), note(1, "running", log_tail=long))).splitlines()
    assert lines.count("  | line 999") == 2
    other = lines[lines.index("rank 1: running") :]
    assert len(other) < 20
    assert len(lines) < 120


def test_an_empty_log_is_said_to_be_empty() -> None:
    assert "(rank0.log is empty)" in str(failure(0, note(0, "died")))


def test_python_m_launch_is_trainsys_launch() -> None:
    ours, theirs = (
        subprocess.run(
            [sys.executable, "-m", *command, "no-such-recipe"],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )
        for command in (["launch"], ["trainsys", "launch"])
    )
    assert "no-such-recipe" in ours.stderr
    assert (ours.returncode, ours.stdout, ours.stderr) == (theirs.returncode, theirs.stdout, theirs.stderr)


def test_import_does_not_load_torch_or_ray() -> None:
    code = "import launch, faulttol, sys; assert not {'torch', 'ray'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_output_that_nobody_takes_ends_no_job(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    passed_on: list[bytes] = []

    def broken(output: bytes) -> None:
        passed_on.append(output)
        raise BrokenPipeError(32, "Broken pipe")

    job = launch.Job(
        entry="tests.test_launch.entries:echo", payload={"word": "hello"}, world_size=1, log_dir=tmp_path, name="job"
    )
    result = launch.run(job, launch.LaunchConfig(), heartbeat_interval_s=0.5, on_output=broken)
    assert (result.outcome, len(result.results)) == ("completed", 1)
    assert passed_on
    assert caplog.text.count("what the job prints cannot be passed on: [Errno 32] Broken pipe; its logs have it") == 1
    assert "says hello" in (tmp_path / "rank0.log").read_text()


def test_a_launch_that_comes_too_late_touches_nothing_of_the_other(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "rank0.log"
    log.parent.mkdir()
    log.write_text("of the other")
    fence.publish(tmp_path / "generation", 3)
    recovery = launch.Recovery(
        fence=tmp_path / "generation",
        record=tmp_path / "recoveries.jsonl",
        first_generation=3,
        health=HealthConfig(),
        policy=PolicyConfig(),
    )
    job = launch.Job(entry="a:b", world_size=1, log_dir=log.parent, name="job")
    with pytest.raises(launch.LaunchError, match="generation 3 of the run has begun"):
        launch.run(
            job, launch.LaunchConfig(), heartbeat_interval_s=0.5, on_output=lambda output: None, recovery=recovery
        )
    assert log.read_text() == "of the other"
