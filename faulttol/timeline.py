"""A run as a trace for Perfetto (ui.perfetto.dev) or chrome://tracing: what every rank did, and who waited for whom."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from faulttol.clock import offsets
from faulttol.events import CollectiveEvent, RankRecord, StepMark
from faulttol.view import Operation, match

_STEPS = "steps"
_FROM_ROOT, _TO_ROOT = frozenset({"broadcast", "scatter"}), frozenset({"reduce", "gather"})


def write(records: Sequence[RankRecord], path: Path) -> None:
    """Write the trace as JSON."""
    path.write_text(json.dumps(trace(records)))


def trace(records: Sequence[RankRecord]) -> dict[str, Any]:
    """Return the trace: a process a rank, a track for its steps and one for every group it is in.

    Arrows lead from the rank that entered a collective last to the ends of those who waited for it, and from the
    sending of a message to the end of its receipt. Who receives waits for the root of a broadcast or a scatter alone,
    and of a reduction to a root or a gather only that root waits. Ranks are put on one clock as well as their records
    allow; `otherData` says how well that is.
    """
    shifts = offsets(records)
    shift_ns = {rank: offset.ns for rank, offset in shifts.items()}
    start = min((ns + shift_ns[r.rank] for r in records for ns in _times(r)), default=0)
    by_rank = {rank: start - ns for rank, ns in shift_ns.items()}
    tracks: dict[tuple[int, str], int] = {}
    rows: list[dict[str, Any]] = []
    for record in records:
        rows += _steps(record, by_rank[record.rank], _track(tracks, record.rank, _STEPS))
        for event in record.events:
            rows.append(_slice(record, event, by_rank[record.rank], _track(tracks, record.rank, _track_of(event))))
    for number, operation in enumerate(match(event for record in records for event in record.events).values(), 1):
        rows += _arrows(operation, number, by_rank, tracks)
    names = [_named("process_name", record.rank, 0, f"rank {record.rank}") for record in records]
    names += [_named("thread_name", rank, number, name) for (rank, name), number in tracks.items()]
    return {
        "traceEvents": names + rows,
        "displayTimeUnit": "ms",
        "otherData": {f"clock of rank {rank}": f"+- {offset.error_ns / 1e3:.0f} us" for rank, offset in shifts.items()},
    }


def _steps(record: RankRecord, zero_ns: int, track: int) -> Iterator[dict[str, Any]]:
    begun: StepMark | None = None
    for mark in record.marks:
        if mark.kind == "phase":
            yield {"ph": "i", "name": mark.phase, "s": "t", **_at(record.rank, track, mark.at_ns - zero_ns)}
        elif mark.kind == "step_begin":
            begun = mark
        elif begun is not None and begun.step == mark.step:
            yield {
                "ph": "X",
                "name": f"step {mark.step}",
                "cat": "step",
                "dur": (mark.at_ns - begun.at_ns) / 1e3,
                "args": {"tokens": begun.tokens or mark.tokens, "loss": mark.loss, "grad_norm": mark.grad_norm},
                **_at(record.rank, track, begun.at_ns - zero_ns),
            }


def _slice(record: RankRecord, event: CollectiveEvent, zero_ns: int, track: int) -> dict[str, Any]:
    end = record.now_ns if event.end_ns is None else event.end_ns
    name = event.kind if event.state == "ended" else f"{event.kind} ({'open' if event.state == 'begun' else 'failed'})"
    return {
        "ph": "X",
        "name": name,
        "cat": event.backend,
        "dur": max(0, end - event.started_ns) / 1e3,
        "args": {
            "seq": event.seq,
            "bytes": event.bytes,
            "dtype": event.dtype,
            "peer": event.peer,
            "step": event.step,
            "phase": event.phase,
            "called_us_before": (event.started_ns - event.begin_ns) / 1e3,
            "end_is_late": event.end_is_late,
        },
        **_at(event.rank, track, event.started_ns - zero_ns),
    }


def _arrows(
    operation: Operation, number: int, zero_ns: dict[int, int], tracks: dict[tuple[int, str], int]
) -> Iterator[dict[str, Any]]:
    if len(operation.events) < 2:
        return
    events = list(operation.events.values())
    if operation.is_message:
        causes = [event for event in events if event.kind == "send"]
    elif events[0].kind in _FROM_ROOT:
        causes = [event for event in events if event.rank == event.peer]
    else:
        causes = events
    if not causes:  # nothing is known of the root
        return
    cause = max(causes, key=lambda event: event.started_ns - zero_ns[event.rank])
    begun_ns = cause.started_ns - zero_ns[cause.rank]
    for event in events:
        waits = event.kind not in _TO_ROOT or event.rank == event.peer
        if event is cause or not waits or event.end_ns is None or event.end_ns - zero_ns[event.rank] < begun_ns:
            continue
        flow = {"name": "waited for", "cat": "flow", "id": f"{number}.{event.rank}"}
        source, target = tracks[cause.rank, _track_of(cause)], tracks[event.rank, _track_of(event)]
        yield {"ph": "s", **flow, **_at(cause.rank, source, begun_ns)}
        yield {"ph": "f", "bp": "e", **flow, **_at(event.rank, target, event.end_ns - zero_ns[event.rank])}


def _times(record: RankRecord) -> Iterator[int]:
    yield from (event.begin_ns for event in record.events[:1])
    yield from (mark.at_ns for mark in record.marks[:1])


def _track_of(event: CollectiveEvent) -> str:
    return f"messages of {event.group}, {event.kind}" if event.is_message else f"group {event.group}"


def _track(tracks: dict[tuple[int, str], int], rank: int, name: str) -> int:
    return tracks.setdefault((rank, name), len(tracks))


def _at(rank: int, track: int, ns: int) -> dict[str, Any]:
    return {"pid": rank, "tid": track, "ts": ns / 1e3}


def _named(what: str, rank: int, track: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": rank, "tid": track, "args": {"name": name}}
