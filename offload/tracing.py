"""What a step does and waits for: spans of time in lanes, bytes per tier, peaks of memory; as a Chrome trace.

Lanes are names. Two of them mean something here: `COMPUTE` has the phases of a step (`forward`, `backward`,
`update`), `STALL` has what compute waited for, named after the tier. All others are transfers or background work,
such as `cpu to gpu` or `nvme read`, and carry their bytes.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from offload.tier import Tier

COMPUTE = "compute"
STALL = "stall"
_MAX_SPANS = 200_000
"""About 40 MB; older ones are dropped."""


@dataclass(frozen=True, slots=True)
class Span:
    """Something that took from `start_s` to `end_s` of the trace's clock."""

    name: str
    lane: str
    start_s: float
    end_s: float
    num_bytes: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRecord:
    """One step, added up."""

    index: int
    wall_s: float
    phases_s: Mapping[str, float]
    """Seconds of each phase, by its name."""
    stalls_s: Mapping[str, float]
    """Seconds that compute waited, by tier."""
    moved_bytes: Mapping[str, int]
    """Bytes moved, by lane."""
    busy_s: Mapping[str, float]
    """Seconds in which each lane other than compute and stalls had something to do."""
    hidden: Mapping[str, float]
    """Share of a lane's busy time that lay under a phase of compute, outside of stalls; by lane."""
    held_bytes: Mapping[str, int]
    """Bytes that blocks take in each watched tier at the end of the step."""
    peaks: Mapping[str, int]
    """`rss_bytes` of this process so far; with a GPU `device_allocated_bytes` (torch) and `device_used_bytes`
    (the driver's figure, which is what nvml shows, at the end of the step)."""


@dataclass(slots=True)
class _DeviceSpan:
    """A span whose ends are CUDA events, until they have happened."""

    name: str
    lane: str
    num_bytes: int
    start: Any
    end: Any


@dataclass(slots=True)
class _Origin:
    """A CUDA event and the time at which it happened."""

    event: Any
    at_s: float


@dataclass(slots=True)
class _Running:
    """The step that is being recorded."""

    index: int = 0
    started_s: float = 0.0
    spans: list[Span] = field(default_factory=list)


class Trace:
    """Collects spans from any thread. Costs about 2 us a span."""

    def __init__(self, *, now_s: Callable[[], float] = time.perf_counter, max_spans: int = _MAX_SPANS) -> None:
        self.now_s = now_s
        self._lock = threading.Lock()
        self._spans: deque[Span] = deque(maxlen=max_spans)
        self._started_s = now_s()
        self._running = _Running(started_s=self._started_s)
        self._on_device: list[_DeviceSpan] = []
        self._origins: dict[int, _Origin] = {}
        self._tiers: list[Tier] = []
        self._records: list[StepRecord] = []

    @contextlib.contextmanager
    def span(self, name: str, lane: str, num_bytes: int = 0) -> Iterator[None]:
        """Record what the block takes by the host's clock; also if it raises."""
        start_s = self.now_s()
        try:
            yield
        finally:
            self.add(name, lane, start_s, self.now_s(), num_bytes)

    @contextlib.contextmanager
    def device_span(
        self, name: str, lane: str, num_bytes: int = 0, *, stream: torch.cuda.Stream | None = None
    ) -> Iterator[None]:
        """Record what the block enqueues on a CUDA stream (the current one), as the GPU runs it; never waits."""
        stream = stream or torch.cuda.current_stream()
        self._origin(stream.device)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record(stream)
        try:
            yield
        finally:
            end.record(stream)
            with self._lock:
                self._on_device.append(_DeviceSpan(name, lane, num_bytes, start, end))

    def phase(self, name: str, device: torch.device) -> contextlib.AbstractContextManager[None]:
        """Record a phase of compute, by the clock of the device that computes."""
        return self.device_span(name, COMPUTE) if device.type == "cuda" else self.span(name, COMPUTE)

    def add(self, name: str, lane: str, start_s: float, end_s: float, num_bytes: int = 0) -> None:
        """Record something that has been timed by `now_s`."""
        span = Span(name, lane, start_s, end_s, num_bytes)
        with self._lock:
            self._spans.append(span)
            self._running.spans.append(span)

    def watch(self, *tiers: Tier) -> None:
        """Put what these tiers hold into every record from now on."""
        self._tiers.extend(tiers)

    def step(self) -> StepRecord:
        """End a step and return what it did; on a GPU it waits for phases and stalls.

        What goes on in the background beyond that counts in the step in which it is found to have ended.
        """
        self._resolve(wait=(COMPUTE, STALL))
        end_s = self.now_s()
        with self._lock:
            running = self._running
            self._running = _Running(running.index + 1, end_s)
        record = _record(running, end_s, {tier.spec.name: tier.used_bytes for tier in self._tiers}, memory_peaks())
        self._records.append(record)
        return record

    @property
    def records(self) -> tuple[StepRecord, ...]:
        """The steps so far."""
        return tuple(self._records)

    @property
    def spans(self) -> tuple[Span, ...]:
        """What has been recorded and not yet dropped, in the order in which it ended; waits for a GPU."""
        self._resolve(wait=None)
        with self._lock:
            return tuple(self._spans)

    def chrome(self) -> dict[str, Any]:
        """Return the trace for chrome://tracing or Perfetto: a row a lane, times in microseconds."""
        spans = self.spans
        lanes = [COMPUTE, STALL, *sorted({span.lane for span in spans} - {COMPUTE, STALL})]
        rows = {lane: index for index, lane in enumerate(lanes)}
        process = os.getpid()
        named = [
            {"ph": "M", "pid": process, "tid": row, "name": name, "args": {key: value}}
            for lane, row in rows.items()
            for name, key, value in (("thread_name", "name", lane), ("thread_sort_index", "sort_index", row))
        ]
        events = [
            {
                "ph": "X",
                "pid": process,
                "tid": rows[span.lane],
                "name": span.name,
                "cat": span.lane,
                "ts": (span.start_s - self._started_s) * 1e6,
                "dur": (span.end_s - span.start_s) * 1e6,
                "args": {"bytes": span.num_bytes} if span.num_bytes else {},
            }
            for span in spans
        ]
        return {"traceEvents": named + events, "displayTimeUnit": "ms"}

    def write(self, path: Path) -> None:
        """Write the Chrome trace."""
        path.write_text(json.dumps(self.chrome()))

    def _origin(self, device: torch.device) -> None:
        """Tie the clock of a GPU to ours, once."""
        index = device.index or 0
        if index in self._origins:
            return
        with torch.cuda.device(index):
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()
            event.record()
            torch.cuda.synchronize()
            self._origins[index] = _Origin(event, self.now_s())

    def _resolve(self, *, wait: tuple[str, ...] | None) -> None:
        """Record the spans on a GPU that have ended; wait for those of some lanes, or of all (None)."""
        with self._lock:
            waiting, self._on_device = self._on_device, []
        for span in waiting:
            if wait is None or span.lane in wait:
                span.end.synchronize()
            elif not span.end.query():
                with self._lock:
                    self._on_device.append(span)
                continue
            origin = self._origins[span.start.device.index or 0]
            start_s, end_s = (origin.at_s + origin.event.elapsed_time(event) / 1e3 for event in (span.start, span.end))
            self.add(span.name, span.lane, start_s, end_s, span.num_bytes)


