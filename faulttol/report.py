"""What there is to say about a run, in a page of text."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from faulttol import clock, pace
from faulttol.config import DetectorConfig, HealthConfig
from faulttol.detector import Memory, observe
from faulttol.events import CollectiveEvent, RankRecord
from faulttol.finding import Finding
from faulttol.rules.window import LONGEST
from faulttol.view import JobView


@dataclass(frozen=True, slots=True)
class Episode:
    """A finding, and the steps between which the detector kept making it."""

    finding: Finding
    first_step: int
    last_step: int


def episodes(records: Sequence[RankRecord], config: DetectorConfig, health: HealthConfig) -> list[Episode]:
    """Return what the detector would have said while the run went on, in the order it would have begun to.

    It is shown the run window by window of its steps, and in the end as it stands.
    """
    steps = sorted({mark.step for record in records for mark in record.marks if mark.step >= 0})
    memory, found = Memory(), dict[tuple[object, ...], Episode]()
    ends = steps[config.window_steps - 1 :: config.window_steps]
    views = [(end, _until(records, end, config.window_steps)) for end in ends]
    views += [(steps[-1] if steps else -1, JobView({record.rank: record for record in records}))] * config.confirmations
    for step, view in views:
        memory, confirmed = observe(memory, view, config, health)
        for finding in confirmed:
            begun = found.get(finding.key)
            found[finding.key] = Episode(finding, begun.first_step if begun else step, step)
    return list(found.values())


def _until(records: Sequence[RankRecord], step: int, window: int) -> JobView:
    """Return the view of a run that had come to the end of a step, of what a detector looks at then."""
    oldest = step - (LONGEST + 1) * window
    return JobView(
        {
            record.rank: dataclasses.replace(
                record,
                events=tuple(event for event in record.events if oldest < event.step <= step),
                marks=tuple(mark for mark in record.marks if oldest < mark.step <= step),
                now_ns=max((mark.at_ns for mark in record.marks if mark.step <= step), default=record.now_ns),
            )
            for record in records
        }
    )


def text(records: Sequence[RankRecord], config: DetectorConfig, health: HealthConfig) -> str:
    """Return the report of one generation of a run."""
    parts = [_title(records), _findings(episodes(records, config, health)), _ranks(records), _kinds(records)]
    open_ones = [event for record in records for event in record.events if event.state != "ended"]
    if open_ones:
        parts.append(_unfinished(open_ones, {record.rank: record.now_ns for record in records}))
    return "\n\n".join(parts) + "\n"


def _title(records: Sequence[RankRecord]) -> str:
    first = records[0]
    missing = sorted(set(range(first.world_size)) - {record.rank for record in records})
    said = f"{len(records)} of {first.world_size} ranks, generation {first.generation}"
    if missing:
        said += f"; nothing of rank {', '.join(map(str, missing))}"
    worst = max((offset.error_ns for offset in clock.offsets(records).values()), default=0.0)
    known = "not tied to each other" if math.isinf(worst) else f"within {worst / 1e3:.0f} us"
    return f"{said}; clocks {known}"


def _findings(found: Sequence[Episode]) -> str:
    if not found:
        return "FINDINGS  none"
    lines = ["FINDINGS"]
    for episode in found:
        finding = episode.finding
        suspects = ", ".join(f"{suspect} ({suspect.score:.2f})" for suspect in finding.suspects)
        first, last = episode.first_step, episode.last_step
        when = (
            "" if last < 0 else f" (seen at step {first})" if first == last else f" (seen at steps {first} to {last})"
        )
        lines.append(f"  {finding.kind}: {finding.summary}{when}")
        if suspects:
            lines.append(f"    suspects: {suspects}")
        if finding.evidence:
            lines.append("    evidence: " + ", ".join(f"{name} {value}" for name, value in finding.evidence.items()))
    return "\n".join(lines)


def _ranks(records: Sequence[RankRecord]) -> str:
    excess: dict[int, list[float]] = defaultdict(list)
    for (rank, _), ratio in pace.excess(records).items():
        excess[rank].append(ratio)
    rows = [("RANK", "STEPS", "STEP ms", "OWN ms", "OWN/MEDIAN", "COLLECTIVES", "OPEN", "FAILED", "LOST")]
    for record in records:
        times = pace.step_times(record)
        states = Counter(event.state for event in record.events)
        rows.append(
            (
                str(record.rank),
                str(len(times)),
                f"{median(time.total_ns for time in times) / 1e6:.2f}" if times else "-",
                f"{median(time.own_ns for time in times) / 1e6:.2f}" if times else "-",
                f"{median(excess[record.rank]):.2f}" if excess[record.rank] else "-",
                str(len(record.events)),
                str(states["begun"]),
                str(states["failed"]),
                str(record.num_lost),
            )
        )
    return table(rows)


def _kinds(records: Sequence[RankRecord]) -> str:
    by_kind: dict[tuple[str, str], list[CollectiveEvent]] = defaultdict(list)
    for record in records:
        for event in record.events:
            if event.duration_ns is not None:
                by_kind[event.kind, event.group].append(event)
    rows = [("KIND", "GROUP", "BACKEND", "COUNT", "MB", "MEDIAN ms", "MAX ms")]
    for (kind, group), events in sorted(by_kind.items(), key=lambda item: -sum(e.duration_ns or 0 for e in item[1])):
        times = [(event.duration_ns or 0) / 1e6 for event in events]
        size = sum(event.bytes for event in events) / 1e6
        rows.append(
            (
                kind,
                group,
                events[0].backend,
                str(len(events)),
                f"{size:.2f}",
                f"{median(times):.3f}",
                f"{max(times):.3f}",
            )
        )
    return table(rows)


def _unfinished(events: Sequence[CollectiveEvent], now_ns: dict[int, int]) -> str:
    rows = [("NOT ENDED", "KIND", "GROUP", "SEQ", "PEER", "STEP", "STATE", "FOR s")]
    for event in sorted(events, key=lambda event: (event.group, event.seq, event.rank)):
        age = ((event.end_ns or now_ns[event.rank]) - event.begin_ns) / 1e9
        peer = "-" if event.peer is None else str(event.peer)
        rows.append(
            (
                f"rank {event.rank}",
                event.kind,
                event.group,
                str(event.seq),
                peer,
                str(event.step),
                event.state,
                f"{age:.3f}",
            )
        )
    return table(rows)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of equally many cells as aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
