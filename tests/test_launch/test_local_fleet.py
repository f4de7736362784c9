"""The processes of this machine as a fleet, where they or the machine do not do as they should."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

import launch
from faulttol.config import HealthConfig, PolicyConfig
from launch import LaunchConfig, LaunchError, local, member, worker
from launch.job import Job
from tests.test_launch.client import runs, wait_for
from tests.test_launch.contract import GONE_S


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[local.LocalFleet]:
    job = Job(
        entry="tests.test_launch.entries:until_stopped",
        payload={"folder": str(tmp_path), "deaf": True},
        world_size=2,
        log_dir=tmp_path,
        name="job",
    )
    with local.start_fleet(job, LaunchConfig(), heartbeat_interval_s=0.5) as fleet:
        wait_for(lambda: all(report.report.pulse for report in fleet.look()), "both to have joined")
        yield fleet


def _process(fleet: local.LocalFleet, number: int) -> Any:
    return fleet._processes[number]


@pytest.fixture
def stuck(fleet: local.LocalFleet, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The process of member 0, of which the kernel tells no end: as long as it waits there for a disk it has none."""
    pid = int(_process(fleet, 0).pid)
    waitid = os.waitid

    def telling(kind: int, number: int, options: int) -> Any:
        return None if number == pid else waitid(kind, number, options)  # type: ignore[arg-type]

    monkeypatch.setattr(local, "_GONE_TIMEOUT_S", 0.3)
    with monkeypatch.context() as patch:
        patch.setattr(os, "waitid", telling)
        yield pid


