"""The bytes of a checkpoint's chunks on their way from storage into tensors: read in several threads, each verified."""

from __future__ import annotations

import contextlib
import logging
import mmap
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from checkpoint.errors import CorruptCheckpoint
from checkpoint.format import CHUNK_BYTES, digest
from checkpoint.manifest import SavedSlice
from checkpoint.reshard import Read
from checkpoint.storage import CachedSource, MirroredSource, Source

Bytes = np.ndarray[Any, np.dtype[np.uint8]]

_log = logging.getLogger(__name__)
_ALIGN_BYTES = 4096
_HUGE_BYTES = 2 << 20
"""Memory from this size on is in large pages."""
_MAX_OPEN = 256
"""Files open at once, where there are more."""


class Files(Protocol):
    """The files of a checkpoint, by the name that rows have for them."""

    def open(self, file: str) -> contextlib.AbstractContextManager[Source]:
        """Open a file for reading, its size checked."""

    def fault(self, row: SavedSlice, start: int, stop: int, what: str) -> CorruptCheckpoint:
        """Return the error that says what is wrong with bytes [start, stop) of a row's file."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Whole chunks of a slice: what is verified."""

    row: SavedSlice
    first: int
    last: int
    start: int
    """First byte, in the file."""
    stop: int


@dataclass(slots=True)
class Block:
    """Neighbouring segments of one file: what is read at once."""

    file: str
    start: int
    stop: int
    place: int
    """Where its bytes go in the window's memory."""
    segments: list[Segment] = field(default_factory=list)


@dataclass(slots=True)
class Window:
    """What is in memory at once: reads, where each one's bytes lie, and the blocks that bring them."""

    reads: list[Read] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    nbytes: int = 0

    def each(self, memory: Bytes, consume: Callable[[Read, Bytes], None]) -> None:
        """Hand each read its bytes."""
        for read, place in zip(self.reads, self.places, strict=True):
            consume(read, memory[place : place + read.nbytes])


def windows(reads: Iterable[Read], capacity: int) -> Iterator[Window]:
    """Yield the reads in file order, in windows of at most `capacity` bytes, or of one read. Pure.

    A chunk that several reads need is in a window once.
    """
    window = Window()
    last: Read | None = None
    place = stop = 0  # where the bytes of `last` begin in memory, and where the bytes known of its file end
    for read in sorted(reads, key=lambda r: (r.file, r.byte_start, r.byte_stop)):
        joined = last is not None and _joins(last, read, stop)
        fresh = max(0, read.byte_stop - stop) if joined else read.nbytes
        if window.reads and window.nbytes + fresh > capacity:
            yield window
            window, joined, fresh = Window(), False, read.nbytes
        if joined and last is not None:
            place += read.byte_start - last.byte_start
        else:
            # As aligned in memory as in the file: tensors are aligned to their elements there, and disks want pages.
            window.nbytes += (read.byte_start - window.nbytes) % _ALIGN_BYTES
            place, stop = window.nbytes, read.byte_start
        _extend(window, read, stop, joined)
        window.reads.append(read)
        window.places.append(place)
        window.nbytes += fresh
        stop, last = max(stop, read.byte_stop), read
    if window.reads:
        yield window


def _joins(last: Read, read: Read, stop: int) -> bool:
    """Whether a read begins where what is known of its file ends, or inside it as another read of the same slice."""
    if read.file != last.file:
        return False
    same = (read.row.byte_start, read.row.digests) == (last.row.byte_start, last.row.digests)
    return read.byte_start == stop or (read.byte_start < stop and same)


def _extend(window: Window, read: Read, start: int, joined: bool) -> None:
    """Add what a read has behind byte `start` of its file to the blocks of a window."""
    if read.byte_stop <= start:
        return
    first = read.first + (start - read.byte_start) // read.row.chunk_bytes
    segment = Segment(read.row, first, read.last, start, read.byte_stop)
    block = window.blocks[-1] if window.blocks else None
    if block is None or not joined or block.stop != start or segment.stop - block.start > CHUNK_BYTES:
        block = Block(read.file, start, start, window.nbytes)
        window.blocks.append(block)
    block.segments.append(segment)
    block.stop = segment.stop


@dataclass(slots=True)
class _Open:
    """An open file."""

    source: Source
    stack: contextlib.ExitStack
    """Closes it."""
    users: int = 0
    """Threads that read it now."""


