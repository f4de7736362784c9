"""All processes of a job that outlives its ranks: who is there, who is ready, and spares for those who left."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from faulttol.config import HealthConfig
from faulttol.health import Vitals
from launch.fleet import Fleet
from launch.member import Ending, Member
from launch.supervisor import LONGEST_TICK_S, STACKS_S
from launch.verdict import RankStatus

POLL_S = 0.02
_REFILL_S = 10.0  # from one attempt to start what is missing to the next, doubled for each that came to nothing
_LONGEST_REFILL_S = 600.0


class Roster:
    """The members of one job, on a clock that stands still while the supervisor itself is suspended."""

    def __init__(
        self, fleet: Fleet, health: HealthConfig, start_timeout_s: float, tell: Callable[[str, Member | None], None]
    ) -> None:
        """Who is not ready `start_timeout_s` after its start is replaced. `tell` tells a person, of a member or not."""
        self.fleet = fleet
        self.now_s = 0.0
        self.members: list[Member] = []
        self.num_kept = 0
        """Processes that there are to be."""
        self._health, self._start_timeout_s, self._tell = health, start_timeout_s, tell
        self._told: set[int] = set()
        """Members without a place whose end is told."""
        self.num_failed = 0
        """Attempts in a row to start what is missing of which nobody got ready."""
        self._attempts: list[range] = []
        """Members of the attempts of which it is not known yet what comes of them."""
        self._refilled_s = -_LONGEST_REFILL_S
        self._looked_s = time.monotonic()

    @property
    def ranks(self) -> list[Member]:
        """The members that have a place in the current generation, by rank."""
        placed = [member for member in self.members if member.rank is not None]
        return sorted(placed, key=lambda member: member.rank or 0)

    @property
    def ready(self) -> list[Member]:
        """Members that wait for a place, in the order of their start."""
        return [member for member in self.members if member.is_ready]

    @property
    def step(self) -> int:
        """The furthest step that a rank has begun; -1 before the first."""
        pulses = (member.status.pulse for member in self.ranks)
        return max((pulse.step for pulse in pulses if pulse is not None), default=-1)

    def look(self) -> None:
        """Bring what is known up to date."""
        reports = self.fleet.look()
        looked_s = time.monotonic()
        self.now_s += min(looked_s - self._looked_s, LONGEST_TICK_S)
        self._looked_s = looked_s
        for index, report in enumerate(reports):
            if index == len(self.members):
                self.members.append(Member(index, RankStatus(rank=index)))
            self.members[index].learn(report, self.now_s, self._health)
        self._judge()

    def since_s(self, began_s: float) -> float:
        """Seconds from a time of this clock until now, which is later than the last look."""
        return time.monotonic() - self._looked_s + self.now_s - began_s

    def mark(self, ending: Ending, state: str) -> None:
        """Note when recovery from an ending came to a state."""
        ending.times[state] = round(self.since_s(ending.began_s), 4)

    def vitals(self, generation: int, placed_s: float) -> list[Vitals]:
        """Of the ranks that have not finished, under their numbers in this generation."""
        since_s = self.now_s - placed_s
        return [
            replace(vitals, rank=member.rank, progress_age_s=min(vitals.progress_age_s or 0.0, since_s))
            for member in self.ranks
            if (vitals := member.vitals) is not None and member.rank is not None and not member.is_done(generation)
        ]

    def seats(self, before: dict[int, Member], size: int) -> list[Member]:
        """Who is which rank now: survivors stay where they were, spares fill the gaps; with fewer ranks all move up."""
        staying = {rank: member for rank, member in before.items() if not member.is_gone}
        spares = self.ready
        if size < len(before):
            return [*(staying[rank] for rank in sorted(staying)), *spares][:size]
        rest = iter(spares)
        return [staying[rank] if rank in staying else next(rest) for rank in range(size)]

    def hurry(self) -> None:
        """Start what is missing at once: whatever came to nothing before, one is needed now."""
        self.num_failed, self._attempts, self._refilled_s = 0, [], -_LONGEST_REFILL_S

    def refill(self) -> bool:
        """Start new processes for the members that are gone or unfit to take a place.

        Some time after the last attempt, and the later, the more in a row came to nothing. Returns whether there are
        new ones.
        """
        if self._end_one_unfit():
            return False
        missing = self.num_kept - sum(not member.is_gone for member in self.members)
        if missing <= 0:
            return False
        self._tell_failed()
        if self.now_s < self._refilled_s + self._pause_s():
            return False
        for member in self.members:
            if member.is_gone and not member.is_ended and member.status.exit is None:
                self.end(member)  # its process lingers in the place that its successor takes
        self._refilled_s = self.now_s
        added = 0
        try:
            while added < missing:
                self.fleet.add()
                added += 1
        except OSError as error:  # a full disk, no process left: no reason to end those that work
            self.num_failed += not added
            self._tell(f"cannot start a process: {error}; tries again after {self._pause_s():g} s", None)
        if added:
            self._attempts.append(range(len(self.members), len(self.members) + added))
        return added > 0

    def _judge(self) -> None:
        """Count the attempts to start somebody that came to nothing; one of which anybody got ready ends the row."""
        for attempt in list(self._attempts):
            members = self.members[attempt.start : attempt.stop]
            if any(member.has_been_ready for member in members):
                self.num_failed = 0
            elif len(members) == len(attempt) and all(member.is_gone for member in members):
                self.num_failed += 1
            else:
                continue
            self._attempts.remove(attempt)

    def _end_one_unfit(self) -> bool:
        """One at a time: to end a process may take a while, in which nobody looks at the ranks."""
        for member in self.members:
            loss = member.unfit(self.now_s, self._start_timeout_s)
            if loss is not None:
                self._told.add(member.index)
                self.end(member)
                self._tell(f"{loss.kind}: {loss.detail}; it was ended, and another takes its place", member)
                return True
        return False

    def _pause_s(self) -> float:
        """From one attempt to the next."""
        return min(_LONGEST_REFILL_S, _REFILL_S * 2.0 ** min(32, max(0, self.num_failed - 1)))

    def _tell_failed(self) -> None:
        apart = f"starts are at least {self._pause_s():g} s apart now"
        for member in self.members:
            if member.is_gone and not member.has_had_place and member.index not in self._told:
                self._told.add(member.index)
                what = "ended while it waited for a place" if member.has_been_ready else "was never ready"
                self._tell(f"{what}: {member.own_loss().detail}; {apart}", member)

    def end(self, member: Member) -> None:
        """End a member, whatever state it is in."""
        self.fleet.end(member.index)
        member.is_ended = True

    def collect_stacks(self, members: Sequence[Member]) -> None:
        """Have members say where they are, in their logs."""
        self.fleet.dump_stacks([member.index for member in members if not member.is_gone])
        until_s = self.now_s + STACKS_S
        while self.now_s < until_s:
            time.sleep(POLL_S)
            self.look()
