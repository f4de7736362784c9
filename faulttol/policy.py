"""What to do about lost and slow ranks: pure decisions from what was found and what happened before.

Of a lost rank: replace it with a warm spare; else wait for a spare that is about to be ready; else go on with fewer
ranks, by whole data-parallel replicas; else wait. Give up where going on cannot help: an error of the program, a
used-up budget, recoveries that get the run no further, processes that never get ready while one is waited for.

A slow rank costs a part of every step; replacing it costs a recovery. As with renting skis, the first is borne until it
has cost as much as the second would: then the rank is isolated at the next checkpoint, where no step is lost, and once
it has cost what losing those steps would, at once. So it never costs more than twice the best decision in hindsight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from faulttol.config import PolicyConfig

_HOUR_S = 3600.0

LossKind = Literal["dead", "lost", "frozen", "stuck", "hung", "raised", "desync", "slow", "numeric"]
"""Why a rank cannot go on. `raised` is an error of its own, not that it lost a peer."""


@dataclass(frozen=True, slots=True)
class Loss:
    """One rank that cannot go on as it is."""

    rank: int
    kind: LossKind
    detail: str = ""
    """One line for a person."""
    error: str = ""
    """`raised`: the type of the error."""


@dataclass(frozen=True, slots=True)
class Incident:
    """What ended one generation. No losses: the ranks lost one another and nobody is at fault, as by a link."""

    at_s: float
    """On the observer's clock."""
    step: int
    """The furthest step that was begun in the generation, or that it resumed from; -1 before the first."""
    losses: tuple[Loss, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Situation:
    """What there is to go on with."""

    now_s: float
    full_size: int
    """Ranks that the run asked for."""
    ranks_left: int
    """Processes of the generation that ended which can go on."""
    spares_ready: int
    spares_starting: int
    failed_starts: int = 0
    """How many attempts in a row to start processes that are missing came to nothing, since the incident."""
    smaller_sizes: tuple[int, ...] = ()
    """World sizes below `full_size` in which the run keeps its batch: whole data-parallel replicas."""


@dataclass(frozen=True, slots=True)
class Resume:
    """Go on in a new generation, with as many ranks as before or as the run asked for."""

    world_size: int
    num_spares: int
    """Spares that take places."""
    after_s: float = 0.0
    """Pause before it."""

    @property
    def summary(self) -> str:
        taken = f"{self.num_spares} spare(s) step in" if self.num_spares else "nobody needs replacing"
        return f"go on with {self.world_size} ranks; {taken}"


@dataclass(frozen=True, slots=True)
class Shrink:
    """Go on in a new generation with fewer ranks and the same batch."""

    world_size: int
    after_s: float = 0.0

    @property
    def summary(self) -> str:
        return f"go on with {self.world_size} ranks and the same batch; no spare is ready"


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing can be done yet: ask again."""

    summary: str


@dataclass(frozen=True, slots=True)
class Stop:
    """End the run."""

    cause: Literal["user error", "budget", "no progress", "no spare"]
    summary: str


Decision = Resume | Shrink | Wait | Stop


def decide(incident: Incident, before: Sequence[Incident], situation: Situation, config: PolicyConfig) -> Decision:
    """Return what to do about an incident, given those before it, oldest first."""
    stop = _give_up(incident, before, config)
    if stop is not None:
        return stop
    stuck = _fruitless(incident, before)
    pause_s = min(config.backoff_limit_s, config.backoff_s * 2 ** (stuck - 1)) if stuck else 0.0
    wanted = situation.full_size
    available = situation.ranks_left + situation.spares_ready
    if available >= wanted:
        return Resume(wanted, max(0, wanted - situation.ranks_left), pause_s)
    waited_s = situation.now_s - incident.at_s
    if situation.spares_starting and available + situation.spares_starting >= wanted and waited_s < config.spare_wait_s:
        return Wait(f"{situation.spares_starting} spare(s) start; {waited_s:.1f} s of {config.spare_wait_s:g} s")
    if config.shrink:
        fitting = [size for size in situation.smaller_sizes if size <= available]
        if fitting:
            return Shrink(max(fitting), pause_s)
    there = f"{available} of {wanted} ranks are there"
    may_suffice = situation.spares_starting and available + situation.spares_starting >= wanted
    if situation.failed_starts >= config.failed_starts_limit and not may_suffice:
        tried = f"in {situation.failed_starts} attempts in a row to start others none got ready"
        return Stop("no spare", f"{there}, and {tried}")
    if not config.shrink:
        return Wait(f"{there}, and it may not go on with fewer (faulttol.policy.shrink); goes on when others are ready")
    return Wait(f"{there}, and the run has no smaller layout that fits them; goes on when others are ready")


def _give_up(incident: Incident, before: Sequence[Incident], config: PolicyConfig) -> Stop | None:
    desynced = [loss for loss in incident.losses if loss.kind == "desync"]
    if desynced:
        return Stop("user error", f"ranks called different collectives: {desynced[0].detail}")
    raised = [loss for loss in incident.losses if loss.kind == "raised"]
    if raised and incident.step < 1 and not any(past.step >= 1 for past in before):
        return Stop("user error", f"it failed before its first step: {raised[0].detail}")
    for loss in raised:
        times = 1 + sum(
            any(other.kind == "raised" and other.error == loss.error for other in past.losses)
            for past in before
            if past.step == incident.step
        )
        if times >= config.same_error_limit:
            return Stop("user error", f"{loss.error} in step {incident.step}, {times} times: {loss.detail}")
    recent = [past for past in before if incident.at_s - past.at_s < _HOUR_S]
    if len(recent) + 1 > config.restarts_per_hour:
        return Stop("budget", f"{len(recent) + 1} recoveries in an hour; allowed: {config.restarts_per_hour}")
    stuck = _fruitless(incident, before)
    if stuck >= config.no_progress_limit:
        return Stop("no progress", f"{stuck + 1} recoveries in a row got no further than step {incident.step}")
    return None


def _fruitless(incident: Incident, before: Sequence[Incident]) -> int:
    """How many incidents in a row, up to the one before this, came no earlier than this in steps."""
    count = 0
    for past in reversed(before):
        if past.step < incident.step:
            break
        count += 1
    return count


@dataclass(frozen=True, kw_only=True, slots=True)
class Slowness:
    """What a slow rank has cost and what removing it would."""

    slowdown: float
    """Time of a step over its usual time; above 1."""
    since_s: float
    """Seconds since it began."""
    unsaved_s: float
    """Seconds of work since the last checkpoint, which a recovery at once would do again."""
    remaining_s: float
    """Seconds that the run would take without it."""


Remedy = Literal["log", "isolate at checkpoint", "restart now"]


def weigh(slowness: Slowness, config: PolicyConfig) -> Remedy:
    """Return the cheapest remedy for a slow rank by what it has cost so far."""
    lost_s = slowness.since_s * (1 - 1 / max(slowness.slowdown, 1.0))
    to_come_s = slowness.remaining_s * (max(slowness.slowdown, 1.0) - 1)
    if lost_s <= config.recovery_cost_s or to_come_s <= config.recovery_cost_s:
        return "log"
    at_once_s = config.recovery_cost_s + slowness.unsaved_s
    return "restart now" if lost_s > at_once_s and to_come_s > at_once_s else "isolate at checkpoint"
