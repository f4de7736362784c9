"""What checkpoints ask of the place they lie in; paths are relative to its root."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

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
    """A file being written from its first byte to its last."""

    def write(self, data: Any) -> None:
        """Append all bytes of a buffer."""


class BlockSink(Protocol):
    """A file of known size being written block by block, each of its bytes exactly once."""

    @property
    def in_order(self) -> bool:
        """Whether blocks must come by rising offset, without holes, one call after the other.

        If not, they come in any order, from any number of threads at once.
        """

    def write_at(self, offset: int, data: memoryview) -> None:
        """Take the bytes that start at `offset` of the file; the caller's memory is free when this returns."""


class Source(Protocol):
    """A file being read; safe to share between threads."""

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """Fill the buffer from `offset`; returns the bytes read, fewer only at the end of the file."""


@runtime_checkable
class MirroredSource(Source, Protocol):
    """A file of which the storage keeps several copies."""

    def copies(self) -> Sequence[Source]:
        """Return the copies that this source does not read first."""


@runtime_checkable
class CachedSource(Source, Protocol):
    """A file that the kernel keeps in its cache as it is read."""

    def pass_cache(self) -> None:
        """Read large parts past the cache from now on, where the file system can: for files that are read once.

        What is to be filled so has the address that its offset in the file has, modulo the page.
        """


class Storage(Protocol):
    """What commit and readers need of a storage.

    Every failure is a StorageError that names the file; an absent file is none where a method says what it
    returns for it.
    """

    @property
    def url(self) -> str:
        """The root, in a form that `open_storage` takes."""

    @property
    def reopening(self) -> Mapping[str, Any] | None:
        """Arguments with which `open_storage` opens it in another process; None if only this one reaches it."""

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

    def show(self, path: str, data: bytes) -> None:
        """As `write`, for what need not outlast a power failure: a word from one running process to another."""

    def write_new(self, path: str, data: bytes) -> None:
        """As `write`, for a file that must not be there yet; of several writers at once only one succeeds.

        Storages without such an operation look first, so that two at the very same time are not told apart.
        """

    def create(self, path: str) -> contextlib.AbstractContextManager[Sink]:
        """Open a new large file: whole and durable when the block ends.

        Until then, and for ever if the block raises, other readers may or may not see a part of it.
        """

    def create_at(self, path: str, nbytes: int) -> contextlib.AbstractContextManager[BlockSink]:
        """As `create`, for a file of `nbytes` bytes that is written by blocks.

        Where the storage can, it sets the space aside first, so that a full one is told before the first block.
        """

    def remove(self, path: str) -> None:
        """Remove a file or a whole folder; nothing happens if it is absent.

        A file is gone for good when this returns; of a folder some may come back after a power failure.
        """


def open_storage(
    root: str | os.PathLike[str],
    options: Mapping[str, Any] | None = None,
    *,
    direct_io: bool = True,
    follow_links: bool = False,
) -> Storage:
    """Return the storage at a path, an fsspec URL, or the URL of agents; `options` go to the fsspec file system.

    `direct_io` writes large local files past the kernel's cache, where the file system can. `follow_links` reads local
    files through symbolic links, which a checkpoint of ours has none of.
    """
    # Each of them knows this module's protocols.
    from checkpoint.local import LocalStorage
    from checkpoint.memory import SCHEME, MemoryStorage
    from checkpoint.remote import FsspecStorage

    if str(root).startswith(SCHEME):
        return MemoryStorage.of_url(str(root), options or {})
    with named(os.fspath(root), "open", (Exception,)):
        fs, path = fsspec.core.url_to_fs(os.fspath(root), **dict(options or {}))
    if isinstance(fs, LocalFileSystem):
        return LocalStorage(Path(path), direct_io=direct_io, follow_links=follow_links)
    return FsspecStorage(fs, path)


def sizes(storage: Storage, folder: str) -> dict[str, int]:
    """Return the bytes of each file in a folder, by one listing."""
    return {entry.name: entry.nbytes for entry in storage.entries(folder) if not entry.is_folder}


_REMEDIES = {
    errno.ENOSPC: "; free space or save elsewhere",
    errno.EDQUOT: "; raise the quota or save elsewhere",
    errno.EFBIG: "; raise the limit on file sizes",
    errno.EEXIST: "; another process wrote it",
    errno.EROFS: "; save elsewhere",
    errno.EACCES: "; check the permissions",
}


@contextlib.contextmanager
def named(path: object, verb: str, errors: tuple[type[Exception], ...] = (OSError,)) -> Iterator[None]:
    """Turn the storage's errors into StorageError with the file's name and, if there is one, the remedy."""
    try:
        yield
    except StorageError:
        raise
    except errors as error:
        number = error.errno if isinstance(error, OSError) else None
        reason = os.strerror(number) if number else str(error) or type(error).__name__
        raise StorageError(f"{path}: cannot {verb}: {reason}{_REMEDIES.get(number or 0, '')}") from error


def check_written(path: object, written: int, nbytes: int) -> None:
    """Raise StorageError unless all of a file's bytes were handed over."""
    if written != nbytes:
        raise StorageError(f"{path}: cannot write: {written} of {nbytes} bytes were handed over")
