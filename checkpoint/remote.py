"""Any fsspec file system."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

from checkpoint.storage import BlockSink, Entry, Sink, Source, check_written, named


def _remote(path: object, verb: str) -> contextlib.AbstractContextManager[None]:
    """As `named`; what a file system's client raises need not be an OSError (credentials, connections)."""
    return named(path, verb, (Exception,))


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


class _OrderedBlocks:
    """Blocks that come in order are appended."""

    in_order = True

    def __init__(self, sink: Sink, path: str) -> None:
        self._sink = sink
        self._path = path
        self.written = 0

    def write_at(self, offset: int, data: memoryview) -> None:
        check_written(self._path, self.written, offset)
        self._sink.write(data)
        self.written += data.nbytes


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

    @contextlib.contextmanager
    def create_at(self, path: str, nbytes: int) -> Iterator[BlockSink]:
        with self.create(path) as sink:
            blocks = _OrderedBlocks(sink, self._path(path))
            yield blocks
            check_written(self._path(path), blocks.written, nbytes)

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
