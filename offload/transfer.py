"""Lanes: work that runs in order beside the caller, and host memory that lanes can reach.

On a CUDA device a lane is a stream, and what is enqueued waits for events without the host; elsewhere a lane is a
thread. Both keep one contract, so the optimizer is written once and its tests on a CPU run what runs on a GPU.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch

from offload.errors import TierError, TierFull
from offload.tracing import Trace

TIMEOUT_S = 300.0
"""Longest time that anything here waits for a transfer or an update."""


class Ticket(Protocol):
    """Something enqueued."""

    def wait(self) -> None:
        """Return when it is done on the host's clock; raises what went wrong."""
        ...

    def done(self) -> bool:
        """Whether `wait` would return at once."""
        ...


class Lane(Protocol):
    """Runs work one after the other."""

    name: str
    num_bytes: int
    """What all work so far was said to move."""

    def run(
        self,
        work: Callable[[], None],
        *,
        after: Sequence[Ticket] = (),
        num_bytes: int = 0,
        uses: Sequence[torch.Tensor] = (),
    ) -> Ticket:
        """Enqueue `work`, which starts when the tickets are done.

        `uses` are tensors that the caller drops: their memory is not given out again before the work is done.
        """
        ...


class Lanes(Protocol):
    """The lanes of one device."""

    def lane(self, name: str) -> Lane:
        """Return the lane of a name, made at the first call."""
        ...

    def now(self) -> Ticket:
        """Return a ticket for everything that the caller enqueued on the device so far."""
        ...

    def hold(self, ticket: Ticket) -> None:
        """Let everything that the caller enqueues on the device from now on wait for the ticket."""
        ...

    def close(self) -> None:
        """Wait for all lanes and end them; a second call does nothing."""
        ...


def make_lanes(device: torch.device, *, bytes_per_s: float | None = None, trace: Trace | None = None) -> Lanes:
    """Return lanes for a device; `bytes_per_s` slows each lane of a CPU down to it, to emulate a link.

    A trace gets what each does, under its name.
    """
    if device.type == "cuda":
        return CudaLanes(device, trace)
    return ThreadLanes(bytes_per_s, trace)


@dataclass(frozen=True, slots=True)
class _EventTicket:
    event: torch.cuda.Event

    def wait(self) -> None:
        self.event.synchronize()

    def done(self) -> bool:
        return bool(self.event.query())  # type: ignore[no-untyped-call]


class _CudaLane:
    """A stream. Work of a lane with a lane to `pass_first` comes behind what that one can do when it is enqueued."""

    def __init__(self, name: str, device: torch.device, trace: Trace | None, pass_first: _CudaLane | None) -> None:
        self.name = name
        self.num_bytes = 0
        self._trace, self._pass_first = trace, pass_first
        self._lock = threading.Lock()
        self._under_way: deque[tuple[Sequence[Ticket], Ticket]] = deque()
        """What is not known to have ended: what it waits for, and its own ticket."""
        with torch.cuda.device(device):
            # Small beside the model's kernels, and somebody waits for them.
            self.stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]

    def run(
        self,
        work: Callable[[], None],
        *,
        after: Sequence[Ticket] = (),
        num_bytes: int = 0,
        uses: Sequence[torch.Tensor] = (),
    ) -> Ticket:
        self.num_bytes += num_bytes
        passing = None if self._pass_first is None else self._pass_first.ready()
        with torch.cuda.stream(self.stream):
            for ticket in after if passing is None else (*after, passing):
                _hold(self.stream, ticket)
            seen = self._trace.device_span(self.name, self.name, num_bytes) if self._trace else None
            with seen or contextlib.nullcontext():
                work()
        for tensor in uses:
            tensor.record_stream(self.stream)
        ticket = _record(self.stream)
        with self._lock:
            while self._under_way and self._under_way[0][1].done():
                self._under_way.popleft()
            self._under_way.append((after, ticket))
        return ticket

    def ready(self) -> Ticket | None:
        """Return the ticket of the last work that need not wait for anything; None: there is none."""
        found = None
        with self._lock:
            while self._under_way and all(ticket.done() for ticket in self._under_way[0][0]):
                found = self._under_way.popleft()[1]
        return found


