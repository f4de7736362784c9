"""What the trainer makes of lazy checkpoints: the memory tier, saves in the middle of a step, saves in every step."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

import checkpoint as ck
from checkpoint import hosts
from faulttol.errors import RingError, RunError
from faulttol.run import records
from tests.test_trainsys import runs
from tests.test_trainsys.test_resume import assert_equal_state


@pytest.fixture
def agents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where runs of this test keep the folders of their agents; none outlives the test."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    yield folder
    for record in folder.glob("trainsys-*/*/agent.json"):
        hosts.start(record.parent, limit_bytes=1 << 20).stop()


@pytest.mark.slow
def test_a_killed_run_goes_on_from_memory_to_the_same_bits(tmp_path: Path, agents: Path) -> None:
    text = runs.write_text(tmp_path / "corpus")
    settings = runs.arguments(f"--data.path={text}", "--model.dropout=0.1", "--checkpoint.every=0")
    in_memory = ("--checkpoint.memory.every=1", "--checkpoint.memory.peers=0")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    runs.succeed("launch", *settings, f"--run_dir={whole}", cwd=tmp_path)
    args = [*settings, *in_memory, f"--run_dir={broken}"]
    with runs.running("launch", *args, cwd=tmp_path) as process:
        runs.wait_for_step(process, broken, 6)
        process.kill_tree()
    assert not list((broken / "checkpoints").glob("step-*")), "nothing was saved on disk"
    printed = runs.succeed("launch", *args, "--resume", cwd=tmp_path)
    (line,) = [line for line in printed.splitlines() if "resumes after step" in line]
    assert "(from the memory tier)" in line
    assert int(line.partition("after step ")[2].split()[0]) >= 4, "the last step but one was saved, or the one before"
    assert runs.losses(broken) == runs.losses(whole)
    assert_equal_state(whole, broken)
    assert not list(agents.glob("trainsys-*/*")), "a run that is over leaves no agent"


@pytest.mark.slow
def test_a_stop_is_saved_in_the_middle_of_the_step_and_at_its_end(tmp_path: Path) -> None:
    """With long steps, and no save on the cadence: the step before the stop can only come from the urgent save."""
    text, run = runs.write_text(tmp_path / "corpus", documents=60), tmp_path / "run"
    settings = runs.arguments(
        f"--data.path={text}", f"--run_dir={run}", "--checkpoint.every=0", "--batch.global_sequences=400"
    )

    def is_in_second_step() -> bool:
        try:
            marks = [mark for record in records(run) for mark in record.marks]
        except (RunError, RingError):  # there is no ring yet, or it is being made
            return False
        return any(mark.kind == "step_begin" and mark.step == 2 for mark in marks)

    with runs.running("launch", *settings, "--faulttol.mode=observe", cwd=tmp_path) as process:
        runs.wait_until(is_in_second_step, process, run)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == 3, runs.logs(run)
    last = runs.last_step(run)
    with ck.Checkpointer(run / "checkpoints") as checkpointer:
        found = [info.step for info in checkpointer.list()]
        newest = checkpointer.latest(verify="deep")
    assert newest is not None
    assert newest.step == last
    assert last >= 2
    assert found == [last - 1, last]
