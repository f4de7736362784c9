"""The NVMe tier: blocks in one file, moved past the page cache."""

from __future__ import annotations

import contextlib
import errno
import os
import queue
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from offload import movers
from offload.errors import TierError, TierFull
from offload.movers import SECTOR_BYTES, IoName, Mover
from offload.threaded import ThreadedTier
from offload.tier import TierSpec


@dataclass(frozen=True, slots=True)
class Extent:
    """A run of bytes of a file."""

    offset: int
    num_bytes: int


class NvmeTier(ThreadedTier[Extent]):
    """Blocks in one file of `folder`, of which nothing remains when the process ends, however it ends.

    The file grows as blocks are allocated, so that a full disk is met there and not at a write. `io` says what moves
    the bytes (`offload.movers`); the attribute of that name says what `auto` became. `num_threads` transfers run at
    once, each with a buffer of `chunk_bytes`; tensors that do not begin and end at a sector pass through it.
    `direct=False` goes through the page cache, for file systems that cannot do otherwise; `aio` never does.
    `fsync=True` ends every write with a flush of the device's cache; state that dies with the process does
    not need it. `digests`: see `ThreadedTier`.

    Raises:
        TierError: the file cannot be made there, the file system refuses direct I/O, or `io` does not run here.
    """

    def __init__(
        self,
        spec: TierSpec,
        folder: str | os.PathLike[str],
        *,
        num_threads: int = 4,
        chunk_bytes: int = 8 << 20,
        direct: bool = True,
        fsync: bool = False,
        digests: bool = True,
        io: IoName = "auto",
    ) -> None:
        if io == "aio" and not direct:
            raise TierError("direct: False; io='aio' is always direct: choose io='threads' or 'io_uring'")
        chunk_bytes = _sectors(chunk_bytes)
        self.io: IoName
        self.io, made = movers.make_movers(io, num_threads)
        with contextlib.ExitStack() as stack:
            for mover in made:
                stack.callback(mover.close)
            workers = [_Worker(mover, _aligned(chunk_bytes)) for mover in made]
            file = _open_unnamed(Path(folder), direct, spec.name)
            stack.pop_all()
        medium = _File(file, Path(folder), workers, direct, fsync)
        super().__init__(spec, medium, num_threads=num_threads, digests=digests)


class Extents:
    """Which parts of a file are free."""

    def __init__(self) -> None:
        self._free: list[Extent] = []  # no two of them touch
        self.end = 0
        """Bytes of the file that were ever given out."""

    def take(self, num_bytes: int) -> Extent | None:
        """Return a part of the smallest free run that is large enough, or None."""
        fits = [extent for extent in self._free if extent.num_bytes >= num_bytes]
        if not fits:
            return None
        best = min(fits, key=lambda extent: extent.num_bytes)
        self._free.remove(best)
        if best.num_bytes > num_bytes:
            self._free.append(Extent(best.offset + num_bytes, best.num_bytes - num_bytes))
        return Extent(best.offset, num_bytes)

    def grow(self, num_bytes: int) -> Extent:
        """Return a run at the end of the file, which becomes longer."""
        self.end += num_bytes
        return Extent(self.end - num_bytes, num_bytes)

    def give(self, extent: Extent) -> None:
        """Take a run back, joined to the free runs that it touches."""
        start, stop = extent.offset, extent.offset + extent.num_bytes
        for other in list(self._free):
            if other.offset + other.num_bytes == start or other.offset == stop:
                self._free.remove(other)
                start = min(start, other.offset)
                stop = max(stop, other.offset + other.num_bytes)
        self._free.append(Extent(start, stop - start))


@dataclass(frozen=True, slots=True)
class _Worker:
    """What one transfer needs."""

    mover: Mover
    buffer: torch.Tensor