_PASSED_BY = {"states up": "parameters up", "states down": "gradients down"}
"""Lanes that are full for long, and lanes of small copies in the same direction.

A copy engine serves one stream until nothing of it is ready. The small copies would wait for all states (on an H200
0.26 s), and whoever waits for them, too.
"""


class CudaLanes:
    """Lanes that are streams of one CUDA device."""

    def __init__(self, device: torch.device, trace: Trace | None = None) -> None:
        self._device, self._trace = device, trace
        self._lanes: dict[str, _CudaLane] = {}
        self._lock = threading.Lock()

    def lane(self, name: str) -> _CudaLane:
        """Return the lane of a name, made at the first call."""
        first = self.lane(_PASSED_BY[name]) if name in _PASSED_BY else None
        with self._lock:
            if name not in self._lanes:
                self._lanes[name] = _CudaLane(name, self._device, self._trace, first)
            return self._lanes[name]

    def now(self) -> Ticket:
        """Return a ticket for everything on the caller's current stream."""
        return _record(torch.cuda.current_stream(self._device))

    def hold(self, ticket: Ticket) -> None:
        """Let the caller's current stream wait for the ticket, without the host."""
        _hold(torch.cuda.current_stream(self._device), ticket)

    def close(self) -> None:
        """Wait for all lanes."""
        for lane in self._lanes.values():
            lane.stream.synchronize()


def _record(stream: torch.cuda.Stream) -> _EventTicket:
    # Blocking: a thread that waits sleeps, and leaves its core to the optimizer.
    event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    event.record(stream)
    return _EventTicket(event)


def _hold(stream: torch.cuda.Stream, ticket: Ticket) -> None:
    if isinstance(ticket, _EventTicket):
        stream.wait_event(ticket.event)
    else:
        ticket.wait()


@dataclass(frozen=True, slots=True)
class FutureTicket:
    """A ticket for what a thread does."""

    future: Future[Any]
    what: str

    def wait(self) -> None:
        """Return when the thread is done with it; raises what went wrong."""
        try:
            self.future.result(TIMEOUT_S)
        except FutureTimeout as error:
            if self.future.done():
                raise
            raise TierError(f"{self.what} did not end in {TIMEOUT_S} s") from error

    def done(self) -> bool:
        """Whether `wait` would return at once."""
        return self.future.done()


def finished() -> Ticket:
    """Return a ticket for nothing."""
    future: Future[None] = Future()
    future.set_result(None)
    return FutureTicket(future, "nothing")


class _ThreadLane:
    def __init__(self, name: str, bytes_per_s: float | None, trace: Trace | None) -> None:
        self.name = name
        self.num_bytes = 0
        self._bytes_per_s, self._trace = bytes_per_s, trace
        self.pool = ThreadPoolExecutor(1, thread_name_prefix=f"lane-{name}")

    def run(
        self,
        work: Callable[[], None],
        *,
        after: Sequence[Ticket] = (),
        num_bytes: int = 0,
        uses: Sequence[torch.Tensor] = (),
    ) -> Ticket:
        self.num_bytes += num_bytes

        def run() -> None:
            for ticket in after:
                ticket.wait()
            start_s = time.perf_counter()
            seen = self._trace.span(self.name, self.name, num_bytes) if self._trace else contextlib.nullcontext()
            with seen, torch.no_grad():
                work()
                if self._bytes_per_s and num_bytes:
                    time.sleep(max(0.0, start_s + num_bytes / self._bytes_per_s - time.perf_counter()))

        return FutureTicket(self.pool.submit(run), f"lane {self.name}: {num_bytes} bytes")