class Transfer:
    """Reads blocks of one checkpoint's files in several threads, and verifies them. A context manager.

    Files stay open until the end, the last _MAX_OPEN of them: what retention removes meanwhile can still be read
    where the storage keeps open files alive.
    """

    def __init__(self, files: Files, num_threads: int, *, once: bool = False) -> None:
        """`once` says that nothing is read twice: the kernel need not keep it."""
        self._files = files
        self._once = once
        self._num_threads = num_threads
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="checkpoint-read")
        self._open: dict[str, _Open] = {}
        self._closed = False
        self._lock = threading.Lock()
        self.read_bytes = 0
        """Bytes asked of the storage so far."""

    def __enter__(self) -> Transfer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the threads and close the files. Idempotent."""
        self._closed = True
        self._pool.shutdown(cancel_futures=True)
        while self._open:
            self._open.popitem()[1].stack.close()

    def fetch(self, window: Window, memory: Bytes) -> Iterator[CorruptCheckpoint]:
        """Bring a window into memory, its blocks in parallel; yield what is wrong with it."""
        for faults in self._each(lambda block: self._read(block, memory), window.blocks):
            yield from faults

    def stream(
        self, found: Iterable[Window], consume: Callable[[Read, Bytes], None] | None
    ) -> Iterator[CorruptCheckpoint]:
        """Bring one window after the other into memory, several at a time; yield what is wrong with them.

        What is sound goes to `consume`, in any thread; its bytes are there during the call.
        """
        spare: queue.SimpleQueue[Bytes] = queue.SimpleQueue()
        for _ in range(self._num_threads):
            spare.put(allocate(CHUNK_BYTES))

        def run(window: Window) -> list[CorruptCheckpoint]:
            memory = spare.get()
            try:
                whole = memory if window.nbytes <= len(memory) else allocate(window.nbytes)
                faults = [fault for block in window.blocks for fault in self._read(block, whole)]
                if consume is not None and not faults:
                    window.each(whole, consume)
                return faults
            finally:
                spare.put(memory)

        for faults in self._each(run, found):
            yield from faults

    def hand_out(self, window: Window, memory: Bytes, consume: Callable[[Read, Bytes], None]) -> None:
        """Hand each read of a window in memory its bytes, several at a time, in any thread."""

        def run(item: tuple[Read, int]) -> list[CorruptCheckpoint]:
            read, place = item
            consume(read, memory[place : place + read.nbytes])
            return []

        for _ in self._each(run, zip(window.reads, window.places, strict=True)):
            pass

    def _each(
        self, run: Callable[[Any], list[CorruptCheckpoint]], items: Iterable[Any]
    ) -> Iterator[list[CorruptCheckpoint]]:
        """Yield `run(item)` in the order of the items; some more of them than there are threads are under way."""
        if self._closed:
            raise ValueError("the checkpoint that this reads from is closed")
        waiting = iter(items)
        running: list[Future[list[CorruptCheckpoint]]] = []
        try:
            for item in waiting:
                running.append(self._pool.submit(run, item))
                if len(running) > 2 * self._num_threads:
                    yield running.pop(0).result()
            while running:
                yield running.pop(0).result()
        finally:
            for future in running:
                future.cancel()
            for future in running:
                with contextlib.suppress(BaseException):  # what came first is told
                    future.result()

    def _read(self, block: Block, memory: Bytes) -> list[CorruptCheckpoint]:
        """Read and verify a block; return a fault for each chunk that is not what was saved."""
        data = memory[block.place : block.place + block.stop - block.start]
        with self._opened(block.file) as source:
            count = source.read_into(block.start, data.data)
            with self._lock:
                self.read_bytes += len(data)
            return [
                self._files.fault(segment.row, start, stop, what)
                for segment in block.segments
                for start, stop, what in _wrong(segment, data, block.start, count)
                if not self._mends(source, segment, start, data[start - block.start : stop - block.start])
            ]

    def _mends(self, source: Source, segment: Segment, start: int, data: Bytes) -> bool:
        """Whether another copy of the file has a chunk sound; it is in `data` then."""
        expected = segment.row.digests[segment.first + (start - segment.start) // segment.row.chunk_bytes]
        for copy in source.copies() if isinstance(source, MirroredSource) else ():
            if copy.read_into(start, data.data) == len(data) and digest(data) == expected:
                _log.warning("%s: a copy is damaged, another one is read", segment.row.file)
                return True
        return False

    @contextlib.contextmanager
    def _opened(self, file: str) -> Iterator[Source]:
        with self._lock:
            found = self._open.get(file)
            if found is None:
                stack = contextlib.ExitStack()
                source = stack.enter_context(self._files.open(file))
                found = self._open[file] = _Open(source, stack)
                if self._once and isinstance(source, CachedSource):
                    source.pass_cache()
            found.users += 1
        try:
            yield found.source
        finally:
            with self._lock:
                found.users -= 1
                idle = (name for name, other in self._open.items() if not other.users)
                oldest = next(idle, None) if len(self._open) > _MAX_OPEN else None
                if oldest is not None:
                    self._open.pop(oldest).stack.close()


def _wrong(segment: Segment, data: Bytes, begin: int, count: int) -> Iterator[tuple[int, int, str]]:
    """Yield which chunks, as [start, stop) in the file, are wrong and why; `data` has its bytes from `begin`."""
    size = segment.row.chunk_bytes
    starts = range(segment.start, segment.stop, size)
    for start, expected in zip(starts, segment.row.digests[segment.first : segment.last], strict=True):
        stop = min(start + size, segment.stop)
        if stop - begin > count:
            yield start, stop, "the file ends too early"
        elif digest(data[start - begin : stop - begin]) != expected:
            yield start, stop, "the digest does not match"


def allocate(nbytes: int) -> Bytes:
    """Return fresh memory, in large pages where the system has them: a tenth of the time to touch it first."""
    if nbytes < _HUGE_BYTES:
        return np.empty(nbytes, dtype=np.uint8)
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, dtype=np.uint8)
