"""Whether the ranks run one program: collectives that do not fit together, and steps unlike a rank's earlier ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from faulttol.config import DetectorConfig
from faulttol.events import CollectiveEvent, RankRecord
from faulttol.finding import Finding, FindingKind, Suspect
from faulttol.view import JobView, Operation, OperationKey, match, signature

_RECENT = 256
"""Events of each rank that are looked at."""
_Place = tuple[str, str, int, str, int]


def mismatches(view: JobView, config: DetectorConfig) -> list[Finding]:
    """Return at most one finding for each group: its first operation that the ranks do not mean alike.

    Alike means: same kind, bytes, dtype and root. Without such an operation, a group in which ranks have made
    different numbers of collectives by the end of several steps in a row: somebody left one out.
    """
    recent = {rank: record.events[-_RECENT:] for rank, record in view.records.items()}
    first: dict[str, Finding] = {}
    for key, operation in sorted(match(e for events in recent.values() for e in events).items()):
        if key.group in first or len(operation.events) < 2:
            continue
        if len({signature(event) for event in operation.events.values()}) > 1:
            first[key.group] = _mismatch(view, key, operation)
    for finding in _offsets(view, recent, config):
        first.setdefault(finding.group, finding)
    return list(first.values())


def deviation(view: JobView, rank: int) -> str:
    """Say how the rank's last two steps differ from the one before them; empty when they do not.

    The step it is in may be a beginning of the earlier one, a step that it left must be the whole. Where these two
    steps differ on another rank too (one has an evaluation, a checkpoint), it is no deviation. Without marks nothing
    is said.
    """
    places = {other: _places(record) for other, record in view.records.items()}
    own = places.pop(rank, {})
    if len(own) < 3:
        return ""
    before, *last = sorted(own)[-3:]
    step = next((step for step in last if _differ(own, before, step)), None)
    if step is None or any(_differ(theirs, before, step) for theirs in places.values()):
        return ""
    return _difference(step, own[before], own[step])


def _places(record: RankRecord) -> dict[int, list[_Place]]:
    """What the rank did in each of its last steps."""
    places: dict[int, list[_Place]] = {}
    for event in record.events[-_RECENT:]:
        if event.step >= 0:
            places.setdefault(event.step, []).append(_place(event))
    if len(record.events) > _RECENT or record.num_lost:
        places.pop(min(places, default=-1), None)  # its beginning may be cut off
    return places


def _differ(places: Mapping[int, list[_Place]], before: int, step: int) -> bool:
    """Whether the rank did something else in the step than in the one before, as far as it has got."""
    if before not in places or step not in places:
        return False
    usual, found = places[before], places[step]
    return found != (usual if step < max(places) else usual[: len(found)])


def _offsets(view: JobView, recent: dict[int, tuple[CollectiveEvent, ...]], config: DetectorConfig) -> list[Finding]:
    """Groups that all members use in every step, and of whose collectives some have made more than others."""
    last: dict[str, dict[int, dict[int, int]]] = {}
    members: dict[str, tuple[int, ...]] = {}
    now = {rank: max((event.step for event in events), default=-1) for rank, events in recent.items()}
    for rank, events in recent.items():
        for event in events:
            if not event.is_message and event.step >= 0:
                last.setdefault(event.group, {}).setdefault(rank, {})[event.step] = event.seq
                members[event.group] = event.group_ranks
    found = []
    for group, by_rank in sorted(last.items()):
        if set(by_rank) != set(members[group]) or len(by_rank) < 2:
            continue
        until = min(now[rank] for rank in by_rank)
        steps = range(until - config.confirmations - 1, until)
        if any(step not in by_rank[rank] for rank in by_rank for step in steps):
            continue
        counts = [{rank: by_rank[rank][step] for rank in by_rank} for step in steps]
        lags = [{rank: max(count.values()) - seq for rank, seq in count.items()} for count in counts]
        if any(lags[0].values()) and all(lag == lags[0] for lag in lags):
            found.append(_offset(view, group, lags[0], until - 1, max(counts[-1].values())))
    return found


def _offset(view: JobView, group: str, lags: dict[int, int], step: int, seq: int) -> Finding:
    """The minority is odd; of two equal parts, the one that made fewer."""
    counts = Counter(lags.values())
    most = max(counts.values())
    usual = min(lag for lag, count in counts.items() if count == most)
    odd = sorted(rank for rank, lag in lags.items() if lag != usual)
    return Finding(
        kind=FindingKind.DESYNC,
        suspects=tuple(Suspect(rank, 1.0 / len(odd)) for rank in odd),
        summary=f"at the end of step {step} some ranks have made fewer collectives of {group} than others: "
        + ", ".join(f"rank {rank} {lag} fewer" for rank, lag in sorted(lags.items()) if lag),
        evidence={f"collectives that rank {rank} lacks": lag for rank, lag in sorted(lags.items())},
        group=group,
        sequence=seq,
        step=step,
    )


def _place(event: CollectiveEvent) -> _Place:
    return event.group, event.kind, event.bytes, event.dtype, -1 if event.peer is None else event.peer


def _difference(step: int, usual: list[_Place], found: list[_Place]) -> str:
    for index, (one, other) in enumerate(zip(usual, found, strict=False)):
        if one != other:
            return f"step {step}, operation {index + 1}: {other[1]} of {other[2]} bytes, usually {one[1]} of {one[2]}"
    return f"step {step} has {len(found)} operations, usually {len(usual)}"


def _mismatch(view: JobView, key: OperationKey, operation: Operation) -> Finding:
    signatures = {rank: signature(event) for rank, event in operation.events.items()}
    counts = Counter(signatures.values())
    most = max(counts.values())
    usual = [form for form, count in counts.items() if count == most]
    if len(usual) == 1:
        odd = [rank for rank, form in signatures.items() if form != usual[0]]
    else:
        odd = [rank for rank in signatures if deviation(view, rank)] or sorted(signatures)
    said = "; ".join(f"rank {rank} {_describe(operation.events[rank])}" for rank in sorted(signatures))
    return Finding(
        kind=FindingKind.DESYNC,
        suspects=tuple(Suspect(rank, 1.0 / len(odd)) for rank in sorted(odd)),
        summary=f"operation {key.seq} of {key.group} is not one: {said}",
        evidence={f"rank {rank}": _describe(event) for rank, event in sorted(operation.events.items())},
        group=key.group,
        sequence=key.seq,
        step=max(event.step for event in operation.events.values()),
    )


def _describe(event: CollectiveEvent) -> str:
    root = "" if event.peer is None or event.is_message else f" root {event.peer}"
    return f"{event.kind} of {event.bytes} bytes {event.dtype}{root}".rstrip()
