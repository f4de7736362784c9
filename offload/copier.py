"""Copies between host and device beside compute: on streams of their own with CUDA, at once without."""

from __future__ import annotations

import contextlib
from typing import Any, Protocol

import torch

from offload.tracing import STALL, Trace

UP, DOWN = "cpu to gpu", "gpu to cpu"
"""Lanes of a trace."""

Mark = Any
"""A place in a stream's work that others wait for: a CUDA event, or None where everything is done when it returns."""


class Copier(Protocol):
    """Moves flat bytes. Sources and targets stay unchanged until the mark that a copy returns is reached."""

    def up(self, into: torch.Tensor, source: torch.Tensor, *, after: Mark, name: str) -> Mark:
        """Copy to the device, behind `after`."""
        ...

    def down(self, into: torch.Tensor, source: torch.Tensor, *, name: str) -> Mark:
        """Copy from the device, behind what compute has been asked for so far."""
        ...

    def mark(self) -> Mark:
        """Return a mark behind what compute has been asked for so far."""
        ...

    def wait(self, mark: Mark, *, tier: str) -> None:
        """Let compute wait for a mark, which the trace counts as a stall of the tier."""
        ...

    def finish(self, mark: Mark) -> None:
        """Let the host wait for a mark."""
        ...


class CudaCopier:
    """A stream for each direction."""

    def __init__(self, device: torch.device, trace: Trace | None) -> None:
        self._device, self._trace = device, trace
        self._up = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._down = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def up(self, into: torch.Tensor, source: torch.Tensor, *, after: Mark, name: str) -> Mark:
        """Copy from pinned memory; `into` may be dropped at once."""
        into.record_stream(self._up)
        if after is not None:
            self._up.wait_event(after)
        return self._copy(self._up, into, source, name, UP)

    def down(self, into: torch.Tensor, source: torch.Tensor, *, name: str) -> Mark:
        """Copy to pinned memory; `source` may be dropped at once."""
        self._down.wait_stream(torch.cuda.current_stream(self._device))
        done = self._copy(self._down, into, source, name, DOWN)
        source.record_stream(self._down)
        return done

    def mark(self) -> Mark:
        """Return an event behind compute's work."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def wait(self, mark: Mark, *, tier: str) -> None:
        """Let the current stream wait."""
        if mark is None or mark.query():
            return
        compute = torch.cuda.current_stream(self._device)
        seen = self._trace.device_span(tier, STALL, stream=compute) if self._trace else contextlib.nullcontext()
        with seen:
            compute.wait_event(mark)

    def finish(self, mark: Mark) -> None:
        """Let the host wait."""
        if mark is not None:
            mark.synchronize()

    def _copy(self, stream: torch.cuda.Stream, into: torch.Tensor, source: torch.Tensor, name: str, lane: str) -> Mark:
        seen = self._trace.device_span(name, lane, source.nbytes, stream=stream) if self._trace else None
        with torch.cuda.stream(stream), seen or contextlib.nullcontext():
            into.copy_(source, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(stream)
        return event


class HostCopier:
    """No streams: a copy is done when it returns. For a CPU in the place of a device."""

    def __init__(self, trace: Trace | None) -> None:
        self._trace = trace

    def up(self, into: torch.Tensor, source: torch.Tensor, *, after: Mark, name: str) -> Mark:
        """Copy."""
        self._copy(into, source, name, UP)

    def down(self, into: torch.Tensor, source: torch.Tensor, *, name: str) -> Mark:
        """Copy."""
        self._copy(into, source, name, DOWN)

    def mark(self) -> Mark:
        """Nothing is ever outstanding."""

    def wait(self, mark: Mark, *, tier: str) -> None:
        """Nothing is ever outstanding."""

    def finish(self, mark: Mark) -> None:
        """Nothing is ever outstanding."""

    def _copy(self, into: torch.Tensor, source: torch.Tensor, name: str, lane: str) -> None:
        with self._trace.span(name, lane, source.nbytes) if self._trace else contextlib.nullcontext():
            into.copy_(source)


def indexed(device: torch.device) -> torch.device:
    """Return a device with its index, as tensors on it tell theirs."""
    return torch.empty(0, device=device).device


def copier_for(device: torch.device, trace: Trace | None) -> Copier:
    """Return what copies to and from a device."""
    return CudaCopier(device, trace) if device.type == "cuda" else HostCopier(trace)
