"""Scheduled faults strike where and when they should, and are on record when they did."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from faulttol import drill, sockets
from faulttol.__main__ import main
from faulttol.agent import process_state
from faulttol.errors import InjectedFault
from faulttol.finding import FindingKind
from faulttol.inject import KINDS, Fault, Injector, fired, schedule, strikes

STEPPING_RANK = """
import sys
from pathlib import Path
from faulttol.inject import Fault, Injector
injector = Injector([Fault(kind=sys.argv[2], rank=0, step=2)], rank=0, record=Path(sys.argv[1]))
for step in range(4):
    injector.at(step)
    print(step, flush=True)
"""


def test_a_fault_strikes_its_rank_at_its_step_only(tmp_path: Path) -> None:
    schedule = [Fault(kind="raise", rank=1, step=2), Fault(kind="raise", rank=0, step=3)]
    injector = Injector(schedule, rank=1, record=tmp_path / "record")
    injector.at(0)
    injector.at(1)
    assert fired(tmp_path / "record") == []
    with pytest.raises(InjectedFault, match="step 2 of rank 1"):
        injector.at(2)
    injector.at(3)
    assert fired(tmp_path / "record") == [Fault(kind="raise", rank=1, step=2)]


@pytest.mark.parametrize("kind", ["kill", "freeze", "hang"])
def test_a_rank_goes_no_further_than_its_fault(tmp_path: Path, kind: str) -> None:
    record = tmp_path / "record"
    command = [sys.executable, "-c", STEPPING_RANK, str(record), kind]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as rank:
        assert rank.stdout is not None
        try:
            assert [rank.stdout.readline() for _ in range(2)] == ["0\n", "1\n"]
            if kind == "kill":
                assert rank.wait(20) == -signal.SIGKILL
            elif kind == "freeze":
                state = os.waitid(os.P_PID, rank.pid, os.WSTOPPED)
                assert state is not None
                assert state.si_status == signal.SIGSTOP
            else:
                with pytest.raises(subprocess.TimeoutExpired):
                    rank.wait(0.5)
        finally:
            rank.kill()
        assert rank.stdout.read() == ""
    assert [fault.kind for fault in fired(record)] == [kind]


def _extra_s(fault: Fault, rank: int, steps: range, record: Path) -> list[float]:
    """By how much each step is made longer."""
    found, slept = [], list[float]()
    injector = Injector([fault], rank=rank, record=record, sleep=slept.append)
    for step in steps:
        slept.clear()
        injector.at(step)
        found.append(sum(slept))
    return found


def test_what_lasts_acts_in_its_steps_and_is_written_down_twice(tmp_path: Path) -> None:
    fault = Fault(kind="slow", rank=0, step=2, num_steps=3, seconds=0.02)
    assert _extra_s(fault, 0, range(7), tmp_path / "record") == [0, 0, 0.02, 0.02, 0.02, 0, 0]
    assert [(one.fault, one.is_over) for one in strikes(tmp_path / "record")] == [(fault, False), (fault, True)]
    assert fired(tmp_path / "record") == [fault]


def test_ramps_and_turns_and_chance_follow_the_schedule(tmp_path: Path) -> None:
    def extra_s(kind: str, rank: int = 0) -> list[float]:
        return _extra_s(
            Fault(kind=kind, rank=-1, step=0, seconds=16.0, seed=3), rank, range(4), tmp_path / f"{kind}{rank}"
        )

    assert extra_s("slow_ramp") == [1, 2, 3, 4]
    assert extra_s("uneven", rank=0) == [0, 16, 0, 16]
    assert extra_s("uneven", rank=1) == [16, 0, 16, 0]
    assert all(8 <= s <= 24 for s in extra_s("slow_jitter"))
    assert all(0 <= s <= 16 for s in extra_s("jitter"))
    assert extra_s("jitter", rank=0) != extra_s("jitter", rank=1)


def test_uneven_work_comes_with_its_tokens(tmp_path: Path) -> None:
    fault = Fault(kind="imbalance", rank=1, step=1, seconds=0.0, factor=2.5)
    injector = Injector([fault], rank=1, record=tmp_path / "record")
    injector.at(0)
    assert injector.tokens(0, 1000) == 1000
    injector.at(1)
    assert injector.tokens(1, 1000) == 2500


def test_the_program_is_told_what_only_it_can_do_wrong(tmp_path: Path) -> None:
    faults = [
        Fault(kind="skip", rank=0, step=2),
        Fault(kind="nan", rank=0, step=3, tensor="b", element=1),
        Fault(kind="gradient", rank=0, step=4, factor=10.0),
    ]
    injector = Injector(faults, rank=0, record=tmp_path / "record")
    assert [injector.skips(step) for step in range(4)] == [False, False, True, False]
    tensors = {"a": torch.ones(4), "b": torch.ones(2)}
    assert not injector.corrupt(2, tensors)
    assert injector.corrupt(3, tensors)
    assert tensors["b"].isnan().tolist() == [False, True]
    assert injector.corrupt(4, tensors)
    assert tensors["a"].tolist() == [10.0] * 4


def test_every_kind_says_what_should_be_found_of_it() -> None:
    assert {info.finding for info in KINDS.values()} >= set(FindingKind) - {FindingKind.DATA_IMBALANCE}
    for kind, info in KINDS.items():
        assert info.what, kind
        assert info.finding is None or info.finding.is_fault


@pytest.mark.parametrize("kind", ["exit", "abort", "segfault", "gil"])
def test_a_process_ends_or_stands_as_its_fault_says(tmp_path: Path, kind: str) -> None:
    command = [sys.executable, "-X", "faulthandler=0", "-c", STEPPING_RANK, str(tmp_path / "record"), kind]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as rank:
        try:
            ends = {"exit": 17, "abort": -signal.SIGABRT, "segfault": -signal.SIGSEGV}
            if kind in ends:
                assert rank.wait(20) == ends[kind]
            else:
                assert rank.stdout is not None
                assert [rank.stdout.readline() for _ in range(2)] == ["0\n", "1\n"]
                with pytest.raises(subprocess.TimeoutExpired):
                    rank.wait(0.3)
        finally:
            rank.kill()
    assert [fault.kind for fault in fired(tmp_path / "record")] == [kind]


def test_a_rank_on_a_busy_cpu_has_its_own_back_afterwards(tmp_path: Path) -> None:
    """All its threads are bound, to where as many processes as asked for keep busy."""
    before = os.sched_getaffinity(0)
    children = psutil.Process().children
    injector = Injector(
        [Fault(kind="shared_cpu", rank=1, step=0, num_steps=1, factor=3.0)], rank=1, record=tmp_path / "r"
    )
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    try:
        injector.at(0)
        (cpu,) = os.sched_getaffinity(thread.native_id or 0)
        assert cpu in before
        assert os.sched_getaffinity(0) == {cpu}
        hogs = [child for child in children() if child.name() == "timeout"]
        assert len(hogs) == 3
        assert all(os.sched_getaffinity(hog.pid) == {cpu} for hog in hogs)
        injector.at(1)
        assert os.sched_getaffinity(0) == os.sched_getaffinity(thread.native_id or 0) == before
        assert not [child for child in children() if child.name() == "timeout"]
    finally:
        injector.close()
        stop.set()
        thread.join()


def test_faults_that_overlap_leave_a_rank_its_own_cpus(tmp_path: Path) -> None:
    """It is bound until the last of them is over."""
    before = os.sched_getaffinity(0)
    faults = [Fault(kind="shared_cpu", rank=0, step=step, num_steps=2, factor=1.0) for step in (0, 1)]
    injector = Injector(faults, rank=0, record=tmp_path / "r")
    bound = list[set[int]]()
    try:
        for step in range(4):
            injector.at(step)
            bound.append(os.sched_getaffinity(0))
    finally:
        injector.close()
        after = os.sched_getaffinity(0)
        os.sched_setaffinity(0, before)
    (cpu,) = bound[0]
    assert cpu in before
    assert bound == [{cpu}] * 3 + [before]
    assert after == before
    assert [one.is_over for one in strikes(tmp_path / "r")] == [False, False, True, True]


def test_what_keeps_a_cpu_busy_ends_with_a_rank_that_is_killed(tmp_path: Path) -> None:
    """Even before anybody waits for the rank, long before the time that it was given."""
    code = (
        "import sys, time; from pathlib import Path; from faulttol.inject import Fault, Injector;"
        "Injector([Fault(kind='cpu_hog', rank=0, step=0, seconds=600.0)], rank=0, record=Path(sys.argv[1])).at(0);"
        "print('busy', flush=True); time.sleep(600)"
    )
    hogs = list[psutil.Process]()
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "r")], stdout=subprocess.PIPE, text=True) as rank:
        try:
            assert rank.stdout is not None
            assert rank.stdout.readline() == "busy\n"
            deadline_s = time.monotonic() + 60
            while [hog.name() for hog in hogs] != ["timeout", "sh"] and time.monotonic() < deadline_s:
                time.sleep(0.01)
                hogs = psutil.Process(rank.pid).children(recursive=True)
            assert [hog.name() for hog in hogs] == ["timeout", "sh"]
            rank.kill()
            deadline_s = time.monotonic() + 60
            while (left := [hog for hog in hogs if _lives(hog)]) and time.monotonic() < deadline_s:
                time.sleep(0.01)
            assert left == []
            assert psutil.Process(rank.pid).status() == psutil.STATUS_ZOMBIE
        finally:
            rank.kill()
            for hog in hogs:
                with contextlib.suppress(psutil.NoSuchProcess):
                    hog.kill()


def _lives(process: psutil.Process) -> bool:
    """Whether it still runs; what nobody waited for does not."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize(
    ("kind", "phases"),
    [("checkpoint_stall", ["checkpoint"]), ("evaluation", ["evaluation"]), ("gc_pause", []), ("hang", [])],
)
def test_what_takes_long_says_in_which_phase(tmp_path: Path, kind: str, phases: list[str]) -> None:
    said, slept = list[str](), list[float]()
    fault = Fault(kind=kind, rank=-1, step=0, seconds=5.0)
    injector = Injector([fault], rank=0, record=tmp_path / "r", mark_phase=said.append, sleep=slept.append)
    for step in range(3):
        injector.at(step)
    assert said == phases
    assert slept == [5.0], "once"


