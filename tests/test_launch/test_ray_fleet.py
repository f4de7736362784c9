"""When the agent of a node counts as silent, with a Ray and a clock that only the test moves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from faulttol.config import HealthConfig
from faulttol.health import Condition, Vitals, assess
from launch import ray_rank
from launch.placement import Home
from launch.ray_fleet import _Agent

pytestmark = pytest.mark.ray  # it is told where to start an agent in Ray's own words
_LOOK_S = 0.05
_NODE = "ab" * 28


class _Ray:
    """Starts agents that answer a question when the test says so."""

    def __init__(self) -> None:
        import ray

        self.exceptions = ray.exceptions
        self.num_started = 0
        self.num_asked = self.num_answered = 0

    def remote(self, **settings: Any) -> Any:
        return lambda agent_class: _Start(self)

    def wait(self, refs: Sequence[int], timeout: float) -> tuple[list[int], list[int]]:
        return [ref for ref in refs if ref < self.num_answered], [ref for ref in refs if ref >= self.num_answered]

    def get(self, ref: int) -> list[Vitals]:
        return [Vitals(rank=0)]

    def kill(self, agent: _Started, no_restart: bool) -> None:
        pass

    def answer_all(self) -> None:
        self.num_answered = self.num_asked


class _Start:
    """What starts an agent."""

    def __init__(self, ray: _Ray) -> None:
        self._ray = ray

    def options(self, **settings: Any) -> _Start:
        return self

    def remote(self) -> _Started:
        self._ray.num_started += 1
        return _Started(self._ray)


class _Started:
    """An agent, and the method of it that is called."""

    def __init__(self, ray: _Ray) -> None:
        self._ray = ray
        self.look = self

    def remote(self) -> int:
        self._ray.num_asked += 1
        return self._ray.num_asked - 1


def _seen(agent: _Agent) -> Condition:
    (vitals,) = agent.look()
    return assess(vitals, HealthConfig()).condition


def test_an_agent_that_answered_while_the_driver_was_busy_is_not_silent() -> None:
    ray, clock = _Ray(), [100.0]
    agent = _Agent(ray, _NODE, lambda: clock[0])
    ray.answer_all()
    assert _seen(agent) is Condition.RUNNING
    for is_there_at_once in (True, False):
        clock[0] += 60.0
        if is_there_at_once:
            ray.answer_all()
        for _ in range(3):
            assert _seen(agent) is Condition.RUNNING
            clock[0] += _LOOK_S
        ray.answer_all()
        assert _seen(agent) is Condition.RUNNING
    assert ray.num_started == 1


def test_an_agent_that_does_not_answer_a_driver_that_looks_is_started_again_and_then_its_node_is_lost() -> None:
    ray, clock = _Ray(), [100.0]
    agent = _Agent(ray, _NODE, lambda: clock[0])
    ray.answer_all()
    agent.look()
    started: dict[int, float] = {}
    while _seen(agent) is Condition.RUNNING:
        clock[0] += _LOOK_S
        started.setdefault(ray.num_started, clock[0])
        assert clock[0] < 110.0
    assert 2.0 < started[2] - 100.0 < 2.3
    assert 5.0 < clock[0] - 100.0 < 5.3


def test_an_agent_that_was_started_again_in_vain_is_not_asked_to_end_anybody() -> None:
    ray, clock = _Ray(), [100.0]
    agent = _Agent(ray, _NODE, lambda: clock[0])

    def look_for(seconds: float) -> list[bool]:
        found = []
        for _ in range(round(seconds / _LOOK_S)):
            clock[0] += _LOOK_S
            agent.look()
            found.append(agent.is_silent)
        return found

    assert not any(look_for(10.0)), "it may take long to start"
    ray.answer_all()
    assert not any(look_for(2.0 + 1.9)), "two seconds until it is started again, and its successor has its time"
    while assess(agent.look()[0], HealthConfig()).condition is not Condition.LOST:
        clock[0] += _LOOK_S
    assert agent.is_silent, "before anybody on its node is ended for that"
    assert ray.num_started == 2
    ray.answer_all()
    assert not any(look_for(0.1))


def test_a_process_that_stays_hides_nothing_of_what_others_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    homes = []
    for index in range(2):
        folder = tmp_path / str(index)
        folder.mkdir()
        ray_rank.log_path(folder).write_bytes(b"first, last %d" % index)
        homes.append(Home("node", 2**22 + index, 0, str(folder), ()))  # no process has such a number
    wait = ray_rank._wait_until_gone
    monkeypatch.setattr(ray_rank, "_wait_until_gone", lambda home, until_s: home is homes[1] and wait(home, until_s))
    first, second = ray_rank.bury(homes, [7, 7], [0.0, 0.0])
    assert first == b"last 0[launch] process 4194304 is still there 10 s after SIGKILL\n"
    assert second == b"last 1"
    assert not list(tmp_path.iterdir())