class ThreadLanes:
    """Lanes that are threads; with `bytes_per_s` each moves no faster than that."""

    def __init__(self, bytes_per_s: float | None = None, trace: Trace | None = None) -> None:
        self._bytes_per_s, self._trace = bytes_per_s, trace
        self._lanes: dict[str, _ThreadLane] = {}
        self._lock = threading.Lock()

    def lane(self, name: str) -> Lane:
        """Return the lane of a name, made at the first call."""
        with self._lock:
            if name not in self._lanes:
                self._lanes[name] = _ThreadLane(name, self._bytes_per_s, self._trace)
            return self._lanes[name]

    def now(self) -> Ticket:
        """Return a ticket for nothing: a CPU has done what the caller asked it."""
        return finished()

    def hold(self, ticket: Ticket) -> None:
        """Wait for the ticket."""
        ticket.wait()

    def close(self) -> None:
        """Wait for all lanes and end their threads."""
        for lane in self._lanes.values():
            lane.pool.shutdown()


class HostMemory:
    """Host memory in huge pages where the system has them, pinned where a CUDA device is to reach it.

    At most `limit_bytes` at once. A context manager; `close` unpins. The tensors stay valid after it, as ordinary
    memory.
    """

    def __init__(self, *, pinned: bool, limit_bytes: int | None = None) -> None:
        self._pinned = pinned
        self._limit_bytes = limit_bytes
        self._regions: list[torch.Tensor] = []
        """What is pinned; kept, for memory that is pinned must not go."""
        self.num_bytes = 0
        """Bytes given out."""

    def empty(self, count: int, dtype: torch.dtype, *, pinned: bool | None = None) -> torch.Tensor:
        """Return a flat tensor of zeros that begins at a page. Raises `TierFull` beyond the limit."""
        num_bytes = max(1, count * dtype.itemsize)
        if self._limit_bytes is not None and self.num_bytes + num_bytes > self._limit_bytes:
            raise TierFull(
                f"host memory: no room for {num_bytes} bytes: {self.num_bytes} of {self._limit_bytes} are taken; "
                f"give it {self.num_bytes + num_bytes - self._limit_bytes} more"
            )
        memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        tensor = torch.frombuffer(memory, dtype=torch.uint8)[: count * dtype.itemsize].view(dtype)
        tensor.zero_()  # touches the pages, with all of torch's threads
        if self._pinned if pinned is None else pinned:
            self.pin(tensor)
        self.num_bytes += num_bytes
        return tensor

    def pin(self, tensor: torch.Tensor) -> None:
        """Pin memory that begins at a page until `close`; nothing to do where nobody asked for pinned memory."""
        if not self._pinned or not tensor.numel():
            return
        code = int(torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0))  # type: ignore[no-untyped-call]
        if code:
            raise TierError(
                f"host memory: {tensor.nbytes} bytes cannot be pinned (CUDA error {code}); raise the limit of locked "
                "memory (ulimit -l) or lower what is streamed"
            )
        self._regions.append(tensor)

    @property
    def pinned_bytes(self) -> int:
        """Bytes that are pinned now."""
        return sum(tensor.nbytes for tensor in self._regions)

    def close(self) -> None:
        """Unpin everything; a second call does nothing."""
        while self._regions:
            torch.cuda.cudart().cudaHostUnregister(self._regions.pop().data_ptr())  # type: ignore[no-untyped-call]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Ring:
    """A few buffers that are used in turn, each free again when its last ticket is done."""

    def __init__(self, buffers: Sequence[Any]) -> None:
        self._buffers = list(buffers)
        self._tickets: list[Ticket] = [finished() for _ in buffers]
        self._next = 0

    def take(self) -> tuple[int, Any]:
        """Return the next buffer and its index; waits until it is free."""
        index = self._next
        self._tickets[index].wait()
        self._next = (index + 1) % len(self._buffers)
        return index, self._buffers[index]

    def give(self, index: int, ticket: Ticket) -> None:
        """Say when the buffer is free."""
        self._tickets[index] = ticket

    def __len__(self) -> int:
        return len(self._buffers)
