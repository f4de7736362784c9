"""When a device did what, on the host's clock, without waiting for the device.

Events are recorded on the stream that a collective is issued from and read when they are over. What is between two
events the device knows to a microsecond; where that is on the host's clock is found by an anchor: an event on a stream
of its own, which is over at once, recorded between two readings of the host's clock.
"""

from __future__ import annotations

import ctypes
import os
import time
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

_RELAXED = 2
"""cudaStreamCaptureModeRelaxed."""
_ANCHOR_EVERY_NS = 10_000_000_000
"""Elapsed times are fp32 milliseconds: over 10 s they are good to a microsecond."""
_ANCHOR_TRIES = 5
_ANCHOR_WAIT_NS = 1_000_000
_FIRST, _POOLED = 512, 4096
"""Events that are made at once, and that are kept."""


def is_capturing() -> bool:
    """Whether the current stream's work goes into a CUDA graph instead of to the device."""
    return torch.cuda.is_current_stream_capturing()


def leave_captures_alone() -> bool:
    """Let this thread ask for events while another thread captures a graph; return whether the runtime let it.

    Without it a query of this thread would end a capture that is global to the process, with an error.
    """
    major = (torch.version.cuda or "").partition(".")[0]
    try:  # the one that torch has loaded, and no other
        runtime = ctypes.CDLL(f"libcudart.so.{major}", mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
        exchange = runtime.cudaThreadExchangeStreamCaptureMode
    except (OSError, AttributeError):
        return False
    mode = ctypes.c_int(_RELAXED)
    return int(exchange(ctypes.byref(mode))) == 0


class Span(NamedTuple):
    """An operation of a device on the host's clock."""

    begin_ns: int
    end_ns: int


@dataclass(slots=True)
class _Anchor:
    event: Any
    host_ns: int


class DeviceClock:
    """Times of one device's events on the host's clock. `stamp` is for any thread, the rest for one."""

    def __init__(self, index: int) -> None:
        self._index = index
        self._device = torch.device("cuda", index)
        self._stream: Any = None
        self._anchor: _Anchor | None = None
        self._free: list[Any] = []
        self._streams: dict[tuple[int, int, int], Any] = {}
        self._last_end: dict[object, int] = {}
        for _ in range(_FIRST):  # made before they are needed: to make one takes longer than to record it
            event = _event()
            event.record(torch.cuda.current_stream(self._device))
            self._free.append(event)

    def stamp(self) -> tuple[Any, object]:
        """Return an event of a pool, recorded on the device's current stream, and what names that stream."""
        key = torch._C._cuda_getCurrentStream(self._index)
        stream = self._streams.get(key)
        if stream is None:
            stream = self._streams[key] = torch.cuda.current_stream(self._device)
        try:
            event = self._free.pop()
        except IndexError:
            event = _event()
        event.record(stream)
        return event, key

    def release(self, event: Any) -> None:
        """Take an event back."""
        if len(self._free) < _POOLED:
            self._free.append(event)

    def between(self, ready: Any, passed: Any) -> Span | None:
        """Return when the device came from one event to the other, both over; None before there is an anchor."""
        anchor = self._anchored()
        if anchor is None:
            return None
        end_ns = anchor.host_ns + round(anchor.event.elapsed_time(passed) * 1e6)
        return Span(end_ns - round(ready.elapsed_time(passed) * 1e6), end_ns)

    def span(self, channel: object, ready: Any, duration_ns: int) -> Span | None:
        """Return when an operation ran whose input was ready at `ready`; None before there is an anchor.

        Operations of a channel run one after the other: it began when its input was ready and the one before was over.
        """
        anchor = self._anchored()
        if anchor is None:
            return None
        ready_ns = anchor.host_ns + round(anchor.event.elapsed_time(ready) * 1e6)
        begin_ns = max(ready_ns, self._last_end.get(channel, 0))
        self._last_end[channel] = begin_ns + duration_ns
        return Span(begin_ns, begin_ns + duration_ns)

    def _anchored(self) -> _Anchor | None:
        now = time.monotonic_ns()
        if self._anchor is None or now - self._anchor.host_ns > _ANCHOR_EVERY_NS:
            self._anchor = self._drop_anchor() or self._anchor
        return self._anchor

    def _drop_anchor(self) -> _Anchor | None:
        """Record events between two readings of the clock, and take the one whose readings are closest."""
        if self._stream is None:
            self._stream = _stream(self._device)
        best: tuple[int, _Anchor] | None = None
        for _ in range(_ANCHOR_TRIES):
            event = _event()
            before = time.monotonic_ns()
            event.record(self._stream)
            while not event.query():
                if time.monotonic_ns() - before > _ANCHOR_WAIT_NS:
                    break
            else:
                width = time.monotonic_ns() - before
                if best is None or width < best[0]:
                    best = (width, _Anchor(event, before + width // 2))
        return None if best is None else best[1]


def _event() -> Any:
    make: Any = torch.cuda.Event  # published without types
    return make(enable_timing=True)


def _stream(device: torch.device) -> Any:
    make: Any = torch.cuda.Stream
    return make(device, priority=-1)
