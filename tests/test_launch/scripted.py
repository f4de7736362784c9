"""A fleet that only the test moves, and what the supervisor of a job that outlives its ranks is given for it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from faulttol.config import HealthConfig, PolicyConfig
from faulttol.health import Vitals
from faulttol.recovery import Standing
from launch import elastic
from launch.entry import Outcome
from launch.fleet import MemberReport, Recovery, member_log
from launch.job import Job
from launch.orders import Order
from launch.verdict import Exit, Limits, Pulse, RankReport

LIMITS = Limits(
    start_timeout_s=30.0, frozen_timeout_s=30.0, hang_timeout_s=600.0, exit_timeout_s=5.0, heartbeat_interval_s=0.5
)


class Fleet:
    """Members that do what they are told at once; `script` is called before each look."""

    def __init__(self, job: Job, size: int, script: Callable[[Fleet], None]) -> None:
        self.standings: list[Standing | None] = []
        self.ended: dict[int, Exit] = {}
        self.orders: list[tuple[int, Order]] = []
        self.num_looks = 0
        self.outcomes: dict[int, Outcome] = {}
        self.most_alive = 0
        """Processes that there were at once."""
        self.pulse: Pulse | None = None
        self.vitals: dict[int, Vitals] = {}
        self.pulses: dict[int, Pulse] = {}
        """Of members that do other things than `pulse`."""
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
            MemberReport(
                RankReport(self.pulses.get(index, self.pulse), self.outcomes.get(index), self.ended.get(index)),
                standing,
                None if index in self.ended else self.vitals.get(index),
            )
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


class Deaf(Fleet):
    """One of its members does not leave when it is told to; `told_s` is when, for each time."""

    def __init__(self, job: Job, size: int, script: Callable[[Deaf], None], member: int = 0) -> None:
        self.told_s: list[float] = []
        self._member = member
        super().__init__(job, size, script)  # type: ignore[arg-type]

    def order(self, member: int, order: Order) -> None:
        if (member, order["order"]) == (self._member, "abort"):
            self.told_s.append(time.monotonic())
        else:
            super().order(member, order)


def care_of(folder: Path, saved_step: Callable[[], int] = lambda: -1, **policy: Any) -> elastic.Care:
    recovery = Recovery(
        fence=folder / "fence",
        record=folder / "recoveries.jsonl",
        saved_step=saved_step,
        health=HealthConfig(),
        policy=PolicyConfig(**policy),
    )
    return elastic.Care(LIMITS, recovery)


def losses_of(care: elastic.Care) -> list[list[tuple[int, str]]]:
    lines = care.recovery.record.read_text().splitlines()
    return [[(loss["rank"], loss["kind"]) for loss in json.loads(line)["losses"]] for line in lines]


def supervise(fleet: Fleet, job: Job, care: elastic.Care) -> str:
    return elastic.supervise(fleet, job, care, stop_grace_s=1.0, on_output=lambda _: None).outcome
