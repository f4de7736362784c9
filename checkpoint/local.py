"""A folder of a POSIX file system: temporary name, fsync, rename, fsync of the folder.

Large files go past the kernel's cache where they can (O_DIRECT), straight out of the caller's memory: of each
block the whole pages, if they lie in memory as they will lie in the file, modulo the page. The pages at the
edges of blocks, which two blocks share, are put together here and go through the cache, last.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import secrets
import shutil
import stat
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from checkpoint.storage import BlockSink, Entry, Sink, Source, check_written, named

_LEAST_DIRECT_BYTES = 256 << 10
"""What is read past the cache is at least so much: less is over sooner in one piece."""
_PAGE = 4096
"""Offset, length and memory address of a direct write are multiples of this: the largest that disks ask for."""
_libc = ctypes.CDLL(None, use_errno=True)


class _LocalFile:
    """Both ends of a local file, by descriptor."""

    def __init__(self, descriptor: int, path: Path) -> None:
        self._descriptor = descriptor
        self._path = path
        self._direct: int | None = None

    def close(self) -> None:
        """Close what `pass_cache` opened."""
        if self._direct is not None:
            os.close(self._direct)
            self._direct = None

    def pass_cache(self) -> None:
        if self._direct is None:
            # The file that is open, whatever its name has come to mean.
            self._direct = _open_direct(Path(f"/proc/self/fd/{self._descriptor}"), os.O_RDONLY)
        if self._direct is not None:  # what is left for the cache are single pages
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_RANDOM)

    def write(self, data: Any) -> None:
        view = memoryview(data).cast("B")
        with named(self._path, "write"):
            while view.nbytes:
                view = view[os.write(self._descriptor, view) :]

    def read_into(self, offset: int, buffer: memoryview) -> int:
        with named(self._path, "read"):
            first = -offset % _PAGE
            last = (offset + buffer.nbytes) // _PAGE * _PAGE - offset
            if self._direct is None or last - first < _LEAST_DIRECT_BYTES or not _is_aligned(buffer[first:last]):
                return _pread(self._descriptor, offset, buffer)
            done = _pread(self._descriptor, offset, buffer[:first])
            if done == first:
                done += _pread_direct(self._direct, offset + first, buffer[first:last])
            return done + _pread(self._descriptor, offset + done, buffer[done:])


class _Blocks:
    """A local file of known size, written in any order by any number of threads."""

    in_order = False

    def __init__(self, cached: int, direct: int | None, path: Path) -> None:
        """Write through the descriptor `cached`, and whole pages through `direct` if there is one."""
        self._cached = cached
        self._direct = direct
        self._path = path
        self._edges: dict[int, bytearray] = {}
        self._written = 0
        self._lock = threading.Lock()

    def write_at(self, offset: int, data: memoryview) -> None:
        view = data.cast("B")
        with named(self._path, "write"):
            if self._direct is None:
                _pwrite(self._cached, offset, view)
            else:
                self._write_pages(offset, view, self._direct)
        with self._lock:
            self._written += view.nbytes

    def finish(self, nbytes: int) -> None:
        """Write what was put together of the edges; raise StorageError unless all of the file was handed over."""
        check_written(self._path, self._written, nbytes)
        with named(self._path, "write"):
            for page, content in self._edges.items():
                _pwrite(self._cached, page, memoryview(content)[: nbytes - page])
        self._edges.clear()

    def _write_pages(self, offset: int, view: memoryview, direct: int) -> None:
        end = offset + view.nbytes
        first = -(-offset // _PAGE) * _PAGE
        last = max(first, end // _PAGE * _PAGE)
        self._keep_edge(offset, view[: first - offset])
        self._keep_edge(last, view[last - offset :])
        middle = view[first - offset : last - offset]
        done = _pwrite_direct(direct, first, middle) if _is_aligned(middle) else 0
        _pwrite(self._cached, first + done, middle[done:])

    def _keep_edge(self, offset: int, view: memoryview) -> None:
        if not view.nbytes:
            return
        page = offset // _PAGE * _PAGE
        with self._lock:
            edge = self._edges.setdefault(page, bytearray(_PAGE))
            edge[offset - page : offset - page + view.nbytes] = view


class LocalStorage:
    """A folder of a POSIX file system."""

    longest_poll_s = 0.1
    rereads_cheaply = True

    def __init__(self, root: Path, *, direct_io: bool = True, follow_links: bool = False) -> None:
        """`follow_links` reads files through symbolic links; otherwise they are refused."""
        self._root = Path(os.path.abspath(root))
        self._direct_io = direct_io
        self._follow_links = follow_links

    @property
    def url(self) -> str:
        return str(self._root)

    @property
    def reopening(self) -> Mapping[str, Any]:
        return {"root": str(self._root), "direct_io": self._direct_io, "follow_links": self._follow_links}

    def entries(self, folder: str) -> list[Entry]:
        path = self._root / folder
        found = []
        with named(path, "list"):
            try:
                with os.scandir(path) as scan:
                    for item in scan:
                        with contextlib.suppress(FileNotFoundError):  # removed since: as if never listed
                            facts = item.stat(follow_symlinks=self._follow_links)
                            found.append(Entry(item.name, item.is_dir(), facts.st_size, facts.st_mtime))
            except (FileNotFoundError, NotADirectoryError):
                return []
        return sorted(found, key=lambda e: e.name)

    def size(self, path: str) -> int | None:
        full = f"{self._root}/{path}"
        with named(full, "look at"):
            try:
                found = os.stat(full)
            except (FileNotFoundError, NotADirectoryError):
                return None
        return found.st_size if stat.S_ISREG(found.st_mode) else None

    def read(self, path: str) -> bytes:
        full = self._root / path
        with named(full, "read"), open(self._open_plain(full), "rb") as file:
            return file.read()

    @contextlib.contextmanager
    def open(self, path: str) -> Iterator[Source]:
        full = self._root / path
        with named(full, "open"):
            descriptor = self._open_plain(full)
        file = _LocalFile(descriptor, full)
        try:
            yield file
        finally:
            file.close()
            os.close(descriptor)

    def write(self, path: str, data: bytes) -> None:
        full = self._root / path
        with self._temporary(full, infix=_own_infix()) as (descriptor, _):
            _LocalFile(descriptor, full).write(data)

    def show(self, path: str, data: bytes) -> None:
        full = self._root / path
        with self._temporary(full, infix=_own_infix(), lasts=False) as (descriptor, _):
            _LocalFile(descriptor, full).write(data)

    def write_new(self, path: str, data: bytes) -> None:
        full = self._root / path
        with self._temporary(full, _link, _own_infix()) as (descriptor, _):
            _LocalFile(descriptor, full).write(data)

    @contextlib.contextmanager
    def create(self, path: str) -> Iterator[Sink]:
        full = self._root / path
        with self._temporary(full) as (descriptor, _):
            yield _LocalFile(descriptor, full)

    @contextlib.contextmanager
    def create_at(self, path: str, nbytes: int) -> Iterator[BlockSink]:
        full = self._root / path
        with self._temporary(full) as (cached, temporary):
            with named(full, "write"):
                _set_aside(cached, nbytes)
                direct = _open_direct(temporary, os.O_WRONLY) if self._direct_io else None
            try:
                sink = _Blocks(cached, direct, full)
                yield sink
                sink.finish(nbytes)
            finally:
                if direct is not None:
                    os.close(direct)

    def remove(self, path: str) -> None:
        full = self._root / path
        with named(full, "remove"):
            with contextlib.suppress(FileNotFoundError):
                if full.is_dir() and not full.is_symlink():
                    shutil.rmtree(full)
                    return
                full.unlink()
            if full.parent.exists():
                _sync_folder(full.parent)

    @contextlib.contextmanager
    def _temporary(
        self, full: Path, publish: Callable[[Path, Path], None] | None = None, infix: str = "", *, lasts: bool = True
    ) -> Iterator[tuple[int, Path]]:
        """Yield descriptor and name of a new file that becomes `full` when the block ends, durably if it `lasts`.

        What a killed process leaves of a large file is written over by the next one to write it; small ones, which
        several processes may write at once, have an `infix` in their temporary names.
        """
        temporary = full.with_name(f".{full.name}{infix}.tmp")
        with named(full, "create"):
            self._make_folder(full.parent, lasts=lasts)
            # A link that somebody put there could lead anywhere, and a pipe could keep us waiting.
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
            descriptor = os.open(temporary, flags, 0o644)
        try:
            try:
                yield descriptor, temporary
                if lasts:
                    with named(full, "write"):
                        os.fsync(descriptor)
            finally:
                os.close(descriptor)
            with named(full, "write"):
                (publish or os.rename)(temporary, full)
                if lasts:
                    _sync_folder(full.parent)
        except BaseException:
            with contextlib.suppress(OSError):  # the first error is the one to tell; a leftover is collected later
                temporary.unlink()
            raise

    def _open_plain(self, path: Path) -> int:
        """Open a file for reading; no link, which could lead anywhere, and no pipe, which could keep us waiting."""
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if self._follow_links else os.O_NOFOLLOW)
        try:
            descriptor = os.open(path, flags)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise OSError("it is a symbolic link; put the file itself there") from error
            raise
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise OSError("it is no plain file")
        return descriptor

    def _make_folder(self, folder: Path, *, lasts: bool) -> None:
        """Make a folder and its parents, each durable in its own parent if they are to last."""
        missing = []
        while not folder.exists():
            missing.append(folder)
            folder = folder.parent
        for path in reversed(missing):
            path.mkdir(exist_ok=True)
            if lasts:
                _sync_folder(path.parent)


def _own_infix() -> str:
    """Return a part of a name that no other writer has."""
    return f".{secrets.token_hex(4)}"


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _link(temporary: Path, full: Path) -> None:
    """Give a file its name unless it is taken."""
    try:
        os.link(temporary, full)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP):
            raise
        if full.exists():  # a file system without links
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from error
        os.rename(temporary, full)
    else:
        os.unlink(temporary)


def _set_aside(descriptor: int, nbytes: int) -> None:
    """Give a new file its size and, where the file system can, its space; OSError if there is not enough.

    Not `os.posix_fallocate`: where the file system cannot, that one writes to every page.
    """
    if nbytes == 0:
        return
    while _libc.fallocate(descriptor, 0, ctypes.c_int64(0), ctypes.c_int64(nbytes)):
        number = ctypes.get_errno()
        if number in (errno.EOPNOTSUPP, errno.ENOSYS):
            os.ftruncate(descriptor, nbytes)
            return
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))


def _open_direct(path: Path, mode: int) -> int | None:
    """Open a file past the kernel's cache; None where its file system, or the kernel, has no such thing."""
    try:
        return os.open(path, mode | os.O_DIRECT | os.O_CLOEXEC)
    except FileNotFoundError:
        if mode != os.O_RDONLY:
            raise
        return None  # no /proc
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
            return None
        raise


