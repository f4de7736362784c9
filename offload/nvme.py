"""The NVMe tier: blocks in one file, moved past the page cache."""

from __future__ import annotations

import errno
import os
import queue
import secrets
from dataclasses import dataclass
from pathlib import Path

import torch

from offload.errors import TierError, TierFull
from offload.threaded import ThreadedTier
from offload.tier import TierSpec

_SECTOR_BYTES = 4096
"""Direct I/O moves whole sectors between places that start at one, in memory and in the file."""


@dataclass(frozen=True, slots=True)
class Extent:
    """A run of bytes of a file."""

    offset: int
    num_bytes: int


class NvmeTier(ThreadedTier[Extent]):
    """Blocks in one file of `folder`, of which nothing remains when the process ends, however it ends.

    The file grows as blocks are allocated, so that a full disk is met there and not at a write. `num_threads`
    transfers run at once, each with a buffer of `chunk_bytes`; tensors that do not begin and end at a sector
    pass through it. `direct=False` goes through the page cache, for file systems that cannot do otherwise.
    `fsync=True` ends every write with a flush of the device's cache; state that dies with the process does
    not need it. `digests`: see `ThreadedTier`.

    Raises:
        TierError: the file cannot be made there, or the file system refuses direct I/O.
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
    ) -> None:
        file = _open_unnamed(Path(folder), direct, spec.name)
        buffers = [_aligned(-(-chunk_bytes // _SECTOR_BYTES) * _SECTOR_BYTES) for _ in range(num_threads)]
        medium = _File(file, Path(folder), buffers, direct, fsync)
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


class _File:
    """A medium whose places are extents of an open file without a name."""

    granularity_bytes = _SECTOR_BYTES

    def __init__(self, file: int, folder: Path, buffers: list[torch.Tensor], direct: bool, fsync: bool) -> None:
        self._file = file
        self._folder = folder
        self._direct = direct
        self._fsync = fsync
        self._chunk_bytes = buffers[0].numel()
        self._buffers: queue.SimpleQueue[torch.Tensor] = queue.SimpleQueue()
        for buffer in buffers:  # one per thread: taking one never waits
            self._buffers.put(buffer)
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
        buffer = self._buffers.get()
        try:
            for start in range(0, data.numel(), self._chunk_bytes):
                chunk = data[start : start + self._chunk_bytes]
                if self._needs_buffer(chunk):
                    buffer[: chunk.numel()].copy_(chunk)
                    chunk = buffer[: -(-chunk.numel() // _SECTOR_BYTES) * _SECTOR_BYTES]
                _write(self._file, chunk, place.offset + start)
            if self._fsync:
                os.fdatasync(self._file)
        finally:
            self._buffers.put(buffer)

    def load(self, place: Extent, into: torch.Tensor) -> None:
        buffer = self._buffers.get()
        try:
            for start in range(0, into.numel(), self._chunk_bytes):
                chunk = into[start : start + self._chunk_bytes]
                if self._needs_buffer(chunk):
                    _read(self._file, buffer, chunk.numel(), place.offset + start)
                    chunk.copy_(buffer[: chunk.numel()])
                else:
                    _read(self._file, chunk, chunk.numel(), place.offset + start)
        finally:
            self._buffers.put(buffer)

    def view(self, place: Extent, num_bytes: int) -> None:
        """Return None: a disk is not addressed."""

    def close(self) -> None:
        os.close(self._file)

    def _needs_buffer(self, chunk: torch.Tensor) -> bool:
        return self._direct and bool(chunk.data_ptr() % _SECTOR_BYTES or chunk.numel() % _SECTOR_BYTES)


def _open_unnamed(folder: Path, direct: bool, tier_name: str) -> int:
    """Open a new file and take its name away: it ends with its last descriptor, so with the process."""
    path = folder / f".tier-{tier_name}-{secrets.token_hex(8)}"
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | (os.O_DIRECT if direct else 0)
    try:
        return os.open(path, flags, 0o600)
    except OSError as error:
        refused = direct and error.errno == errno.EINVAL
        remedy = "direct I/O is refused here; choose another folder or direct=False" if refused else error.strerror
        raise TierError(f"tier {tier_name}: cannot make a file in {folder}: {remedy}") from error
    finally:
        path.unlink(missing_ok=True)


def _aligned(num_bytes: int) -> torch.Tensor:
    """Return zeros that begin at a sector."""
    buffer = torch.zeros(num_bytes + _SECTOR_BYTES, dtype=torch.uint8)
    start = -buffer.data_ptr() % _SECTOR_BYTES
    return buffer[start : start + num_bytes]


def _write(file: int, data: torch.Tensor, offset: int) -> None:
    view = data.numpy().data
    while view:
        num_written = os.pwrite(file, view, offset)
        view, offset = view[num_written:], offset + num_written


def _read(file: int, into: torch.Tensor, num_bytes: int, offset: int) -> None:
    """Fill `num_bytes` of `into`, asking for whole sectors where there is room for them."""
    view = into.numpy().data[: -(-num_bytes // _SECTOR_BYTES) * _SECTOR_BYTES]
    num_read = 0
    while num_read < num_bytes:
        step = os.preadv(file, [view[num_read:]], offset + num_read)
        if not step:
            raise TierError(f"the file ended {num_bytes - num_read} bytes too early")
        num_read += step
