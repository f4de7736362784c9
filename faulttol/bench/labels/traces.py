"""What the ranks of one trial recorded, as two Arrow files: to be looked at again, view by view."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from faulttol import table
from faulttol.events import RankRecord
from faulttol.view import JobView

_LAST_NS = (150_000_000, 40_000_000, 0)
"""The last views, before the end of the trace: what was just found there needs two that agree."""


@dataclass(frozen=True, slots=True)
class Trace:
    """One trial: what the ranks recorded until its end, and who was struck."""

    name: str
    culprit: str
    struck_ns: int
    records: dict[int, RankRecord]

    def views(self, every_ns: int) -> Iterator[JobView]:
        """The job as it was from time to time, and some times at the end of the trace."""
        begin = min(record.marks[0].at_ns for record in self.records.values())
        end = max(record.now_ns for record in self.records.values())
        last = [end - before_ns for before_ns in _LAST_NS]
        for now_ns in (*range(begin + every_ns, last[0], every_ns), *last):
            yield JobView({rank: _until(record, now_ns) for rank, record in self.records.items()})


def names(folder: Path) -> list[str]:
    """The traces that there are."""
    return sorted(path.name.removesuffix(".events.arrow") for path in folder.glob("*.events.arrow"))


def load(folder: Path, name: str) -> Trace:
    """Read one trace."""
    events = _read(folder / f"{name}.events.arrow")
    marks = table.marks_of(_read(folder / f"{name}.marks.arrow"))
    about = json.loads(events.schema.metadata[b"about"])
    groups = {group: tuple(ranks) for group, ranks in about["groups"].items()}
    all_events = table.events_of(events, groups)
    records = {
        rank: RankRecord(
            rank=rank,
            world_size=len(about["now_ns"]),
            generation=0,
            events=tuple(event for event in all_events if event.rank == rank),
            marks=tuple(mark for mark in marks if mark.rank == rank),
            now_ns=now_ns,
            num_lost=0,
        )
        for rank, now_ns in enumerate(about["now_ns"])
    }
    return Trace(name, about["culprit"], about["struck_ns"], records)


def save(trace: Trace, folder: Path) -> None:
    """Write one trace, two files."""
    events = [event for record in trace.records.values() for event in record.events]
    about = {
        "culprit": trace.culprit,
        "struck_ns": trace.struck_ns,
        "now_ns": [trace.records[rank].now_ns for rank in sorted(trace.records)],
        "groups": table.group_ranks(events),
    }
    _write(table.events_table(events).replace_schema_metadata({"about": json.dumps(about)}), folder, "events", trace)
    _write(table.marks_table([m for r in trace.records.values() for m in r.marks]), folder, "marks", trace)


def _until(record: RankRecord, now_ns: int) -> RankRecord:
    """What a reader had found at that moment: what ended later is open still."""
    return replace(
        record,
        events=tuple(
            event
            if event.end_ns is not None and event.end_ns <= now_ns
            else replace(event, end_ns=None, state="begun", device_ns=None, end_is_late=False)
            for event in record.events
            if event.begin_ns <= now_ns
        ),
        marks=tuple(mark for mark in record.marks if mark.at_ns <= now_ns),
        now_ns=now_ns,
    )


def _read(path: Path) -> Any:
    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_file(file).read_all()


def _write(rows: Any, folder: Path, what: str, trace: Trace) -> None:
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_file(folder / f"{trace.name}.{what}.arrow", rows.schema, options=options) as writer:
        writer.write_table(rows)
