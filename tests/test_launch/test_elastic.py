"""How a job that outlives its ranks is looked after, with members that only the test moves."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from faulttol.config import HealthConfig, PolicyConfig
from faulttol.recovery import Standing
from launch import elastic
from launch.entry import Outcome, Raised
from launch.fleet import MemberReport, Recovery, member_log
from launch.job import Job
from launch.orders import Order
from launch.verdict import Exit, Limits, Pulse, RankReport

_LIMITS = Limits(
    start_timeout_s=30.0, frozen_timeout_s=30.0, hang_timeout_s=600.0, exit_timeout_s=5.0, heartbeat_interval_s=0.5
)


class _Fleet:
    """Members that do what they are told at once; `script` is called before each look."""

    def __init__(self, job: Job, size: int, script: Callable[[_Fleet], None]) -> None:
        self.standings: list[Standing | None] = []
        self.ended: dict[int, Exit] = {}
        self.orders: list[tuple[int, Order]] = []
        self.num_looks = 0
        self.outcomes: dict[int, Outcome] = {}
        self.most_alive = 0
        """Processes that there were at once."""
        self.pulse: Pulse | None = None
        self._job, self._script = job, script
        for _ in range(size):
            self.add()

    def add(self) -> None:
        member_log(self._job, len(self.standings)).touch()
        self.standings.append(None)
        self.most_alive = max(self.most_alive, len(self.standings) - len(self.ended))

    @property
    def generation(self) -> int:
        """The last that anybody was told to work in."""
        return max((order["generation"] for _, order in self.orders if order["order"] == "assign"), default=-1)

    def be_ready(self, *members: int) -> None:
        for member in members:
            self.standings[member] = self.standings[member] or Standing(-1, "standby")

    def finish(self) -> None:
        """Let all that work end their work."""
        for member, standing in enumerate(self.standings):
            if member not in self.ended and standing is not None and standing.state == "working":
                self.standings[member] = Standing(standing.generation, "finished")

    def look(self) -> list[MemberReport]:
        self.num_looks += 1
        self._script(self)
        return [
            MemberReport(RankReport(self.pulse, self.outcomes.get(index), self.ended.get(index)), standing, None)
            for index, standing in enumerate(self.standings)
        ]

    def places(self, members: Sequence[int]) -> list[dict[str, Any]]:
        return [{} for _ in members]

    def order(self, member: int, order: Order) -> None:
        self.orders.append((member, order))
        generation = order.get("generation", 0)
        match order["order"]:
            case "assign":
                self.standings[member] = Standing(generation, "working")
            case "abort":
                self.standings[member] = Standing(generation, "quiesced")
            case "dismiss":
                self.ended.setdefault(member, Exit(code=0))

    def end(self, member: int) -> None:
        self.ended.setdefault(member, Exit(detail="ended"))

    def request_stop(self) -> None:
        pass

    def dump_stacks(self, members: Sequence[int]) -> None:
        pass

    def kill(self) -> None:
        pass


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(entry="nothing:runs", world_size=2, log_dir=tmp_path, name="job")


def _care(folder: Path, saved_step: Callable[[], int] = lambda: -1, **policy: Any) -> elastic.Care:
    recovery = Recovery(
        fence=folder / "fence",
        record=folder / "recoveries.jsonl",
        saved_step=saved_step,
        health=HealthConfig(),
        policy=PolicyConfig(**policy),
    )
    return elastic.Care(_LIMITS, recovery)


def _supervise(fleet: _Fleet, job: Job, care: elastic.Care) -> str:
    return elastic.supervise(fleet, job, care, stop_grace_s=1.0, on_output=lambda _: None).outcome


def test_a_stop_before_all_are_ready_is_no_completion(job: Job, tmp_path: Path) -> None:
    def script(fleet: _Fleet) -> None:
        if fleet.num_looks == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    fleet = _Fleet(job, 2, script)
    assert _supervise(fleet, job, _care(tmp_path)) == "stopped"
    assert not fleet.orders, "nobody got a place"


def test_a_spare_that_dies_during_the_pause_takes_no_place(job: Job, tmp_path: Path) -> None:
    at: dict[str, int] = {}

    def script(fleet: _Fleet) -> None:
        fleet.be_ready(*range(len(fleet.standings)))
        if fleet.generation == 0 and fleet.num_looks > 3:
            fleet.end(1)  # the spare takes its place at once
        elif fleet.generation == 1:
            fleet.end(0)  # got no further: there is a pause now
            at.setdefault("paused", fleet.num_looks)
            if fleet.num_looks == at["paused"] + 5:
                fleet.end(3)  # the spare that would step in
        elif fleet.generation == 2:
            fleet.finish()

    fleet = _Fleet(job, 3, script)
    assert _supervise(fleet, job, _care(tmp_path, backoff_s=2.0, shrink=False)) == "completed"
    placed = [member for member, order in fleet.orders if order["order"] == "assign" and order["generation"] == 2]
    assert placed == [4, 2]


def test_a_loss_while_a_generation_loads_makes_no_earlier_recovery_fruitless(job: Job, tmp_path: Path) -> None:
    saved = [-1]

    def script(fleet: _Fleet) -> None:
        fleet.be_ready(*range(len(fleet.standings)))
        working = [i for i, s in enumerate(fleet.standings) if s is not None and s.state == "working"]
        if fleet.generation == 6:
            fleet.finish()
        elif working and len(fleet.ended) == fleet.generation:
            # Every other generation gets far and saves; those between are lost while they load.
            step = 0 if fleet.generation % 2 else 10 * (fleet.generation + 1)
            fleet.pulse = Pulse(fleet.num_looks, fleet.num_looks, step, "train" if step else "load")
            saved[0] = max(saved[0], step)
            fleet.end(max(i for i in working if i not in fleet.ended))

    fleet = _Fleet(job, 4, script)
    care = _care(tmp_path, lambda: saved[0], backoff_s=0.01, no_progress_limit=2, restarts_per_hour=100)
    assert _supervise(fleet, job, care) == "completed"


def test_a_spare_that_fails_at_its_start_is_replaced_but_not_in_haste(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(elastic, "_REFILL_S", 0.3)
    added_s: list[float] = []

    def script(fleet: _Fleet) -> None:
        added_s.extend([time.monotonic()] * (len(fleet.standings) - 2 - len(added_s)))
        fleet.be_ready(0, 1, *range(5, len(fleet.standings)))
        for spare in range(2, min(len(fleet.standings), 5)):
            fleet.end(spare)  # it never gets ready
        if fleet.generation == 0 and fleet.num_looks > 3:
            fleet.end(1)
        elif fleet.generation == 1:
            fleet.finish()

    fleet = _Fleet(job, 2, script)
    assert _supervise(fleet, job, _care(tmp_path, shrink=False)) == "completed"
    assert len(added_s) == 4
    assert all(later - earlier > 0.25 for earlier, later in itertools.pairwise(added_s))


def test_a_spare_that_ends_while_the_ranks_work_is_replaced(job: Job, tmp_path: Path) -> None:
    def script(fleet: _Fleet) -> None:
        fleet.be_ready(*range(len(fleet.standings)))
        if fleet.generation == 0 and fleet.num_looks > 3:
            fleet.end(2)
        if len(fleet.standings) > 3:
            fleet.finish()

    fleet = _Fleet(job, 3, script)
    assert _supervise(fleet, job, _care(tmp_path)) == "completed"
    assert len(fleet.standings) == 4


def test_a_member_that_raised_but_lingers_is_ended_before_its_successor_starts(job: Job, tmp_path: Path) -> None:
    def script(fleet: _Fleet) -> None:
        fleet.be_ready(*range(len(fleet.standings)))
        if fleet.generation == 0 and fleet.num_looks > 3:
            fleet.pulse = Pulse(1, 1, 5, "train")
            fleet.outcomes[1] = Raised("", ("OSError: gone",), 0.0)
        elif fleet.generation == 1:
            fleet.finish()

    fleet = _Fleet(job, 2, script)
    assert _supervise(fleet, job, _care(tmp_path, shrink=False)) == "completed"
    assert fleet.most_alive == 2
