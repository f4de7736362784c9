"""How bytes get between memory and an open file: blocking calls, io_uring, or DeepSpeed's asynchronous I/O handle.

`threads` moves a piece at a time in each of the tier's threads, `io_uring` and `aio` many. `auto` is io_uring where the
kernel allows it, else threads; `aio` is never chosen by itself: it takes minutes to build at its first use, needs
libaio, and tells of no failed write, which only the digests of the blocks see then.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
from typing import Any, Literal, Protocol

import torch

from offload import building
from offload.errors import KernelError, TierError

IoName = Literal["auto", "threads", "io_uring", "aio"]
"""What moves bytes between memory and a file."""
SECTOR_BYTES = 4096
"""Direct I/O moves whole sectors between places that start at one, in memory and in the file."""
_PIECE_BYTES = 1 << 20
_RING_DEPTH = 4
"""Pieces of one transfer in flight: of four transfers at once 16 MiB, which keep a disk busy that has 100 us of latency
and 160 GB/s. With 32 of each, reads and writes at once got less of a disk (`offload.bench.disk`)."""
_AIO_DEPTH = 32
_ENDED_EARLY = -1
_NOT_ALLOWED = (
    "this kernel allows no ring here: allow one (kernel.io_uring_disabled, a container's seccomp profile, Linux 5.6)"
)
_NO_ROOM = {
    errno.EMFILE: "a ring is a descriptor, and the process has as many as it may: raise ulimit -n",
    errno.ENFILE: "a ring is a descriptor, and the machine has as many as it may: raise fs.file-max",
    errno.ENOMEM: "a ring is memory that stays, and there is no more of it: raise ulimit -l",
}
"""What to do where a kernel that allows rings has no room for one more, by errno."""


class Mover(Protocol):
    """Moves bytes at places that a sector begins at, in whole sectors where the file is direct.

    Used by one thread at a time. Failures are OSErrors, or TierErrors that say more.
    """

    def write(self, file: int, data: torch.Tensor, offset: int) -> None:
        """Write flat bytes to the file."""
        ...

    def read(self, file: int, into: torch.Tensor, offset: int) -> None:
        """Fill flat bytes from the file; an error where it ends too early."""
        ...

    def close(self) -> None:
        """Give back what it holds; a second call does nothing."""
        ...


class ThreadMover:
    """Blocking calls: one piece in flight for each thread that makes them."""

    def write(self, file: int, data: torch.Tensor, offset: int) -> None:
        """Write; the interpreter is free meanwhile."""
        view = data.numpy().data
        while view:
            num_written = os.pwrite(file, view, offset)
            view, offset = view[num_written:], offset + num_written

    def read(self, file: int, into: torch.Tensor, offset: int) -> None:
        """Read."""
        view = into.numpy().data
        while view:
            num_read = os.preadv(file, [view], offset)
            if not num_read:
                raise _ended(len(view))
            view, offset = view[num_read:], offset + num_read

    def close(self) -> None:
        """Nothing: it holds nothing."""


class UringMover:
    """A ring of the kernel's with up to 4 pieces of 1 MiB in flight."""

    def __init__(self) -> None:
        """Raises TierError where the kernel allows no ring, KernelError where there is no C compiler."""
        self._library = _uring(building.URING)
        code = ctypes.c_int()
        self._ring: int | None = self._library.uring_open(_RING_DEPTH, ctypes.byref(code))
        if not self._ring:
            why = _NO_ROOM.get(code.value, _NOT_ALLOWED)
            raise TierError(f"io_uring: {os.strerror(code.value)}: {why}, or choose io='threads'")

    def write(self, file: int, data: torch.Tensor, offset: int) -> None:
        """Write."""
        self._move(file, data, offset, writes=True)

    def read(self, file: int, into: torch.Tensor, offset: int) -> None:
        """Read."""
        self._move(file, into, offset, writes=False)

    def close(self) -> None:
        """Give the ring back."""
        ring, self._ring = self._ring, None
        if ring:
            self._library.uring_close(ring)

    def _move(self, file: int, data: torch.Tensor, offset: int, *, writes: bool) -> None:
        assert self._ring, "closed"
        code = self._library.uring_move(self._ring, file, writes, data.data_ptr(), data.numel(), offset, _PIECE_BYTES)
        if code == _ENDED_EARLY:
            raise _ended(offset + data.numel() - os.fstat(file).st_size)
        if code:
            raise OSError(code, os.strerror(code))