def _is_aligned(view: memoryview) -> bool:
    """Whether a buffer starts on a page; read-only ones count as unaligned, their address cannot be asked for."""
    return view.nbytes > 0 and not view.readonly and ctypes.addressof(ctypes.c_char.from_buffer(view)) % _PAGE == 0


def _pread(descriptor: int, offset: int, buffer: memoryview) -> int:
    """Fill a buffer; return the bytes read, fewer at the end of the file."""
    done = 0
    while done < buffer.nbytes:
        count = os.preadv(descriptor, [buffer[done:]], offset + done)
        if not count:
            break
        done += count
    return done


def _pread_direct(descriptor: int, offset: int, buffer: memoryview) -> int:
    """Read whole pages past the cache; return the bytes read, fewer where the file system wants it otherwise."""
    done = 0
    while done < buffer.nbytes and done % _PAGE == 0:
        try:
            count = os.preadv(descriptor, [buffer[done:]], offset + done)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            break
        if not count:
            break
        done += count
    return done


def _pwrite(descriptor: int, offset: int, view: memoryview) -> None:
    while view.nbytes:
        count = os.pwrite(descriptor, view, offset)
        offset, view = offset + count, view[count:]


def _pwrite_direct(descriptor: int, offset: int, view: memoryview) -> int:
    """Write whole pages past the cache; return the bytes written, fewer where the file system wants it otherwise."""
    done = 0
    while done < view.nbytes and done % _PAGE == 0:
        try:
            done += os.pwrite(descriptor, view[done:], offset + done)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            break
    return done
