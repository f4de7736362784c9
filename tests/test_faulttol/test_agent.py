"""An agent tells dead, frozen, stuck and stalled processes apart, each by a sign of its own."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing as mp
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest

from faulttol import drill
from faulttol.agent import NodeAgent, Watched, answering, name_loop, process_state, start_ticks
from faulttol.config import HealthConfig
from faulttol.health import Condition, Health, assess
from faulttol.heartbeat import Heartbeat
from faulttol.inject import Fault
from tests.ranks import server_context

_TIMEOUT_S = 60.0
_HEALTH = HealthConfig(frozen_after_s=1.0, stuck_after_s=2.0, stalled_after_s=4.0)


def _live(folder: str, how: str, ready: mp.synchronize.Event) -> None:
    """Be a rank: advance, stand still, or keep the GIL."""
    with Heartbeat(Path(folder, "heartbeat"), 0.05) as heartbeat, answering(Path(folder, "answers")):
        heartbeat.beat(step=7, phase="train")
        ready.set()
        if how == "stuck":
            ctypes.PyDLL(None).sleep(600)  # keeps the GIL
        while True:
            if how == "advances":
                heartbeat.beat(step=7, phase="train")
            time.sleep(0.02)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[str], ForkServerProcess]]:
    """Starts a rank; it is gone at the end."""
    started: list[ForkServerProcess] = []

    def begin(how: str) -> ForkServerProcess:
        ready = server_context().Event()
        process = server_context().Process(target=_live, args=(str(tmp_path), how, ready), daemon=True)
        process.start()
        started.append(process)
        assert ready.wait(_TIMEOUT_S)
        return process

    yield begin
    for process in started:
        process.kill()
        process.join()
        process.close()


@pytest.fixture
def watch(tmp_path: Path) -> Iterator[Callable[[ForkServerProcess], NodeAgent]]:
    """Looks after a rank; what the agent asked it is taken back at the end."""
    with contextlib.ExitStack() as stack:

        def begin(process: ForkServerProcess) -> NodeAgent:
            assert process.pid is not None
            agent = stack.enter_context(contextlib.closing(NodeAgent()))
            ticks = start_ticks(process.pid)
            agent.watch(Watched(3, process.pid, ticks, tmp_path / "heartbeat", tmp_path / "answers"))
            return agent

        yield begin


def _becomes(agent: NodeAgent, *conditions: Condition) -> Health:
    """Look until the rank's condition is one of these; anything graver than running on the way there fails."""
    deadline_s = time.monotonic() + _TIMEOUT_S
    while time.monotonic() < deadline_s:
        (vitals,) = agent.look()
        health = assess(vitals, _HEALTH)
        if health.condition in conditions:
            assert vitals.step in (-1, 7)
            return health
        assert health.condition is Condition.RUNNING, health
        time.sleep(0.02)
    raise AssertionError(f"not {conditions} in {_TIMEOUT_S} s")


def test_a_stopped_process_is_frozen_and_then_ended_all_the_same(
    start: Callable[[str], ForkServerProcess], watch: Callable[[ForkServerProcess], NodeAgent]
) -> None:
    process = start("advances")
    agent = watch(process)
    for _ in range(20):
        assert assess(agent.look()[0], _HEALTH).condition is Condition.RUNNING
        time.sleep(0.02)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGSTOP)
    health = _becomes(agent, Condition.FROZEN)
    assert "stopped" in health.reason
    assert agent.end(3)
    assert _becomes(agent, Condition.DEAD).reason == "its process is gone"


def test_a_process_that_is_stopped_for_moments_is_slow_and_not_frozen(
    tmp_path: Path, start: Callable[[str], ForkServerProcess], watch: Callable[[ForkServerProcess], NodeAgent]
) -> None:
    process = start("stands")
    assert process.pid is not None
    target = drill.Target(3, process.pid, start_ticks(process.pid))
    slow = Fault(kind="slow", rank=3, step=-1, seconds=0.6, factor=10.0)  # stopped for 18 of every 20 ms
    striking = threading.Thread(target=drill.strike, args=(target, slow, tmp_path / "faults.jsonl"))
    striking.start()
    stopped = 0
    with contextlib.closing(watch(process)) as agent:
        while striking.is_alive():
            stopped += process_state(target.pid, target.ticks) == "T"
            health = assess(agent.look()[0], _HEALTH)
            assert health.condition is Condition.RUNNING, health
    assert stopped > 10


def test_a_held_gil_is_told_from_a_freeze_because_native_code_answers(
    start: Callable[[str], ForkServerProcess], watch: Callable[[ForkServerProcess], NodeAgent]
) -> None:
    agent = watch(start("stuck"))
    health = _becomes(agent, Condition.STUCK)
    (vitals,) = agent.look()
    assert vitals.native_age_s is not None
    assert vitals.native_age_s < _HEALTH.frozen_after_s < health.age_s
    assert agent.end(3)


def test_a_loop_that_stands_still_is_stalled_while_all_else_lives(
    start: Callable[[str], ForkServerProcess], watch: Callable[[ForkServerProcess], NodeAgent]
) -> None:
    agent = watch(start("stands"))
    health = _becomes(agent, Condition.STALLED)
    assert "step 7, train" in health.reason