def test_ranks_compile_for_different_times(tmp_path: Path) -> None:
    slept = list[float]()
    for rank in range(4):
        fault = Fault(kind="compile", rank=-1, step=0, seconds=10.0)
        injector = Injector([fault], rank=rank, record=tmp_path / "r", sleep=slept.append)
        injector.at(0)
        injector.at(1)
    assert len(slept) == len(set(slept)) == 4
    assert all(3 <= seconds <= 10 for seconds in slept)


def test_a_link_needs_its_connections(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="slow_link acts on connections"):
        Injector([Fault(kind="slow_link", rank=0, step=0)], rank=0, record=tmp_path / "record")
    with pytest.raises(ValueError, match="fault: kind: 'melt' is unknown"):
        Fault(kind="melt", rank=0, step=0)


@pytest.fixture
def connected() -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        one = socket.create_connection(server.getsockname())
        other, _ = server.accept()
        with one, other:
            yield one, other


def test_a_stuck_link_carries_nothing_until_it_is_freed(
    tmp_path: Path, connected: tuple[socket.socket, socket.socket]
) -> None:
    """Dropped at the receiver; the way back goes on, and what was sent waits at the sender, where it is seen."""
    sender, receiver = connected
    fault = Fault(kind="stuck_link", rank=0, to_rank=1, step=1, num_steps=1)
    injector = Injector([fault], rank=1, record=tmp_path / "record", connections={0: [receiver.fileno()]})
    injector.at(1)
    sender.sendall(b"there")
    receiver.sendall(b"back")
    assert sender.recv(4) == b"back"
    receiver.settimeout(0.1)
    with pytest.raises(TimeoutError):
        receiver.recv(5)
    assert sockets.backlog_bytes([sender.fileno()]) == 5
    injector.at(2)
    receiver.settimeout(20)
    assert receiver.recv(5) == b"there"
    injector.close()