class _File:
    """A medium whose places are extents of an open file without a name."""

    granularity_bytes = SECTOR_BYTES

    def __init__(self, file: int, folder: Path, workers: list[_Worker], direct: bool, fsync: bool) -> None:
        self._file = file
        self._folder = folder
        self._direct = direct
        self._fsync = fsync
        self._all = workers
        self._workers: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in workers:  # one per thread: taking one never waits
            self._workers.put(worker)
        self._extents = Extents()

    def reserve(self, num_bytes: int) -> Extent:
        extent = self._extents.take(num_bytes)
        if extent is not None:
            return extent
        try:
            os.posix_fallocate(self._file, self._extents.end, num_bytes)
        except OSError as error:
            raise TierFull(
                f"{self._folder} has no room for {num_bytes} bytes more: {error.strerror}; "
                "free some of the disk or lower the tier's capacity"
            ) from error
        return self._extents.grow(num_bytes)

    def release(self, place: Extent) -> None:
        self._extents.give(place)

    def store(self, place: Extent, data: torch.Tensor) -> None:
        with self._worker() as worker:
            for chunk, start in self._chunks(data, worker):
                if self._needs_buffer(chunk):
                    worker.buffer[: chunk.numel()].copy_(chunk)
                    chunk = worker.buffer[: _sectors(chunk.numel())]
                worker.mover.write(self._file, chunk, place.offset + start)
            if self._fsync:
                os.fdatasync(self._file)

    def load(self, place: Extent, into: torch.Tensor) -> None:
        with self._worker() as worker:
            for chunk, start in self._chunks(into, worker):
                if self._needs_buffer(chunk):
                    worker.mover.read(self._file, worker.buffer[: _sectors(chunk.numel())], place.offset + start)
                    chunk.copy_(worker.buffer[: chunk.numel()])
                else:
                    worker.mover.read(self._file, chunk, place.offset + start)

    def view(self, place: Extent, num_bytes: int) -> None:
        """Return None: a disk is not addressed."""

    def close(self) -> None:
        for worker in self._all:
            worker.mover.close()
        os.close(self._file)

    @contextlib.contextmanager
    def _worker(self) -> Iterator[_Worker]:
        worker = self._workers.get()
        try:
            yield worker
        finally:
            self._workers.put(worker)

    def _chunks(self, data: torch.Tensor, worker: _Worker) -> Iterator[tuple[torch.Tensor, int]]:
        """Yield what needs no buffer in one piece, as a mover likes it, the rest in pieces that fit the buffer."""
        whole = data.numel() if not self._direct else data.numel() // SECTOR_BYTES * SECTOR_BYTES
        if whole and not self._needs_buffer(data[:whole]):
            yield data[:whole], 0
        else:
            whole = 0
        size = worker.buffer.numel()
        for start in range(whole, data.numel(), size):
            yield data[start : start + size], start

    def _needs_buffer(self, chunk: torch.Tensor) -> bool:
        return self._direct and bool(chunk.data_ptr() % SECTOR_BYTES or chunk.numel() % SECTOR_BYTES)


def _sectors(num_bytes: int) -> int:
    """Return the bytes of the sectors that so many bytes take."""
    return -(-num_bytes // SECTOR_BYTES) * SECTOR_BYTES


def _open_unnamed(folder: Path, direct: bool, tier_name: str) -> int:
    """Open a new file without a name: it ends with its last descriptor, so with the process."""
    flags = os.O_RDWR | os.O_CLOEXEC | (os.O_DIRECT if direct else 0)
    try:
        try:
            return os.open(folder, flags | os.O_TMPFILE, 0o600)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR):
                raise
        return _open_and_unlink(folder / f".tier-{tier_name}-{secrets.token_hex(8)}", flags)
    except OSError as error:
        refused = direct and error.errno == errno.EINVAL
        remedy = "direct I/O is refused here; choose another folder or direct=False" if refused else error.strerror
        raise TierError(f"tier {tier_name}: cannot make a file in {folder}: {remedy}") from error


def _open_and_unlink(path: Path, flags: int) -> int:
    """Open a new file and take its name away, where file systems have none without: a kill in between leaves it."""
    try:
        return os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
    finally:
        path.unlink(missing_ok=True)


def _aligned(num_bytes: int) -> torch.Tensor:
    """Return zeros that begin at a sector."""
    buffer = torch.zeros(num_bytes + SECTOR_BYTES, dtype=torch.uint8)
    start = -buffer.data_ptr() % SECTOR_BYTES
    return buffer[start : start + num_bytes]
