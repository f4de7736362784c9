"""Where every rank's time went, step by step: in collectives and messages, or by itself. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from faulttol.events import CollectiveEvent, RankRecord, StepMark


@dataclass(frozen=True, slots=True)
class StepTime:
    """One step of one rank."""

    rank: int
    step: int
    total_ns: int
    inside_ns: int
    """While at least one collective or message was going on."""

    @property
    def own_ns(self) -> int:
        """Outside of all of them: what a slow rank has more of, while the others have more inside."""
        return self.total_ns - self.inside_ns


def step_times(record: RankRecord) -> list[StepTime]:
    """Return the steps of a rank of which both ends are known, in order; the next one's begin ends one too."""
    by_step: dict[int, list[CollectiveEvent]] = {}
    for event in record.events:
        by_step.setdefault(event.step, []).append(event)
    found = []
    begun: StepMark | None = None
    for mark in record.marks:
        if mark.kind == "phase":
            continue
        if begun is not None and (mark.kind == "step_begin" or mark.step == begun.step):
            inside = _covered(by_step.get(begun.step, ()), begun.at_ns, mark.at_ns)
            found.append(StepTime(record.rank, begun.step, mark.at_ns - begun.at_ns, inside))
        begun = mark if mark.kind == "step_begin" else None
    return found


def excess(records: Sequence[RankRecord]) -> dict[tuple[int, int], float]:
    """Return by (rank, step): own time over the median of the ranks in that step; above 1 is slower than its peers."""
    times = [time for record in records for time in step_times(record)]
    by_step: dict[int, list[int]] = {}
    for time in times:
        by_step.setdefault(time.step, []).append(time.own_ns)
    usual = {step: max(1.0, median(values)) for step, values in by_step.items()}
    return {(time.rank, time.step): time.own_ns / usual[time.step] for time in times}


def _covered(events: Iterable[CollectiveEvent], begin: int, end: int) -> int:
    """Return how much of a span is covered by events, overlaps once."""
    spans = sorted(
        (max(event.started_ns, begin), min(event.end_ns if event.end_ns is not None else end, end)) for event in events
    )
    covered, reached = 0, begin
    for first, last in spans:
        if last > reached:
            covered += last - max(first, reached)
            reached = last
    return covered
