"""Any fsspec file system.

Large files go through fsspec's own buffered file, in order; those of an S3 store by `checkpoint.multipart`,
several parts at once.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import inspect
import os
import secrets
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

from fsspec.implementations.memory import MemoryFileSystem

from checkpoint.errors import StorageError
from checkpoint.multipart import Uploads
from checkpoint.storage import BlockSink, Entry, Sink, Source, check_written, named

_S3 = frozenset({"s3", "s3a"})
_PUTS_WHOLE = _S3 | {"abfs", "abfss", "az", "gcs", "gs", "memory", "oci", "oss", "r2"}
"""Protocols that show an object when all of it is there; of others a temporary file is renamed."""


def remote(path: object, verb: str) -> contextlib.AbstractContextManager[None]:
    """As `named`; what a file system's client raises need not be an OSError (credentials, connections)."""
    return named(path, verb, (Exception,))


class _FsspecSource:
    def __init__(self, fs: Any, path: str) -> None:
        self._fs = fs
        self._path = path

    def read_into(self, offset: int, buffer: memoryview) -> int:
        with remote(self._path, "read"):
            data = self._fs.cat_file(self._path, start=offset, end=offset + buffer.nbytes)
        buffer[: len(data)] = data
        return len(data)


class _FsspecSink:
    def __init__(self, file: Any, path: str) -> None:
        self._file = file
        self._path = path

    def write(self, data: Any) -> None:
        with remote(self._path, "write"):
            self._file.write(memoryview(data).cast("B"))


class _OrderedBlocks:
    """Blocks that come in order are appended to a sink."""

    in_order = True

    def __init__(self, sink: Sink, path: str) -> None:
        self._sink = sink
        self._path = path
        self.written = 0

    def write_at(self, offset: int, data: memoryview) -> None:
        check_written(self._path, self.written, offset)
        self._sink.write(data)
        self.written += data.nbytes


class FsspecStorage:
    """Any fsspec file system."""

    longest_poll_s = 1.0
    rereads_cheaply = False

    def __init__(self, fs: Any, root: str) -> None:
        self._fs = fs
        self._root = root.rstrip("/")
        protocols = frozenset((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol)
        self._puts_whole = not _PUTS_WHOLE.isdisjoint(protocols)
        self._uploads = None if _S3.isdisjoint(protocols) else Uploads(fs)

    @property
    def url(self) -> str:
        return str(self._fs.unstrip_protocol(self._root))

    @property
    def reopening(self) -> Mapping[str, Any] | None:
        if isinstance(self._fs, MemoryFileSystem):
            return None
        return {"root": self.url, "options": dict(self._fs.storage_options)}

    def entries(self, folder: str) -> list[Entry]:
        path = self._path(folder)
        with remote(path, "list"):
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
        with remote(full, "look at"):
            self._fs.invalidate_cache(full.rpartition("/")[0])
            try:
                info = self._fs.info(full)
            except FileNotFoundError:
                return None
        return int(info["size"]) if info["type"] == "file" else None

    def read(self, path: str) -> bytes:
        full = self._path(path)
        with remote(full, "read"):
            return bytes(self._fs.cat_file(full))

    @contextlib.contextmanager
    def open(self, path: str) -> Iterator[Source]:
        yield _FsspecSource(self._fs, self._path(path))

    def write(self, path: str, data: bytes) -> None:
        full = self._path(path)
        with remote(full, "write"):
            self._put(full, data)

    def show(self, path: str, data: bytes) -> None:
        self.write(path, data)

    def write_new(self, path: str, data: bytes) -> None:
        full = self._path(path)
        with remote(full, "write"):
            try:
                self._make_parent(full)
                if self._puts_whole and "mode" in inspect.signature(self._fs.pipe_file).parameters:
                    self._fs.pipe_file(full, data, mode="create")
                elif self.size(path) is None:
                    self._put(full, data)
                else:
                    raise FileExistsError
            except OSError as error:
                if not self._fs.exists(full):
                    raise
                # A client that tries again after it heard no answer may find what it put the first time.
                if self.read(path) != data:
                    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from error

    @contextlib.contextmanager
    def create(self, path: str) -> Iterator[Sink]:
        full = self._path(path)
        with remote(full, "create"):
            self._make_parent(full)
            file = self._fs.open(full, "wb", autocommit=False)
        try:
            yield _FsspecSink(file, full)
            with remote(full, "write"):
                file.close()
                file.commit()
        except BaseException:
            with contextlib.suppress(Exception):  # the first error is the one to tell
                file.discard()
            raise

    @contextlib.contextmanager
    def create_at(self, path: str, nbytes: int) -> Iterator[BlockSink]:
        full = self._path(path)
        if self._uploads:
            with self._uploads.open(full, nbytes) as parts:
                yield parts
        else:
            with self.create(path) as sink:
                blocks = _OrderedBlocks(sink, full)
                yield blocks
                check_written(full, blocks.written, nbytes)
        found = self.size(path)
        if found != nbytes:
            raise StorageError(f"{full}: {nbytes} bytes were written, the storage holds {found}")

    def remove(self, path: str) -> None:
        full = self._path(path)
        with remote(full, "remove"), contextlib.suppress(FileNotFoundError):
            if glob.escape(full) == full:
                self._fs.rm(full, recursive=True)
            else:
                self._remove_each(full)
            self._fs.invalidate_cache(full.rpartition("/")[0])
        if self._uploads:
            with remote(full, "abort the unfinished uploads there"):
                self._uploads.abort_under(full)

    def _remove_each(self, full: str) -> None:
        """Remove a file or folder one by one: `rm` would take the name for a pattern, and others with it."""
        self._fs.invalidate_cache(full)
        found = self._fs.find(full, withdirs=True, detail=True)
        for path in sorted(found, reverse=True):  # what a folder holds before the folder
            with contextlib.suppress(FileNotFoundError):  # a folder that was there by its files alone
                self._fs.rm_file(path) if found[path]["type"] == "file" else self._fs.rmdir(path)

    def _put(self, full: str, data: bytes) -> None:
        self._make_parent(full)
        if self._puts_whole:
            self._fs.pipe_file(full, data)
            return
        folder, _, name = full.rpartition("/")
        temporary = f"{folder}/.{name}.{secrets.token_hex(4)}.tmp"  # several processes may write it at once
        self._fs.pipe_file(temporary, data)
        self._fs.mv(temporary, full)

    def _make_parent(self, full: str) -> None:
        if not self._uploads:  # S3 has no folders; s3fs would ask for the bucket each time, and make a mistyped one
            self._fs.makedirs(full.rpartition("/")[0], exist_ok=True)

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