def test_a_process_that_got_the_number_of_another_is_not_taken_for_it(tmp_path: Path) -> None:
    ticks = start_ticks(os.getpid())
    assert process_state(os.getpid(), ticks) in ("R", "S")
    assert process_state(os.getpid(), ticks + 1) is None
    agent = NodeAgent()
    agent.watch(Watched(0, os.getpid(), ticks + 1, tmp_path / "heartbeat", tmp_path / "answers"))
    assert not agent.look()[0].process_alive
    assert agent.end(0), "which kills nobody"
    assert threading.main_thread().is_alive()


@contextlib.contextmanager
def _watched_here(folder: Path, clock: list[float]) -> Iterator[tuple[NodeAgent, socket.socket]]:
    """An agent with a clock of the test's that watches this process, which answers when the test does."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "answers"))
        listener.listen()
        listener.settimeout(_TIMEOUT_S)
        agent = NodeAgent(lambda: clock[0])
        ticks = start_ticks(os.getpid())
        agent.watch(Watched(0, os.getpid(), ticks, folder / "heartbeat", folder / "answers"))
        with contextlib.closing(agent):
            yield agent, listener


def _answer(listener: socket.socket) -> None:
    asked, _ = listener.accept()
    with asked:
        assert asked.recv(4096)
        asked.sendall(b"yes")


def test_an_observer_that_was_away_takes_nobody_for_frozen(tmp_path: Path) -> None:
    clock = [100.0]
    with _watched_here(tmp_path, clock) as (agent, listener):
        assert agent.look()[0].native_age_s == 0.0
        _answer(listener)
        clock[0] += 0.1
        assert agent.look()[0].native_age_s == 0.0, "no question is open"
        clock[0] += 60.0
        assert assess(agent.look()[0], _HEALTH).condition is Condition.RUNNING
        clock[0] += 60.0
        assert assess(agent.look()[0], _HEALTH).condition is Condition.RUNNING, "a question is open, but nobody looked"
        for _ in range(10):
            clock[0] += 0.2
            health = assess(agent.look()[0], _HEALTH)
        assert health.condition is Condition.FROZEN


def test_a_process_that_breaks_off_while_it_is_asked_ends_no_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(socket.socket):
        def send(self, *_: object) -> int:
            raise BrokenPipeError

    clock = [100.0]
    with _watched_here(tmp_path, clock) as (agent, _):
        monkeypatch.setattr(socket, "socket", Broken)
        assert agent.look()[0].native_age_s is None
        clock[0] += 0.3
        assert agent.look()[0].process_alive


def _spin(ready: mp.synchronize.Event, seen: mp.synchronize.Event, cpu: int, kind: str) -> None:
    """Never rest, on one CPU; in the thread that trains, in one that waits for connections first, or in nobody's."""
    os.sched_setaffinity(0, {cpu})

    def run() -> None:
        if kind == "the loop":
            name_loop()
        ready.set()
        connections = select.epoll()
        while kind == "connections" and not seen.is_set():
            connections.poll(0.2)
        while True:
            pass

    threading.Thread(target=run, daemon=True).start()
    time.sleep(_TIMEOUT_S)


@pytest.mark.parametrize("kind", ["the loop", "connections", "the background"])
def test_how_long_a_process_waits_for_a_cpu_is_counted(tmp_path: Path, kind: str) -> None:
    """Two processes of which a thread never rests, bound to one CPU: each waits half of the time."""
    cpu = min(os.sched_getaffinity(0))
    ready, seen = [server_context().Event() for _ in range(2)], server_context().Event()
    spinning = [server_context().Process(target=_spin, args=(one, seen, cpu, kind), daemon=True) for one in ready]
    agent = NodeAgent()
    try:
        for process, event in zip(spinning, ready, strict=True):
            process.start()
            assert event.wait(_TIMEOUT_S)
        pid = spinning[0].pid or 0
        agent.watch(Watched(0, pid, start_ticks(pid), tmp_path / "heart", tmp_path / "answers"))
        first_s, begun_s = agent.look()[0].cpu_wait_s, time.monotonic()
        assert first_s == 0.0
        waited_s, names = list[float](), kind != "the background"
        while time.monotonic() < begun_s + (1.0 if not names else _TIMEOUT_S) and (not waited_s or waited_s[-1] < 0.3):
            time.sleep(0.1)
            waited_s.append(agent.look()[0].cpu_wait_s or 0.0)
            if len(waited_s) == 5:
                seen.set()
        assert waited_s == sorted(waited_s)
        assert (waited_s[-1] >= 0.3) == names, "nobody waits for what is done in the background"
        assert waited_s[-1] <= time.monotonic() - begun_s
        spinning[0].kill()
        spinning[0].join()
        gone, later = agent.look()[0], agent.look()[0]
        assert not gone.process_alive
        assert 0 == gone.gone_age_s < (later.gone_age_s or 0.0)
    finally:
        agent.close()
        for process in spinning:
            process.kill()
            process.join()
