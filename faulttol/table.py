"""Events and marks as Arrow tables, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from faulttol.events import CollectiveEvent, RankRecord, StepMark

_WORDS = pa.dictionary(pa.int16(), pa.string())

EVENTS = pa.schema(
    [
        pa.field("rank", pa.int32(), nullable=False),
        pa.field("index", pa.int64(), nullable=False),
        pa.field("kind", _WORDS, nullable=False),
        pa.field("group", _WORDS, nullable=False),
        pa.field("backend", _WORDS, nullable=False),
        pa.field("seq", pa.int64(), nullable=False),
        pa.field("peer", pa.int32()),
        pa.field("bytes", pa.int64(), nullable=False),
        pa.field("dtype", _WORDS, nullable=False),
        pa.field("step", pa.int64(), nullable=False),
        pa.field("phase", _WORDS, nullable=False),
        pa.field("state", _WORDS, nullable=False),
        pa.field("begin_ns", pa.int64(), nullable=False),
        pa.field("end_ns", pa.int64()),
        pa.field("device_ns", pa.int64()),
        pa.field("end_is_late", pa.bool_(), nullable=False),
    ]
)
"""One row an event, the fields of CollectiveEvent; the members of a group are in the metadata of its table."""

MARKS = pa.schema(
    [
        pa.field("rank", pa.int32(), nullable=False),
        pa.field("index", pa.int64(), nullable=False),
        pa.field("kind", _WORDS, nullable=False),
        pa.field("step", pa.int64(), nullable=False),
        pa.field("phase", _WORDS, nullable=False),
        pa.field("at_ns", pa.int64(), nullable=False),
        pa.field("tokens", pa.int64()),
        pa.field("loss", pa.float64()),
        pa.field("grad_norm", pa.float64()),
    ]
)
"""One row a mark, the fields of StepMark."""


def events_table(events: Sequence[CollectiveEvent]) -> Any:
    """Return a table of the schema EVENTS."""
    return _table(events, EVENTS)


def marks_table(marks: Sequence[StepMark]) -> Any:
    """Return a table of the schema MARKS."""
    return _table(marks, MARKS)


def group_ranks(events: Iterable[CollectiveEvent]) -> dict[str, tuple[int, ...]]:
    """Return the members of every group among the events."""
    return {event.group: event.group_ranks for event in events}


def events_of(rows: Any, groups: Mapping[str, Sequence[int]]) -> list[CollectiveEvent]:
    """Return the events of a table or batch of the schema EVENTS."""
    return [CollectiveEvent(**row, group_ranks=tuple(groups.get(row["group"], ()))) for row in rows.to_pylist()]


def marks_of(rows: Any) -> list[StepMark]:
    """Return the marks of a table or batch of the schema MARKS."""
    return [StepMark(**row) for row in rows.to_pylist()]


def merge(records: Iterable[RankRecord]) -> list[RankRecord]:
    """Return one record a rank and generation of those that told of it bit by bit, in the order they were read.

    Of an event that was told of twice the later is kept, but an end is never replaced by a begin.
    """
    found: dict[tuple[int, int], list[RankRecord]] = {}
    for record in records:
        found.setdefault((record.generation, record.rank), []).append(record)
    return [_merged(found[key]) for key in sorted(found)]


def _merged(parts: Sequence[RankRecord]) -> RankRecord:
    events: dict[int, CollectiveEvent] = {}
    for event in (event for part in parts for event in part.events):
        known = events.get(event.index)
        if known is None or known.state == "begun" or event.state != "begun":
            events[event.index] = event
    marks = {mark.index: mark for part in parts for mark in part.marks}
    return dataclasses.replace(
        parts[-1],
        events=tuple(events[index] for index in sorted(events)),
        marks=tuple(marks[index] for index in sorted(marks)),
        now_ns=max(part.now_ns for part in parts),
        num_lost=max(part.num_lost for part in parts),
    )


def _table(rows: Sequence[CollectiveEvent] | Sequence[StepMark], schema: Any) -> Any:
    columns = {name: [getattr(row, name) for row in rows] for name in schema.names}
    return pa.table([pa.array(columns[field.name], field.type) for field in schema], schema=schema)