def merged(spans: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the times that any of the (start, end) cover, as intervals that do not touch, first to last."""
    found: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((start, end))
    return found


def shared_s(one: list[tuple[float, float]], other: list[tuple[float, float]]) -> float:
    """Return how long two lists of `merged` intervals overlap."""
    total, here, there = 0.0, 0, 0
    while here < len(one) and there < len(other):
        start, end = max(one[here][0], other[there][0]), min(one[here][1], other[there][1])
        total += max(0.0, end - start)
        if one[here][1] < other[there][1]:
            here += 1
        else:
            there += 1
    return total


def memory_peaks() -> dict[str, int]:
    """Return the peaks of this process; see `StepRecord.peaks`."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    peaks = {"rss_bytes": int(found[1]) << 10 if found else 0}
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        free, total = torch.cuda.mem_get_info()
        peaks |= {"device_allocated_bytes": torch.cuda.max_memory_allocated(), "device_used_bytes": total - free}
    return peaks


def _record(running: _Running, end_s: float, held: Mapping[str, int], peaks: Mapping[str, int]) -> StepRecord:
    lanes: dict[str, list[Span]] = defaultdict(list)
    for span in running.spans:
        lanes[span.lane].append(span)
    covered = {lane: merged((span.start_s, span.end_s) for span in spans) for lane, spans in lanes.items()}
    compute, stall = covered.get(COMPUTE, []), covered.get(STALL, [])
    background = [lane for lane in sorted(lanes) if lane not in (COMPUTE, STALL)]
    busy = {lane: sum(end - start for start, end in covered[lane]) for lane in background}
    return StepRecord(
        index=running.index,
        wall_s=end_s - running.started_s,
        phases_s=_by_name(lanes[COMPUTE]),
        stalls_s=_by_name(lanes[STALL]),
        moved_bytes={lane: moved for lane in background if (moved := sum(span.num_bytes for span in lanes[lane]))},
        busy_s=busy,
        hidden={
            lane: max(0.0, shared_s(covered[lane], compute) - shared_s(covered[lane], stall)) / busy[lane]
            for lane in background
            if busy[lane]
        },
        held_bytes=held,
        peaks=peaks,
    )


def _by_name(spans: Iterable[Span]) -> dict[str, float]:
    totals: dict[str, float] = defaultdict(float)
    for span in spans:
        totals[span.name] += span.end_s - span.start_s
    return dict(totals)