def test_a_process_that_stays_in_the_kernel_ends_no_job(
    fleet: local.LocalFleet, stuck: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    began_s = time.monotonic()
    with caplog.at_level(logging.WARNING):
        fleet.end(0)
    assert time.monotonic() - began_s < 5.0
    assert f"process {stuck} is still there after SIGKILL" in caplog.text
    assert fleet.look()[0].report.exit is None
    began_s = time.monotonic()
    with monkeypatch.context() as patch:
        patch.setattr(local, "_GONE_TIMEOUT_S", 30.0)
        fleet.kill()
    assert time.monotonic() - began_s < 15.0, "what is known to stay is not waited for again"
    assert [report.report.exit is None for report in fleet.look()] == [True, False]


def test_all_others_are_gone_before_it_is_told_which_process_stays(fleet: local.LocalFleet, stuck: int) -> None:
    other = _process(fleet, 1).pid
    with pytest.raises(LaunchError, match=f"process {stuck} still there after SIGKILL"):
        fleet.kill()
    assert not runs(other)


def test_a_member_that_has_ended_costs_no_more_looks_and_leaves_no_notes(fleet: local.LocalFleet) -> None:
    (folder,) = {path.parent for path in _process(fleet, 1).signs}
    assert list(folder.glob("member1.*"))
    os.kill(_process(fleet, 1).pid, signal.SIGKILL)
    wait_for(lambda: fleet.look()[1].report.exit is not None, "the end to be seen", GONE_S)
    first, second = fleet.look()[1], fleet.look()[1]
    assert first.report is second.report
    assert first.report.pulse is not None, "what it said last stays known"
    assert not list(folder.glob("member1.*"))
    assert list(folder.glob("member0.*"))


def test_a_member_that_cannot_be_started_leaves_nothing_behind(
    fleet: local.LocalFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    descriptors = set(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", refuse)
        with pytest.raises(BlockingIOError):
            fleet.add()
    with monkeypatch.context() as patch:
        patch.setattr(local, "start_ticks", refuse)
        with pytest.raises(BlockingIOError):
            fleet.add()
    assert set(os.listdir("/proc/self/fd")) == descriptors
    assert len(fleet.look()) == 2
    fleet.add()
    wait_for(lambda: fleet.look()[2].report.pulse is not None, "the one that there is room for again")


def test_a_spare_that_is_stopped_in_its_start_is_replaced_and_its_successor_steps_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(member, "UNFIT_S", 1.0)
    job = Job(
        entry="tests.test_launch.entries:generations",
        payload={"folder": str(tmp_path)},
        world_size=2,
        log_dir=tmp_path,
        name="job",
    )
    recovery = launch.Recovery(
        fence=tmp_path / "generation",
        record=tmp_path / "recoveries.jsonl",
        health=HealthConfig(frozen_after_s=20.0, stuck_after_s=20.0),  # patience for a busy machine
        policy=PolicyConfig(abort_timeout_s=20.0, spare_wait_s=60.0),
    )
    said: list[bytes] = []
    ended: list[launch.JobResult] = []

    def run() -> None:
        config = LaunchConfig(spares=1)
        ended.append(launch.run(job, config, heartbeat_interval_s=0.5, on_output=said.append, recovery=recovery))

    running = threading.Thread(target=run)
    running.start()
    try:
        wait_for(lambda: _worker(2) is not None, "the spare to be there")
        spare = _worker(2)
        assert spare is not None
        os.kill(spare, signal.SIGSTOP)
        wait_for(lambda: b"generation 0 did step 20" in b"".join(said), "the ranks to work", 60.0)
        wait_for(lambda: b"spare0: frozen: its process is stopped (state T); it was ended" in b"".join(said), "its end")
        assert not runs(spare)
        os.kill(int((tmp_path / "rank1.pid").read_text()), signal.SIGKILL)
        wait_for(lambda: b"generation 1 did step 20" in b"".join(said), "its successor to step in", 60.0)
        # Both were started meanwhile: the stopped one's successor, and rank 1's.
        assert int((tmp_path / "rank1.pid").read_text()) in (_worker(3), _worker(4))
    finally:
        (tmp_path / "finish").touch()
        running.join(60.0)
    assert [result.outcome for result in ended] == ["completed"]


def _worker(number: int) -> int | None:
    """The process of a member among the children of this one."""
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if any(part.endswith(f"/member{number}.job.json") for part in child.cmdline()):
                return child.pid
    return None


_UNINTERRUPTIBLE = """
import ctypes
libc = ctypes.CDLL(None)
libc.vfork()  # until its child is gone, the parent waits in the kernel, in state D
libc.pause()
"""


def test_a_process_in_the_kernel_is_told_from_one_that_sleeps() -> None:
    with subprocess.Popen([sys.executable, "-c", _UNINTERRUPTIBLE], start_new_session=True) as process:
        try:
            wait_for(lambda: local._is_in_kernel(process.pid), "it to be in the kernel")
            assert not local._is_in_kernel(os.getpid())
        finally:
            os.killpg(process.pid, signal.SIGKILL)
    assert not local._is_in_kernel(process.pid), "it is gone"


def test_what_is_in_the_kernel_is_waited_for_for_less_long(
    fleet: local.LocalFleet, stuck: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "_GONE_TIMEOUT_S", 600.0)
    monkeypatch.setattr(local, "_IN_KERNEL_S", 0.1)
    asked_s: list[float] = []
    monkeypatch.setattr(local, "_is_in_kernel", lambda pid: asked_s.append(time.monotonic()) or len(asked_s) > 20)
    fleet.end(0)
    assert asked_s[-1] - asked_s[19] >= 0.1, "not before it has been there for that long"


def test_what_a_rank_has_to_tell_waits_for_room_on_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    write, tries = Path.write_text, list[int]()

    def full(path: Path, text: str) -> int:
        tries.append(1)
        if len(tries) < 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, text)

    monkeypatch.setattr(worker, "_AGAIN_S", 0.01)
    monkeypatch.setattr(Path, "write_text", full)
    worker._publish(tmp_path / "standing.json", {"state": "finished"})
    assert (tmp_path / "standing.json").read_text() == '{"state": "finished"}'
    assert capfd.readouterr().err.count("No space left on device; this rank goes on when there is room") == 1
    tries.clear()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", SimpleNamespace(write=lambda text: full(tmp_path, text)))  # on the same disk
        worker._publish(tmp_path / "outcome.json", {"kind": "returned"})
    assert (tmp_path / "outcome.json").exists()
