"""What happened when, in one save: spans of any thread or process, as a Chrome trace."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Span:
    """One thing that one thread did."""

    name: str
    begin_s: float
    """By `time.monotonic`, which the processes of a host share."""
    end_s: float
    thread: str
    process: int
    nbytes: int
    """Bytes it was about; 0 where there are none."""


class Trace:
    """Spans of one save. Threads add to it at once."""

    def __init__(self) -> None:
        self._spans: list[Span] = []

    @property
    def spans(self) -> list[Span]:
        """Return what was recorded so far."""
        return list(self._spans)

    def add(self, span: Span) -> None:
        """Record a span that was measured elsewhere."""
        self._spans.append(span)

    @contextmanager
    def span(self, name: str, nbytes: int = 0) -> Iterator[None]:
        """Record what the block does, under this thread's name, whether or not it raises."""
        begin_s = time.monotonic()
        try:
            yield
        finally:
            self.add_since(name, begin_s, nbytes)

    def add_since(self, name: str, begin_s: float, nbytes: int = 0) -> None:
        """Record that this thread did something from `begin_s` until now."""
        self.add(Span(name, begin_s, time.monotonic(), threading.current_thread().name, os.getpid(), nbytes))

    def seconds(self, name: str) -> float:
        """Return the summed length of all spans of a name; threads that overlap count each."""
        return sum(s.end_s - s.begin_s for s in self.spans if s.name == name)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the spans as complete events of the Chrome trace format; `chrome://tracing` and Perfetto show it."""
        spans = self.spans
        threads = {key: i for i, key in enumerate(dict.fromkeys((s.process, s.thread) for s in spans))}
        first_s = min((s.begin_s for s in spans), default=0.0)
        events: list[dict[str, object]] = [
            {"ph": "M", "name": "thread_name", "pid": process, "tid": tid, "args": {"name": thread}}
            for (process, thread), tid in threads.items()
        ]
        events += [
            {
                "ph": "X",
                "name": s.name,
                "cat": "checkpoint",
                "ts": (s.begin_s - first_s) * 1e6,
                "dur": (s.end_s - s.begin_s) * 1e6,
                "pid": s.process,
                "tid": threads[s.process, s.thread],
                "args": {"nbytes": s.nbytes},
            }
            for s in spans
        ]
        Path(path).write_text(json.dumps({"traceEvents": events}))