def test_a_slow_link_is_held_to_its_rate(tmp_path: Path, connected: tuple[socket.socket, socket.socket]) -> None:
    sender, receiver = connected
    fault = Fault(kind="slow_link", rank=0, to_rank=1, step=0, rate_bytes_per_s=2_000_000)
    injector = Injector([fault], rank=0, record=tmp_path / "record", connections={1: [sender.fileno()]})
    injector.at(0)
    sender.setblocking(False)
    begun_s, left = time.monotonic(), 1 << 20
    while left:
        with contextlib.suppress(BlockingIOError):
            sender.send(bytes(min(left, 1 << 16)))
        left -= len(receiver.recv(left))
    assert time.monotonic() - begun_s > 0.2  # of the half second that the rate says: what was idle goes at once
    injector.close()


def _stopped(target: drill.Target) -> bool:
    """Whether the process is stopped within some seconds."""
    deadline_s = time.monotonic() + 20
    while process_state(target.pid, target.ticks) != "T" and time.monotonic() < deadline_s:
        time.sleep(0.001)
    time.sleep(0.02)  # the drill's own clock goes on
    return process_state(target.pid, target.ticks) == "T"


def test_a_drill_strikes_a_recorded_rank_from_outside(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from faulttol.ring import Ring, ring_path;"
        "ring = Ring(ring_path(Path(sys.argv[1]), 3), rank=3, world_size=4); print(os.getpid(), flush=True);"
        "sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True
    ) as rank:
        try:
            assert rank.stdout is not None
            rank.stdout.readline()
            target = drill.targets(tmp_path)[3]
            assert target.pid == rank.pid
            states = list[bool]()
            drill.strike(
                target,
                Fault(kind="freeze", rank=3, step=-1, seconds=0.01),
                tmp_path / "faults.jsonl",
                sleep=lambda _: states.append(_stopped(target)),
            )
            assert states
            assert all(states)
            assert process_state(target.pid, target.ticks) != "T"
            assert main(["inject", str(tmp_path), "--kind", "kill", "--rank", "3"]) == 0
            assert rank.wait(20) == -signal.SIGKILL
        finally:
            rank.kill()
    assert [fault.kind for fault in fired(tmp_path / "faults.jsonl")] == ["freeze", "kill"]
    assert main(["inject", str(tmp_path), "--kind", "kill"]) == 2  # nobody is left
    assert main(["inject", str(tmp_path / "none"), "--kind", "freez"]) == 2
    assert main(["ship", str(tmp_path / "none"), str(tmp_path / "kept"), "--once"]) == 2


def test_a_plan_is_the_same_for_one_seed() -> None:
    template = Fault(kind="kill", rank=-1, step=-1)
    plans = [drill.plan(["kill", "freeze"], [0, 1], count=9, every_s=5, seed=s, template=template) for s in (1, 1, 2)]
    assert plans[0] == plans[1] != plans[2]
    assert [at_s for at_s, _ in plans[0]] == [5.0 * i for i in range(9)]
    first, again = (schedule(["slow"], [0, 1], first_step=3, every_steps=4, count=5, seed=1) for _ in range(2))
    assert first == again
    assert [fault.step for fault in first] == [3, 7, 11, 15, 19]
