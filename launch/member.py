"""One process of a job that outlives its ranks, as the supervisor has seen it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from faulttol.config import HealthConfig
from faulttol.health import Condition, Health, Vitals, assess
from faulttol.policy import Loss
from faulttol.recovery import Standing
from launch import verdict
from launch.entry import Raised, Returned
from launch.fleet import MemberReport
from launch.losses import FENCED, KINDS, raised
from launch.verdict import RankStatus

UNFIT_S = 10.0
"""For how long a process without a place must be ill until another takes its place: nobody waits for it mostly, and a
busy machine may be all there is to it."""

_STOPPED_S = 0.5  # for how long a process must be stopped until that is not somebody looking at it

Trouble = Loss | Literal["complaint", "stalled"]
"""What keeps a rank from going on: a fault of its own, a peer's that it tells of, or that it stands still."""


@dataclass(slots=True)
class Member:
    """One process, with its place if it has one."""

    index: int
    status: RankStatus
    standing: Standing | None = None
    vitals: Vitals | None = None
    health: Health | None = None
    rank: int | None = None
    """In the current generation, until that has ended for it."""
    is_ended: bool = False
    """By the supervisor."""
    has_had_place: bool = False
    seen_at_s: float | None = None
    """When its process was first seen; None before, as while its cluster has no room for it."""
    ill_at_s: float | None = None
    """Since when it is seen to be ill; None where it is well."""

    @property
    def number(self) -> int:
        """What messages call it."""
        return self.index if self.rank is None else self.rank

    @property
    def is_gone(self) -> bool:
        return self.is_ended or self.status.exit is not None or self.status.outcome is not None

    @property
    def has_been_ready(self) -> bool:
        """Whether it ever waited for a place, which is its first word."""
        return self.standing is not None

    @property
    def is_ready(self) -> bool:
        """Whether it waits for a place."""
        return (
            self.rank is None
            and not self.is_gone
            and self.standing is not None
            and self.standing.state in ("standby", "quiesced")
            and (self.health is None or self.health.condition not in KINDS)
        )

    def learn(self, report: MemberReport, now_s: float, config: HealthConfig) -> None:
        """Take in what the fleet tells of it."""
        self.vitals = report.vitals
        self.status = verdict.observe(self.status, report.report, now_s)
        if report.standing is not None:
            self.standing = report.standing
        self.health = None if report.vitals is None else assess(report.vitals, config)
        if report.vitals is not None and self.seen_at_s is None:
            self.seen_at_s = now_s
        is_ill = self.health is not None and self.health.condition in KINDS
        self.ill_at_s = (now_s if self.ill_at_s is None else self.ill_at_s) if is_ill else None

    def has_left(self, generation: int) -> bool:
        """Whether it is gone, or out of this generation's groups."""
        standing = self.standing
        return self.is_gone or (
            standing is not None and standing.state == "quiesced" and standing.generation >= generation
        )

    def is_done(self, generation: int) -> bool:
        """Whether it did the work of this generation to its end."""
        if isinstance(self.status.outcome, Returned):
            return True
        standing = self.standing
        return standing is not None and standing.state == "finished" and standing.generation == generation

    def accuses(self, generation: int) -> tuple[int, ...] | None:
        """The ranks whose numbers it found to be wrong in this generation; None where it found nothing."""
        standing = self.standing
        return standing.corrupted if standing is not None and standing.generation == generation else None

    def trouble(self, generation: int, placed_for_s: float, config: HealthConfig) -> Trouble | None:
        """What keeps it from going on in this generation, in which it has been for so long."""
        if self.is_done(generation):
            is_fine = not self.is_gone or isinstance(self.status.outcome, Returned)
            return None if is_fine else self.own_loss()
        if self.is_gone:
            return self.own_loss()
        health = self.health
        if health is not None and health.condition in KINDS:
            is_stopped = health.condition is Condition.FROZEN and health.age_s < _STOPPED_S
            return None if is_stopped else Loss(self.number, KINDS[health.condition], health.reason)
        standing = self.standing
        if standing is not None and standing.generation == generation and standing.messages:
            if standing.corrupted is not None:
                is_it = self.rank in standing.corrupted
                return Loss(self.number, "numeric", standing.messages[0]) if is_it else "complaint"
            if standing.was_aborted or verdict.tells_of_lost_peer(standing.messages):
                return "complaint"
            return raised(self.number, standing.messages)
        # What it did not do while it waited for this generation to be formed says nothing.
        has_had_time = placed_for_s > config.stalled_after_s
        if health is not None and health.condition is Condition.STALLED and has_had_time:
            return "stalled"
        return None

    def unfit(self, now_s: float, start_timeout_s: float) -> Loss | None:
        """Why it will take no place though it is there; None for one that has a place, or may well take one."""
        if self.rank is not None or self.is_gone:
            return None
        health = self.health
        if health is not None and self.ill_at_s is not None and now_s - self.ill_at_s >= UNFIT_S:
            return Loss(self.index, KINDS[health.condition], health.reason)
        if not self.has_been_ready and self.seen_at_s is not None and now_s - self.seen_at_s > start_timeout_s:
            return Loss(self.index, "hung", f"it is not ready {start_timeout_s:g} s after its start")
        return None

    @property
    def afterwards(self) -> str:
        """An error of its own that it told after the order to end: perhaps what began it all; empty for none."""
        standing = self.standing
        if standing is None or not standing.was_aborted or verdict.tells_of_lost_peer(standing.messages):
            return ""
        return "" if standing.messages[0].startswith(f"{FENCED}:") else standing.messages[0]

    def own_loss(self) -> Loss:
        """Why it is gone."""
        outcome, ended = self.status.outcome, self.status.exit
        if isinstance(outcome, Raised):
            return raised(self.number, outcome.messages)
        if isinstance(outcome, Returned):
            return Loss(self.number, "dead", "it left before the others")
        return Loss(self.number, "dead", ended.summary if ended is not None else "ended")


@dataclass(slots=True)
class Ending:
    """How a generation ended, as far as it is known."""

    generation: int
    began_s: float
    is_stall: bool
    """Nobody failed: all stand still, one of them because of itself."""
    losses: dict[int, Loss] = field(default_factory=dict)
    """By member."""
    times: dict[str, float] = field(default_factory=dict)
    """Seconds from its begin to each state of recovery."""
