"""How far apart the clocks of ranks are, from what they recorded anyway: nothing is exchanged for it. Pure.

Nobody leaves an all-reduce before everybody has entered it, and nothing is received before it is sent. So each such
operation bounds the offset between two ranks' clocks from both sides (a message from one), and the offset lies where
all the bounds meet. Clocks drift: the newest bounds are taken first, and older ones as long as they still agree.

No rule of the detector needs this. The timeline does, between machines: ranks of one machine share a clock.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from faulttol.events import CollectiveEvent, RankRecord

_MEETINGS = frozenset(
    {
        "all_gather",
        "all_gather_coalesced",
        "all_gather_into_tensor",
        "all_gather_into_tensor_coalesced",
        "all_reduce",
        "all_reduce_coalesced",
        "all_to_all",
        "all_to_all_single",
        "barrier",
        "reduce_scatter",
        "reduce_scatter_tensor",
        "reduce_scatter_tensor_coalesced",
    }
)
"""The kinds that nobody leaves before all have entered."""


@dataclass(frozen=True, slots=True)
class Offset:
    """What to add to a rank's times to get the reference's."""

    ns: int
    error_ns: float
    """Half the width of what the bounds leave open; infinite without bounds from both sides."""


@dataclass(frozen=True, slots=True)
class _Bound:
    """low <= (time of the one) - (time of the other) <= high, at some moment."""

    at_ns: int
    low: float
    high: float


def offsets(records: Sequence[RankRecord]) -> dict[int, Offset]:
    """Return the offset of every rank to the first one's clock; ranks that nothing ties to it have none to be had."""
    if not records:
        return {}
    between = _bounds(records)
    first = records[0].rank
    found = {first: Offset(0, 0.0)}
    waiting = deque([first])
    while waiting:
        one = waiting.popleft()
        for other in sorted(pair[1] for pair in between if pair[0] == one):
            if other in found:
                continue
            low, high = _meet(between[one, other])
            if math.isinf(low) and math.isinf(high):
                continue
            middle = (low + high) / 2 if not (math.isinf(low) or math.isinf(high)) else max(low, min(high, 0.0))
            step = Offset(round(middle), (high - low) / 2)
            found[other] = Offset(found[one].ns + step.ns, found[one].error_ns + step.error_ns)
            waiting.append(other)
    return {record.rank: found.get(record.rank, Offset(0, math.inf)) for record in records}


def _bounds(records: Sequence[RankRecord]) -> Mapping[tuple[int, int], list[_Bound]]:
    """Return by (one, other) what bounds the time of the one less that of the other."""
    found: dict[tuple[int, int], list[_Bound]] = defaultdict(list)
    for members in _matched(records).values():
        one = members[0]
        for other in members[1:]:
            low, high = -math.inf, math.inf
            if one.kind in _MEETINGS:
                if one.end_ns is not None:
                    high = one.end_ns - other.begin_ns
                if other.end_ns is not None:
                    low = one.begin_ns - other.end_ns
            elif one.kind == "send" and other.end_ns is not None:
                low = one.begin_ns - other.end_ns
            elif other.kind == "send" and one.end_ns is not None:
                high = one.end_ns - other.begin_ns
            if low > -math.inf or high < math.inf:
                found[one.rank, other.rank].append(_Bound(one.begin_ns, low, high))
                found[other.rank, one.rank].append(_Bound(one.begin_ns, -high, -low))
    return found


def _matched(records: Iterable[RankRecord]) -> dict[tuple[object, ...], list[CollectiveEvent]]:
    found: dict[tuple[object, ...], list[CollectiveEvent]] = defaultdict(list)
    for record in records:
        for event in record.events:
            if event.kind in _MEETINGS:
                found[event.group, event.kind, event.seq].append(event)
            elif event.is_message and event.peer is not None:
                found[event.group, event.source, event.target, event.seq].append(event)
    return found


def _meet(bounds: Sequence[_Bound]) -> tuple[float, float]:
    """Return what the newest bounds have in common, as many as have something in common."""
    low, high = -math.inf, math.inf
    for bound in sorted(bounds, key=lambda bound: -bound.at_ns):
        if max(low, bound.low) > min(high, bound.high):
            break
        low, high = max(low, bound.low), min(high, bound.high)
    return low, high
