"""The heartbeat file can be read whole at any moment, in whatever state its rank is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from faulttol import Heartbeat, HeartbeatError, read_heartbeat
from faulttol.heartbeat import _LIFE_OFFSET, _PROGRESS_OFFSET, _SLOT_BYTES

# The phase repeats the step, so that a reader can see whether the two belong together.
SPINNING_RANK = """
import sys
from pathlib import Path
from faulttol import Heartbeat
heartbeat = Heartbeat(Path(sys.argv[1]), 0.001)
step = 0
while True:
    step += 1
    heartbeat.beat(step=step, phase=f"phase {step}")
"""


def wait_for(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "waited in vain"
        time.sleep(0.002)


@pytest.fixture
def spinning(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A process that beats as fast as it can, and its heartbeat file."""
    path = tmp_path / "heartbeat"
    with subprocess.Popen([sys.executable, "-c", SPINNING_RANK, str(path)]) as rank:
        try:
            wait_for(path.exists)
            yield rank, path
        finally:
            rank.kill()


def test_a_reader_sees_what_the_loop_last_wrote(tmp_path: Path) -> None:
    with Heartbeat(tmp_path / "heartbeat", 60.0) as heartbeat:
        heartbeat.beat(step=3, phase="data")
        heartbeat.beat(step=4, phase="forward")
        view = read_heartbeat(heartbeat.path)
    assert (view.step, view.phase, view.pid) == (4, "forward", os.getpid())
    assert view.started_ns <= view.progress_ns <= time.monotonic_ns()


def test_each_beat_changes_the_progress_count_and_nothing_else_does(tmp_path: Path) -> None:
    with Heartbeat(tmp_path / "heartbeat", 60.0) as heartbeat:
        before = read_heartbeat(heartbeat.path)
        heartbeat.beat(step=0, phase="start")
        after = read_heartbeat(heartbeat.path)
    assert after.progress_count == before.progress_count + 1
    assert after.alive_count == before.alive_count


def test_life_is_signed_while_the_loop_is_blocked(tmp_path: Path) -> None:
    with Heartbeat(tmp_path / "heartbeat", 0.01) as heartbeat:
        first = read_heartbeat(heartbeat.path)
        wait_for(lambda: read_heartbeat(heartbeat.path).alive_count > first.alive_count + 2)
        assert read_heartbeat(heartbeat.path).progress_count == first.progress_count


def test_nothing_changes_after_close_and_the_file_stays(tmp_path: Path) -> None:
    heartbeat = Heartbeat(tmp_path / "heartbeat", 0.01)
    heartbeat.beat(step=7, phase="end")
    heartbeat.close()
    heartbeat.close()
    assert read_heartbeat(heartbeat.path).step == 7
    assert not [thread for thread in threading.enumerate() if thread.name == "faulttol-heartbeat"]


def test_the_file_appears_only_when_complete(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_heartbeat(tmp_path / "heartbeat")
    with Heartbeat(tmp_path / "heartbeat", 60.0):
        assert [path.name for path in tmp_path.iterdir()] == ["heartbeat"]
        assert read_heartbeat(tmp_path / "heartbeat").alive_count == 1


def test_no_read_is_torn_while_the_loop_spins(spinning: tuple[subprocess.Popen[bytes], Path]) -> None:
    _, path = spinning
    last = 0
    for _ in range(5000):
        view = read_heartbeat(path)
        assert view.phase in (f"phase {view.step}", "start")
        assert view.progress_count == view.step + 1
        assert view.progress_count >= last
        last = view.progress_count


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_a_stopped_or_killed_rank_can_be_read_and_stands_still(
    spinning: tuple[subprocess.Popen[bytes], Path], number: signal.Signals
) -> None:
    rank, path = spinning
    wait_for(lambda: read_heartbeat(path).step > 100)
    rank.send_signal(number)
    # waitid sees both, and leaves a killed child for its owner to reap.
    os.waitid(os.P_PID, rank.pid, os.WEXITED | os.WSTOPPED | os.WNOWAIT)
    view = read_heartbeat(path)
    assert view.phase == f"phase {view.step}"
    assert read_heartbeat(path) == view


@pytest.mark.parametrize("torn", [0, 1])
@pytest.mark.parametrize("offset", [_LIFE_OFFSET, _PROGRESS_OFFSET])
def test_one_torn_slot_hides_at_most_the_newest_record(tmp_path: Path, torn: int, offset: int) -> None:
    with Heartbeat(tmp_path / "heartbeat", 60.0) as heartbeat:
        for step in range(1, 5):
            heartbeat.beat(step=step, phase="data")
            heartbeat._stamp_life()
        before = read_heartbeat(heartbeat.path)
        with open(heartbeat.path, "r+b") as file:
            file.seek(offset + torn * _SLOT_BYTES + 9)
            file.write(b"\xff\xff\xff")
        view = read_heartbeat(heartbeat.path)
    newest = before.alive_count if offset == _LIFE_OFFSET else before.progress_count
    seen = view.alive_count if offset == _LIFE_OFFSET else view.progress_count
    assert seen == (newest - 1 if newest % 2 == torn else newest)


def test_a_file_with_both_slots_torn_is_refused(tmp_path: Path) -> None:
    with Heartbeat(tmp_path / "heartbeat", 60.0) as heartbeat:
        heartbeat.beat(step=1, phase="data")
        with open(heartbeat.path, "r+b") as file:
            for slot in (0, 1):
                file.seek(_PROGRESS_OFFSET + slot * _SLOT_BYTES + 9)
                file.write(b"\xff\xff\xff")
        with pytest.raises(HeartbeatError, match="the file is damaged"):
            read_heartbeat(heartbeat.path)


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(bytes(512))
    with pytest.raises(HeartbeatError, match="not a heartbeat file"):
        read_heartbeat(tmp_path / "other")


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_may_not_speak_for_its_parent(tmp_path: Path) -> None:
    with Heartbeat(tmp_path / "heartbeat", 60.0) as heartbeat:
        pid = os.fork()
        if pid == 0:
            try:
                heartbeat.beat(step=9, phase="child")
            except HeartbeatError:
                os._exit(7)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
        assert read_heartbeat(heartbeat.path).step == 0


def test_a_phase_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with Heartbeat(tmp_path / "heartbeat", 60.0) as heartbeat:
        with pytest.raises(ValueError, match="longer than 24 bytes"):
            heartbeat.beat(step=0, phase="x" * 25)
        heartbeat.beat(step=0, phase="é" * 12)
        assert read_heartbeat(heartbeat.path).phase == "é" * 12


@pytest.mark.parametrize("interval_s", [0.0, -1.0, float("nan")])
def test_an_interval_that_is_not_above_zero_is_refused(tmp_path: Path, interval_s: float) -> None:
    with pytest.raises(ValueError, match="interval_s"):
        Heartbeat(tmp_path / "heartbeat", interval_s)
    assert not list(tmp_path.iterdir())