class AioMover:
    """DeepSpeed's handle over libaio, on the file's name under /proc, for it has no other any more.

    It ends the process over a file that is too short and prints other failures, so lengths are looked at before, and
    what is only printed is left to digests.
    """

    def __init__(self) -> None:
        """Build DeepSpeed's async_io at the first use. Raises TierError where that cannot be done."""
        problem = refusal("aio")
        if problem is not None:
            raise TierError(f"aio: {problem}")
        from deepspeed.ops.op_builder import AsyncIOBuilder

        self._handle: Any = AsyncIOBuilder().load(verbose=False).aio_handle(_PIECE_BYTES, _AIO_DEPTH, False, True, 1)

    def write(self, file: int, data: torch.Tensor, offset: int) -> None:
        """Write."""
        self._finished(self._handle.sync_pwrite(data, _name(file), offset), data, "written")

    def read(self, file: int, into: torch.Tensor, offset: int) -> None:
        """Read."""
        missing = offset + into.numel() - os.fstat(file).st_size
        if missing > 0:
            raise _ended(missing)
        self._finished(self._handle.sync_pread(into, _name(file), offset), into, "read")

    def close(self) -> None:
        """End its threads."""
        self._handle = None

    def _finished(self, num_done: int, data: torch.Tensor, verb: str) -> None:
        if num_done != 1:
            raise TierError(f"DeepSpeed's handle has not {verb} {data.numel()} bytes; it printed why")


@functools.cache
def _uring(recipe: building.Recipe) -> ctypes.CDLL:
    """Return the library, loaded once: finding it takes descriptors, and rings may have left none."""
    library = building.library(recipe)
    library.uring_open.restype = ctypes.c_void_p
    library.uring_open.argtypes = [ctypes.c_uint, ctypes.POINTER(ctypes.c_int)]
    library.uring_close.restype = None
    library.uring_close.argtypes = [ctypes.c_void_p]
    library.uring_move.argtypes = [
        *(ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_void_p),
        *(ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint32),
    ]
    return library


def refusal(io: IoName) -> str | None:
    """Return why a mover cannot run here, and what to do; None: it can."""
    if io == "io_uring":
        try:
            UringMover().close()
        except (TierError, KernelError) as error:
            return str(error)
    return _aio_refusal() if io == "aio" else None


@functools.cache
def _aio_refusal() -> str | None:
    """Ask DeepSpeed once: it runs a compiler, and leaves a descriptor open each time."""
    try:
        from deepspeed.ops.op_builder import AsyncIOBuilder
    except ImportError:
        return "DeepSpeed is missing: pip install 'trainsys[train]'"
    if not AsyncIOBuilder().is_compatible(verbose=False):
        return "DeepSpeed's async_io does not build here: install libaio's headers (Debian: apt install libaio-dev)"
    return None


def chosen(io: IoName) -> IoName:
    """Return what `auto` means here; others as they are."""
    if io != "auto":
        return io
    return "threads" if refusal("io_uring") else "io_uring"


def make_movers(io: IoName, count: int) -> tuple[IoName, list[Mover]]:
    """Return what moves the bytes and a mover for each of so many threads; `auto` is threads where one ring is refused.

    Raises:
        TierError: there can be none of these, for want of a compiler too.
    """
    makers: dict[IoName, type[Mover]] = {"threads": ThreadMover, "io_uring": UringMover, "aio": AioMover}
    if io != "auto" and io not in makers:
        raise TierError(f"io: {io!r}; allowed: auto, threads, io_uring, aio")
    with contextlib.ExitStack() as stack:
        made: list[Mover] = []
        name: IoName = "io_uring" if io == "auto" else io
        try:
            for _ in range(count):
                made.append(makers[name]())
                stack.callback(made[-1].close)
        except (TierError, KernelError) as error:
            if io == "auto":  # the rings so far are closed: all threads move bytes the same way
                return "threads", [ThreadMover() for _ in range(count)]
            raise error if isinstance(error, TierError) else TierError(f"{io}: {error}") from error
        stack.pop_all()
        return name, made


def _name(file: int) -> str:
    return f"/proc/self/fd/{file}"


def _ended(missing: int) -> TierError:
    return TierError(f"the file ended {missing} bytes too early")
