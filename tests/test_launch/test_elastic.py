"""How a job that outlives its ranks is looked after, with members that only the test moves."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from faulttol.config import HealthConfig, PolicyConfig
from faulttol.recovery import Standing
from launch import elastic
from launch.fleet import MemberReport, Recovery, member_log
from launch.job import Job
from launch.orders import Order
from launch.verdict import Exit, Limits, RankReport

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
        self._job, self._script = job, script
        for _ in range(size):
            self.add()

    def add(self) -> None:
        member_log(self._job, len(self.standings)).touch()
        self.standings.append(None)

    def look(self) -> list[MemberReport]:
        self.num_looks += 1
        self._script(self)
        return [
            MemberReport(RankReport(exit=self.ended.get(index)), standing, None)
            for index, standing in enumerate(self.standings)
        ]

    def places(self, members: Sequence[int]) -> list[dict[str, Any]]:
        return [{} for _ in members]

    def order(self, member: int, order: Order) -> None:
        self.orders.append((member, order))

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


def _care(folder: Path, **policy: Any) -> elastic.Care:
    recovery = Recovery(
        fence=folder / "fence",
        record=folder / "recoveries.jsonl",
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
