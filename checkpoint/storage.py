"""Where checkpoints lie: a local file system, or anything fsspec opens; paths are relative to a root."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

import fsspec
from fsspec.implementations.local import LocalFileSystem

from checkpoint.errors import StorageError


@dataclass(frozen=True, slots=True)
class Entry:
    """One name in a folder."""

    name: str
    is_folder: bool
    nbytes: int
    modified_s: float | None
    """Unix time of the last change; None where the storage does not tell."""


class Sink(Protocol):
    """A file being written."""

    def write(self, data: Any) -> None:
        """Append all bytes of a buffer."""


class Source(Protocol):
    """A file being read; safe to share between threads."""

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """Fill the buffer from `offset`; returns the bytes read, fewer only at the end of the file."""


class Storage(Protocol):
    """What commit and readers need of a storage.

    Every failure is a StorageError that names the file; an absent file is none where a method says what it
    returns for it.
    """

    @property
    def url(self) -> str:
        """The root, in a form that `open_storage` takes."""

    @property
    def longest_poll_s(self) -> float:
        """Longest pause between two looks at the storage."""

    @property
    def rereads_cheaply(self) -> bool:
        """Whether what was just read is read again out of memory."""

    def entries(self, folder: str) -> list[Entry]:
        """Return what a folder holds, by name; nothing if there is no such folder."""

    def size(self, path: str) -> int | None:
        """Return the bytes of a file; None if there is no such file."""

    def read(self, path: str) -> bytes:
        """Return a whole file."""

    def open(self, path: str) -> contextlib.AbstractContextManager[Source]:
        """Open a file for reading."""

    def write(self, path: str, data: bytes) -> None:
        """Write a small file: seen whole or not at all at any time, durable when this returns."""

    def create(self, path: str) -> contextlib.AbstractContextManager[Sink]:
        """Open a new large file: whole and durable when the block ends.

        Until then, and for ever if the block raises, other readers may or may not see a part of it.
        """

    def remove(self, path: str) -> None:
        """Remove a file or a whole folder; nothing happens if it is absent."""


def open_storage(root: str | os.PathLike[str], options: Mapping[str, Any] | None = None) -> Storage:
    """Return the storage at a path or fsspec URL; `options` go to the fsspec file system."""
    with _named(os.fspath(root), "open", (Exception,)):
        fs, path = fsspec.core.url_to_fs(os.fspath(root), **dict(options or {}))
    if isinstance(fs, LocalFileSystem):
        return LocalStorage(Path(path))
    return FsspecStorage(fs, path)


def sizes(storage: Storage, folder: str) -> dict[str, int]:
    """Return the bytes of each file in a folder, by one listing."""
    return {entry.name: entry.nbytes for entry in storage.entries(folder) if not entry.is_folder}


_REMEDIES = {
    errno.ENOSPC: "; free space or save elsewhere",
    errno.EDQUOT: "; raise the quota or save elsewhere",
    errno.EFBIG: "; raise the limit on file sizes",
    errno.EROFS: "; save elsewhere",
    errno.EACCES: "; check the permissions",
}


@contextlib.contextmanager
def _named(path: object, verb: str, errors: tuple[type[Exception], ...] = (OSError,)) -> Iterator[None]:
    """Turn the storage's errors into StorageError with the file's name and, if there is one, the remedy."""
    try:
        yield
    except StorageError:
        raise
    except errors as error:
        number = error.errno if isinstance(error, OSError) else None
        reason = os.strerror(number) if number else str(error) or type(error).__name__
        raise StorageError(f"{path}: cannot {verb}: {reason}{_REMEDIES.get(number or 0, '')}") from error


class _LocalFile:
    """Both ends of a local file, by descriptor."""

    def __init__(self, descriptor: int, path: Path) -> None:
        self._descriptor = descriptor
        self._path = path

    def write(self, data: Any) -> None:
        view = memoryview(data).cast("B")
        with _named(self._path, "write"):
            while view.nbytes:
                view = view[os.write(self._descriptor, view) :]

    def read_into(self, offset: int, buffer: memoryview) -> int:
        done = 0
        with _named(self._path, "read"):
            while done < buffer.nbytes:
                count = os.preadv(self._descriptor, [buffer[done:]], offset + done)
                if not count:
                    break
                done += count
        return done


class LocalStorage:
    """A folder of a POSIX file system: temporary name, fsync, rename, fsync of the folder."""

    longest_poll_s = 0.1
    rereads_cheaply = True

    def __init__(self, root: Path) -> None:
        self._root = Path(os.path.abspath(root))

    @property
    def url(self) -> str:
        return str(self._root)

    def entries(self, folder: str) -> list[Entry]:
        path = self._root / folder
        found = []
        with _named(path, "list"):
            try:
                with os.scandir(path) as scan:
                    for item in scan:
                        with contextlib.suppress(FileNotFoundError):  # removed since: as if never listed
                            facts = item.stat(follow_symlinks=False)
                            found.append(Entry(item.name, item.is_dir(), facts.st_size, facts.st_mtime))
            except (FileNotFoundError, NotADirectoryError):
                return []
        return sorted(found, key=lambda e: e.name)

    def size(self, path: str) -> int | None:
        full = self._root / path
        with _named(full, "look at"):
            try:
                found = full.stat()
            except (FileNotFoundError, NotADirectoryError):
                return None
        return found.st_size if stat.S_ISREG(found.st_mode) else None

    def read(self, path: str) -> bytes:
        full = self._root / path
        with _named(full, "read"):
            return full.read_bytes()

    @contextlib.contextmanager
    def open(self, path: str) -> Iterator[Source]:
        full = self._root / path
        with _named(full, "open"):
            descriptor = os.open(full, os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield _LocalFile(descriptor, full)
        finally:
            os.close(descriptor)

    def write(self, path: str, data: bytes) -> None:
        with self.create(path) as sink:
            sink.write(data)

    @contextlib.contextmanager
    def create(self, path: str) -> Iterator[Sink]:
        full = self._root / path
        temporary = full.with_name(f".{full.name}.tmp")
        with _named(full, "create"):
            self._make_folder(full.parent)
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        try:
            try:
                yield _LocalFile(descriptor, full)
                with _named(full, "write"):
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)
            with _named(full, "write"):
                os.rename(temporary, full)
                _sync_folder(full.parent)
        except BaseException:
            with contextlib.suppress(OSError):  # the first error is the one to tell; a leftover is collected later
                temporary.unlink()
            raise

    def remove(self, path: str) -> None:
        full = self._root / path
        with _named(full, "remove"):
            with contextlib.suppress(FileNotFoundError):
                if full.is_dir() and not full.is_symlink():
                    shutil.rmtree(full)
                else:
                    full.unlink()
            if full.parent.exists():
                _sync_folder(full.parent)

    def _make_folder(self, folder: Path) -> None:
        """Make a folder and its parents, each durable in its own parent."""
        missing = []
        while not folder.exists():
            missing.append(folder)
            folder = folder.parent
        for path in reversed(missing):
            path.mkdir(exist_ok=True)
            _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remote(path: object, verb: str) -> contextlib.AbstractContextManager[None]:
    """As `_named`; what a file system's client raises need not be an OSError (credentials, connections)."""
    return _named(path, verb, (Exception,))


