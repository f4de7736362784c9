"""Files in RAM, within a limit: what an agent holds. Standard library only."""

from __future__ import annotations

import contextlib
import errno
import mmap
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

_PAGE_BYTES = mmap.PAGESIZE
"""Every file is counted in whole pages, at least one."""
_HUGE_BYTES = 2 << 20
"""Files from this size on have whole pages of their own."""


class Rejected(Exception):
    """A request that cannot be fulfilled; the connection goes on."""

    def __init__(self, number: int, text: str) -> None:
        super().__init__(text)
        self.number = number
        """The errno that comes nearest."""


@dataclass(eq=False, slots=True)
class _File:
    """A file, or one that is being written."""

    path: str
    memory: memoryview
    cost: int
    tag: str = ""
    modified_s: float = 0.0
    arrived: int = 0
    """Bytes received so far."""
    users: int = 1
    """Who needs the memory: the table of files or of uploads, and each transfer under way."""


class Store:
    """Files in RAM, within a limit. Every method may be called from any thread, and raises Rejected.

    The memory of a large file that goes is kept for the next one of its size, which the next checkpoint's is: to
    touch fresh memory costs several times what it costs to fill it.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._used_bytes = 0
        self._spare: dict[int, list[memoryview]] = {}
        self._spare_bytes = 0
        self._files: dict[str, _File] = {}
        self._uploads: dict[int, _File] = {}
        self._num_uploads = 0
        self._lock = threading.Lock()

    def create(self, path: str, nbytes: int) -> int:
        """Set memory aside for a file and return the upload's number; raises ENOSPC over the limit."""
        cost = max(1, -(-nbytes // _PAGE_BYTES)) * _PAGE_BYTES
        with self._lock:
            if self._used_bytes + cost > self._limit_bytes:
                text = f"{nbytes} bytes do not fit: {self._used_bytes} of {self._limit_bytes} are in use"
                raise Rejected(errno.ENOSPC, text)
            self._used_bytes += cost
            memory = self._take_spare(nbytes)
        try:
            memory = _memory(nbytes) if memory is None else memory
        except (OSError, ValueError, OverflowError, MemoryError) as error:
            with self._lock:
                self._used_bytes -= cost
            raise Rejected(errno.ENOMEM, f"{nbytes} bytes: the host has no memory for them ({error})") from error
        with self._lock:
            self._num_uploads += 1
            self._uploads[self._num_uploads] = _File(path, memory, cost)
            return self._num_uploads

    def _take_spare(self, nbytes: int) -> memoryview | None:
        """Return spare memory of that size if there is some, and let go of what is over the limit."""
        found = self._spare[nbytes].pop() if self._spare.get(nbytes) else None
        self._spare_bytes -= found.nbytes if found is not None else 0
        while self._used_bytes + self._spare_bytes > self._limit_bytes:
            size = next(iter(self._spare))
            self._spare_bytes -= size * len(self._spare.pop(size))
        return found

    @contextlib.contextmanager
    def put(self, upload: int, offset: int, nbytes: int) -> Iterator[memoryview]:
        """Lend the memory of a part of an upload, which has arrived when the block ends."""
        with self._lock:
            file = self._upload(upload)
            if not 0 <= offset <= file.memory.nbytes - nbytes:
                raise Rejected(errno.EINVAL, f"bytes [{offset}, {offset + nbytes}) of a file of {file.memory.nbytes}")
            file.users += 1
        try:
            yield file.memory[offset : offset + nbytes]
            with self._lock:
                file.arrived += nbytes
        finally:
            self._leave(file)

    def commit(self, upload: int, tag: str, *, new: bool = False) -> None:
        """Let the file appear; a `new` one only where there is none."""
        with self._lock:
            file = self._upload(upload)
            if new and file.path in self._files:
                raise Rejected(errno.EEXIST, "the file exists")
            if file.arrived != file.memory.nbytes:
                raise Rejected(errno.EIO, f"{file.arrived} of {file.memory.nbytes} bytes arrived")
            del self._uploads[upload]
            file.tag, file.modified_s = tag, time.time()
            before = self._files.get(file.path)
            self._files[file.path] = file
        if before is not None:
            self._leave(before)

    def drop(self, upload: int) -> None:
        """Forget an upload; nothing happens if there is none."""
        with self._lock:
            file = self._uploads.pop(upload, None)
        if file is not None:
            self._leave(file)

    @contextlib.contextmanager
    def read(self, path: str, offset: int, nbytes: int) -> Iterator[memoryview]:
        """Lend a part of a file, which stays as it is until the block ends, even if the file is removed."""
        with self._lock:
            file = self._files.get(path)
            if file is None:
                raise Rejected(errno.ENOENT, "no such file")
            file.users += 1
        try:
            start = min(max(offset, 0), file.memory.nbytes)
            yield file.memory[start : start + max(nbytes, 0)].toreadonly()
        finally:
            self._leave(file)

    def stat(self, path: str) -> tuple[int | None, str]:
        """Return a file's bytes and its tag; None if there is no such file."""
        with self._lock:
            file = self._files.get(path)
            return (file.memory.nbytes, file.tag) if file else (None, "")

    def entries(self, folder: str) -> list[tuple[str, bool, int, float | None]]:
        """Return what a folder holds."""
        prefix = f"{folder}/" if folder else ""
        found: dict[str, tuple[str, bool, int, float | None]] = {}
        with self._lock:
            for path, file in self._files.items():
                if path.startswith(prefix):
                    name, slash, _ = path[len(prefix) :].partition("/")
                    is_file = (name, False, file.memory.nbytes, file.modified_s)
                    found[name] = (name, True, 0, None) if slash else is_file
        return [found[name] for name in sorted(found)]

    def remove(self, path: str) -> None:
        """Remove a file or a whole folder."""
        with self._lock:
            gone = [p for p in self._files if p == path or p.startswith(f"{path}/")]
            files = [self._files.pop(p) for p in gone]
        for file in files:
            self._leave(file)

    def about(self) -> dict[str, int]:
        """Return what the store holds, in numbers."""
        with self._lock:
            return {
                "limit_bytes": self._limit_bytes,
                "used_bytes": self._used_bytes,
                "num_files": len(self._files),
                "num_uploads": len(self._uploads),
            }

    def _upload(self, upload: int) -> _File:
        file = self._uploads.get(upload)
        if file is None:
            raise Rejected(errno.EBADF, f"there is no upload {upload}: the connection that created it has ended")
        return file

    def _leave(self, file: _File) -> None:
        with self._lock:
            file.users -= 1
            if not file.users:
                self._used_bytes -= file.cost
                if file.memory.nbytes >= _HUGE_BYTES:
                    self._spare.setdefault(file.memory.nbytes, []).append(file.memory)
                    self._spare_bytes += file.memory.nbytes


def _memory(nbytes: int) -> memoryview:
    """Return memory for a file; whole pages go back to the host when the last view of them goes."""
    if nbytes < _HUGE_BYTES:
        return memoryview(bytearray(nbytes))
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # only quicker: a kernel may have no huge pages
        pages.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(pages)
