"""How a rank's time divides into steps: what it worked by itself, and what it spent in collectives. Pure.

Without marks of steps the period of the operations stands for them: the shortest distance at which the sequence of
kinds and sizes repeats.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from faulttol.events import CollectiveEvent, RankRecord
from faulttol.view import role_signature

_REPEATS = 0.95
"""Share of operations that equal those one period earlier."""


@dataclass(frozen=True, slots=True)
class Pace:
    """One step of one rank, in seconds of its own clock."""

    step: int
    span_s: float
    """From the beginning of the step to that of the next."""
    local_s: float
    """The part in which none of its collectives was open: computing, loading, writing."""
    tokens: int | None
    """What it had to work on, if it said so."""
    phases: frozenset[str]
    role: int
    """Equal for ranks that make the same operations in a step."""
    begin_ns: int = 0
    """When it began, on the rank's clock."""

    @property
    def communication_s(self) -> float:
        """The part in which a collective was open: transfers, and waiting for others."""
        return self.span_s - self.local_s


def paces(record: RankRecord, first_step: int = -1, last_step: int | None = None) -> dict[int, Pace]:
    """Return the rank's whole steps from `first_step` to `last_step`, by number."""
    bounds = _marked(record) or _periodic(record)
    tokens = {mark.step: mark.tokens for mark in record.marks if mark.tokens is not None}
    phases: dict[int, set[str]] = {}
    for mark in record.marks:
        phases.setdefault(mark.step, set()).add(mark.phase)
    found: dict[int, Pace] = {}
    events = record.events
    cursor = 0
    for (step, begin_ns), (_, end_ns) in itertools.pairwise(bounds):
        if step < first_step or (last_step is not None and step > last_step):
            continue
        while cursor < len(events) and events[cursor].begin_ns < begin_ns:
            cursor += 1
        inside = []
        while cursor < len(events) and events[cursor].begin_ns < end_ns:
            inside.append(events[cursor])
            cursor += 1
        open_ns = _union_ns(inside, begin_ns, end_ns)
        found[step] = Pace(
            step=step,
            span_s=(end_ns - begin_ns) / 1e9,
            local_s=(end_ns - begin_ns - open_ns) / 1e9,
            tokens=tokens.get(step),
            phases=frozenset(phases.get(step, set()) | {event.phase for event in inside} - {""}),
            role=hash(tuple(role_signature(event) for event in inside)),
            begin_ns=begin_ns,
        )
    return found


def period(signatures: Sequence[object]) -> int:
    """Return the shortest period of the sequence, or 0 where it has none that it repeats three times."""
    for distance in range(1, len(signatures) // 3 + 1):
        pairs = len(signatures) - distance
        equal = sum(one == other for one, other in zip(signatures, signatures[distance:], strict=False))
        if equal >= _REPEATS * pairs:
            return distance
    return 0


def _marked(record: RankRecord) -> list[tuple[int, int]]:
    return [(mark.step, mark.at_ns) for mark in record.marks if mark.kind == "step_begin"]


def _periodic(record: RankRecord) -> list[tuple[int, int]]:
    """Steps begin where every `period`-th collective of the rank's largest group does; its count numbers them."""
    events = [event for event in record.events if not event.is_message]
    if not events:
        return []
    group = max((event.group for event in events), key=lambda name: _size(events, name))
    own = [event for event in events if event.group == group]
    distance = period([role_signature(event) for event in own])
    if not distance:
        return []
    return [(event.seq // distance, event.begin_ns) for event in own if event.seq % distance == 0]


def _size(events: Sequence[CollectiveEvent], group: str) -> int:
    return next(len(event.group_ranks) for event in events if event.group == group)


def _union_ns(events: Sequence[CollectiveEvent], begin_ns: int, end_ns: int) -> int:
    """Length of the union of what was open, between the two moments; events are in the order of their beginning."""
    total, reached = 0, begin_ns
    for event in events:
        if event.kind == "send" and event.end_is_late:
            continue  # nobody waited: it left while the rank went on
        end = min(end_ns, event.end_ns if event.end_ns is not None else end_ns)
        start = max(reached, event.begin_ns)
        if end > start:
            total += end - start
            reached = end
    return total