class _FsspecSource:
    def __init__(self, fs: Any, path: str) -> None:
        self._fs = fs
        self._path = path

    def read_into(self, offset: int, buffer: memoryview) -> int:
        with _remote(self._path, "read"):
            data = self._fs.cat_file(self._path, start=offset, end=offset + buffer.nbytes)
        buffer[: len(data)] = data
        return len(data)


class _FsspecSink:
    def __init__(self, file: Any, path: str) -> None:
        self._file = file
        self._path = path

    def write(self, data: Any) -> None:
        with _remote(self._path, "write"):
            self._file.write(memoryview(data).cast("B"))


_PUTS_WHOLE = frozenset({"abfs", "abfss", "az", "gcs", "gs", "memory", "oci", "oss", "r2", "s3", "s3a"})
"""Protocols that show an object when all of it is there; of others a temporary file is renamed."""


class FsspecStorage:
    """Any fsspec file system."""

    longest_poll_s = 1.0
    rereads_cheaply = False

    def __init__(self, fs: Any, root: str) -> None:
        self._fs = fs
        self._root = root.rstrip("/")
        protocols = (fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol
        self._puts_whole = not _PUTS_WHOLE.isdisjoint(protocols)

    @property
    def url(self) -> str:
        return str(self._fs.unstrip_protocol(self._root))

    def entries(self, folder: str) -> list[Entry]:
        path = self._path(folder)
        with _remote(path, "list"):
            self._fs.invalidate_cache(path)
            try:
                infos = self._fs.ls(path, detail=True)
            except (FileNotFoundError, NotADirectoryError):
                return []
        found = []
        for info in infos:
            name = info["name"].rstrip("/").rpartition("/")[2]
            if info["name"].rstrip("/") != path.rstrip("/"):  # some stores list the folder's own marker
                found.append(Entry(name, info["type"] == "directory", info.get("size") or 0, _modified_s(info)))
        return sorted(found, key=lambda e: e.name)

    def size(self, path: str) -> int | None:
        full = self._path(path)
        with _remote(full, "look at"):
            self._fs.invalidate_cache(full.rpartition("/")[0])
            try:
                info = self._fs.info(full)
            except FileNotFoundError:
                return None
        return int(info["size"]) if info["type"] == "file" else None

    def read(self, path: str) -> bytes:
        full = self._path(path)
        with _remote(full, "read"):
            return bytes(self._fs.cat_file(full))

    @contextlib.contextmanager
    def open(self, path: str) -> Iterator[Source]:
        yield _FsspecSource(self._fs, self._path(path))

    def write(self, path: str, data: bytes) -> None:
        full = self._path(path)
        folder, _, name = full.rpartition("/")
        with _remote(full, "write"):
            self._fs.makedirs(folder, exist_ok=True)
            if self._puts_whole:
                self._fs.pipe_file(full, data)
                return
            temporary = f"{folder}/.{name}.tmp"
            self._fs.pipe_file(temporary, data)
            self._fs.mv(temporary, full)

    @contextlib.contextmanager
    def create(self, path: str) -> Iterator[Sink]:
        full = self._path(path)
        with _remote(full, "create"):
            self._fs.makedirs(full.rpartition("/")[0], exist_ok=True)
            file = self._fs.open(full, "wb", autocommit=False)
        try:
            yield _FsspecSink(file, full)
            with _remote(full, "write"):
                file.close()
                file.commit()
        except BaseException:
            with contextlib.suppress(Exception):  # the first error is the one to tell
                file.discard()
            raise

    def remove(self, path: str) -> None:
        full = self._path(path)
        with _remote(full, "remove"), contextlib.suppress(FileNotFoundError):
            self._fs.rm(full, recursive=True)
            self._fs.invalidate_cache(full.rpartition("/")[0])

    def _path(self, path: str) -> str:
        return f"{self._root}/{path}" if path else self._root


def _modified_s(info: Mapping[str, Any]) -> float | None:
    for key in ("mtime", "LastModified", "last_modified", "updated", "created"):
        value = info.get(key)
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, int | float):
            return float(value)
    return None
