"""The processes of a job that outlives its ranks: which there are, and what is known of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from faulttol.config import HealthConfig, PolicyConfig
from faulttol.health import Vitals
from faulttol.recovery import Standing
from launch.job import Job
from launch.orders import Order
from launch.verdict import RankReport


@dataclass(frozen=True, kw_only=True, slots=True)
class Recovery:
    """What a job needs to go on without a lost rank."""

    fence: Path
    """File with the number of the current generation, on a disk that every machine of the job sees."""
    record: Path
    """File that gets a JSON line for each recovery."""
    smaller_sizes: tuple[int, ...] = ()
    """World sizes below the job's in which its entry can go on."""
    first_generation: int = 0
    """Number of the first one: above those of every earlier launch of the run, which the fence keeps out as well."""
    total_steps: int = 0
    """Steps of the whole job: a slow rank near the end is not worth replacing. 0 never replaces one."""
    saved_step: Callable[[], int] = lambda: -1
    """The newest step that the job could go on from; -1 before the first."""
    acts_on_outliers: bool = False
    """Whether a rank whose gradient was unlike the others' before they were added up is replaced."""
    distrust: Callable[[int, str], object] = lambda step, why: None
    """Is told the last step whose state is right, and why later ones may not be, before the job goes on: it must not
    go on from those."""
    health: HealthConfig
    policy: PolicyConfig


@dataclass(frozen=True, slots=True)
class MemberReport:
    """What is known of one member at one moment."""

    report: RankReport
    standing: Standing | None
    """None before its first word."""
    vitals: Vitals | None
    """What its machine's agent saw; None once it has ended, or before there is an agent."""


class Fleet(Protocol):
    """Members are known by their number, in the order of their start; one that ended keeps its number."""

    def look(self) -> list[MemberReport]:
        """What is known of each member now; returns soon, whatever state they are in."""

    def add(self) -> None:
        """Start one more member. Raises: OSError where the machine has no room for one; there is none then."""

    def places(self, members: Sequence[int]) -> list[dict[str, Any]]:
        """The place (fields of a RankEnv) of each rank, given the members that become ranks 0, 1, …"""

    def order(self, member: int, order: Order) -> None:
        """Tell a member what to do; returns at once."""

    def end(self, member: int) -> None:
        """End a member, whatever state it is in; when this returns it is gone, or will do nothing more: a process that
        is in the kernel ends as soon as it leaves it."""

    def request_stop(self) -> None:
        """Ask every member to save and leave."""

    def dump_stacks(self, members: Sequence[int]) -> None:
        """Ask members to write the stacks of their threads to their logs."""

    def kill(self) -> None:
        """End every member and return when all are gone. Idempotent."""


def member_log(job: Job, member: int) -> Path:
    """Where a member prints: the first ones under the rank they begin as, later ones as spares."""
    name = f"rank{member}" if member < job.world_size else f"spare{member - job.world_size}"
    return job.log_dir / f"{name}.log"
