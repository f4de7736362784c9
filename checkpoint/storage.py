"""Where checkpoints lie: a local file system, or anything fsspec opens; paths are relative to a root."""

from __future__ import annotations

import contextlib
import os
import shutil
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

    A file appears whole or not at all, and is durable when `create` ends. Every failure is a StorageError
    that names the file; an absent file or folder is not a failure where the method says what it returns for
    it.
    """

    @property
    def url(self) -> str:
        """The root, in a form that `open_storage` takes."""

    @property
    def longest_poll_s(self) -> float:
        """Longest pause between two looks at the storage."""

    def entries(self, folder: str) -> list[Entry]:
        """Return what a folder holds, by name; nothing if there is no such folder."""

    def size(self, path: str) -> int | None:
        """Return the bytes of a file; None if there is no such file."""

    def read(self, path: str) -> bytes:
        """Return a whole file."""

    def open(self, path: str) -> contextlib.AbstractContextManager[Source]:
        """Open a file for reading."""

    def create(self, path: str) -> contextlib.AbstractContextManager[Sink]:
        """Open a new file, making its folders; durable when the block ends, discarded if it raises."""

    def remove(self, path: str) -> None:
        """Remove a file or a whole folder; nothing happens if it is absent."""


def open_storage(root: str | os.PathLike[str], options: Mapping[str, Any] | None = None) -> Storage:
    """Return the storage at a path or fsspec URL; `options` go to the fsspec file system."""
    try:
        fs, path = fsspec.core.url_to_fs(os.fspath(root), **dict(options or {}))
    except (ImportError, ValueError) as error:
        raise StorageError(f"{os.fspath(root)}: cannot be opened ({error})") from error
    if isinstance(fs, LocalFileSystem):
        return LocalStorage(Path(path))
    return FsspecStorage(fs, path)


def sizes(storage: Storage, folder: str) -> dict[str, int]:
    """Return the bytes of each file in a folder, by one listing."""
    return {entry.name: entry.nbytes for entry in storage.entries(folder) if not entry.is_folder}


def write(storage: Storage, path: str, data: bytes) -> None:
    """Write a small file, whole and durable."""
    with storage.create(path) as sink:
        sink.write(data)


@contextlib.contextmanager
def _named(path: object, verb: str) -> Iterator[None]:
    """Turn the storage's errors into StorageError with the file's name and, if there is one, the remedy."""
    try:
        yield
    except OSError as error:
        remedies = {
            28: "free space or save elsewhere",
            122: "raise the quota or save elsewhere",
            27: "raise the limit on file sizes",
            30: "save elsewhere",
            13: "check the permissions",
        }
        remedy = remedies.get(error.errno or 0, "")
        reason = error.strerror or str(error) or type(error).__name__
        raise StorageError(f"{path}: cannot {verb}: {reason}" + (f"; {remedy}" if remedy else "")) from error


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
                            stat = item.stat(follow_symlinks=False)
                            found.append(Entry(item.name, item.is_dir(), stat.st_size, stat.st_mtime))
            except (FileNotFoundError, NotADirectoryError):
                return []
        return sorted(found, key=lambda e: e.name)

    def size(self, path: str) -> int | None:
        full = self._root / path
        with _named(full, "look at"):
            try:
                return full.stat().st_size
            except (FileNotFoundError, NotADirectoryError):
                return None

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
            with contextlib.suppress(
                OSError
            ):  # the first error is the one to tell; a leftover is collected later
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


class _FsspecSource:
    def __init__(self, fs: Any, path: str) -> None:
        self._fs = fs
        self._path = path

    def read_into(self, offset: int, buffer: memoryview) -> int:
        with _named(self._path, "read"):
            data = self._fs.cat_file(self._path, start=offset, end=offset + buffer.nbytes)
        buffer[: len(data)] = data
        return len(data)


class _FsspecSink:
    def __init__(self, file: Any, path: str) -> None:
        self._file = file
        self._path = path

    def write(self, data: Any) -> None:
        with _named(self._path, "write"):
            self._file.write(memoryview(data).cast("B"))


class FsspecStorage:
    """Any fsspec file system: an object appears when its upload is complete."""

    longest_poll_s = 1.0

    def __init__(self, fs: Any, root: str) -> None:
        self._fs = fs
        self._root = root.rstrip("/")

    @property
    def url(self) -> str:
        return str(self._fs.unstrip_protocol(self._root))

    def entries(self, folder: str) -> list[Entry]:
        path = self._path(folder)
        with _named(path, "list"):
            self._fs.invalidate_cache(path)
            try:
                infos = self._fs.ls(path, detail=True)
            except (FileNotFoundError, NotADirectoryError):
                return []
        found = []
        for info in infos:
            name = info["name"].rstrip("/").rpartition("/")[2]
            if info["name"].rstrip("/") != path.rstrip("/"):  # some stores list the folder's own marker
                found.append(
                    Entry(name, info["type"] == "directory", info.get("size") or 0, _modified_s(info))
                )
        return sorted(found, key=lambda e: e.name)

    def size(self, path: str) -> int | None:
        full = self._path(path)
        with _named(full, "look at"):
            self._fs.invalidate_cache(full.rpartition("/")[0])
            try:
                info = self._fs.info(full)
            except FileNotFoundError:
                return None
        return int(info["size"]) if info["type"] == "file" else None

    def read(self, path: str) -> bytes:
        full = self._path(path)
        with _named(full, "read"):
            return bytes(self._fs.cat_file(full))

    @contextlib.contextmanager
    def open(self, path: str) -> Iterator[Source]:
        yield _FsspecSource(self._fs, self._path(path))

    @contextlib.contextmanager
    def create(self, path: str) -> Iterator[Sink]:
        full = self._path(path)
        with _named(full, "create"):
            self._fs.makedirs(full.rpartition("/")[0], exist_ok=True)
            file = self._fs.open(full, "wb", autocommit=False)
        try:
            yield _FsspecSink(file, full)
            with _named(full, "write"):
                file.close()
                file.commit()
        except BaseException:
            with contextlib.suppress(OSError):  # the first error is the one to tell
                file.discard()
            raise

    def remove(self, path: str) -> None:
        full = self._path(path)
        with _named(full, "remove"), contextlib.suppress(FileNotFoundError):
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
