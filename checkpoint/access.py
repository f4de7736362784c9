"""Checkpoints by path, without a Checkpointer, a model or a process group: read and verify."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from checkpoint import catalog
from checkpoint.catalog import CheckpointInfo
from checkpoint.errors import CheckpointError, CheckpointNotFound, CorruptCheckpoint, StateMismatch, StorageError
from checkpoint.manifest import SHARED
from checkpoint.names import AttemptName
from checkpoint.reader import Reader, Want
from checkpoint.selection import Index, select_box
from checkpoint.storage import Storage, open_storage

Place = str | os.PathLike[str] | CheckpointInfo
"""A checkpoint's folder, a root (its newest checkpoint that verifies is meant), or what `latest` returned."""

_MOST_LOOKS = 100
"""Folders below a root that are looked into for checkpoints, where it has none."""


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What a verification found."""

    path: str
    """The checkpoint."""
    deep: bool
    """Whether every byte was read."""
    problems: tuple[str, ...]
    """One message a fault; none if the checkpoint is sound."""
    num_tensors: int
    """Tensors it holds, one rank's own counted for each rank."""
    nbytes: int
    """Bytes of its files."""

    @property
    def ok(self) -> bool:
        return not self.problems


def read(
    place: Place,
    names: str | Iterable[str] = "*",
    *,
    slices: Mapping[str, Index] | None = None,
    rank: int | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> dict[str, torch.Tensor]:
    """Return tensors, or parts of them, verified, in new host memory, however many ranks saved their slices.

    Nothing is read but the chunks (64 KiB) that hold something of them.

    Args:
        place: the checkpoint.
        names: a glob (`*`, `?`, `[...]`) over the names, or names to be taken literally.
        slices: of these only the part that an index selects: `{"embed": (slice(0, 100), ...)}`.
        rank: also read the RankLocal tensors of this rank of the saving world.
        storage_options: for the fsspec file system.

    Raises:
        StateMismatch: no tensor has such a name. CorruptCheckpoint: bytes are not what was committed.
        IndexError, TypeError, ValueError: a slice is no part of its tensor.
    """
    reader = open_reader(place, storage_options)
    try:
        return _read(reader, names, slices, rank)
    except (CorruptCheckpoint, StorageError):
        if not reader.is_gone() or _resolve(place, storage_options)[1]:
            raise
    return read(place, names, slices=slices, rank=rank, storage_options=storage_options)  # superseded meanwhile


def _read(
    reader: Reader, names: str | Iterable[str], slices: Mapping[str, Index] | None, rank: int | None
) -> dict[str, torch.Tensor]:
    selected = select(reader, names, rank)
    indices = dict(slices or {})
    absent = sorted(indices.keys() - {name for name, _ in selected})
    if absent:
        raise StateMismatch(f"{reader.url}: slices: {', '.join(map(repr, absent))} are not among the names to be read")
    boxes = [select_box(indices.get(name, ...), reader.spec(name, owner)[1]) for name, owner in selected]
    found = reader.read(Want(*key, region) for key, (region, _) in zip(selected, boxes, strict=True))
    return {name: box[rest].contiguous() for (name, _), box, (_, rest) in zip(selected, found, boxes, strict=True)}


def verify(
    place: Place,
    *,
    deep: bool = True,
    storage_options: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> VerifyReport:
    """Check a checkpoint against its commit record: sizes and the slice table, or with `deep` every byte.

    A root stands for its newest commit, sound or not, that stays until it was looked at. Faults are reported, not
    raised. With `deep`, `progress` is told the bytes read so far and those that there are.

    Raises:
        CheckpointNotFound: there is no checkpoint.
    """
    storage, named = _resolve(place, storage_options)
    folder = named or _newest(storage)
    try:
        reader = Reader(storage, folder)
    except CheckpointNotFound:
        if named:
            raise
        return verify(place, deep=deep, storage_options=storage_options, progress=progress)  # superseded meanwhile
    except CheckpointError as error:
        return VerifyReport(f"{storage.url}/{folder}", deep, (str(error),), 0, 0)
    mark = reader.mark()
    problems = [mark] if mark else []
    num_tensors = 0
    try:
        if deep:
            problems += reader.problems(_summing(progress, reader.record.nbytes) if progress else None)
        else:
            reader.check_files()
        num_tensors = len(reader.table.keys())
    except CheckpointError as error:
        if str(error) not in problems:
            problems.append(str(error))
    if problems and not named and reader.is_gone():
        return verify(place, deep=deep, storage_options=storage_options, progress=progress)
    return VerifyReport(reader.url, deep, tuple(problems), num_tensors, reader.record.nbytes)


def open_reader(place: Place, storage_options: Mapping[str, Any] | None = None) -> Reader:
    """Return the checkpoint at a place, its commit record verified. Raises CheckpointNotFound."""
    storage, folder = _resolve(place, storage_options)
    if folder:
        return Reader(storage, folder)
    reader = catalog.latest(storage, "quick")
    if reader is None:
        raise nothing_in(storage, "holds no checkpoint that verifies")
    return reader


def pin(place: Place, pinned: bool = True, storage_options: Mapping[str, Any] | None = None) -> str:
    """Keep a checkpoint from retention, or stop keeping it; return its path. A root stands for its newest sound one.

    Raises CheckpointNotFound.
    """
    reader = open_reader(place, storage_options)
    storage, path = open_storage(reader.url, storage_options), catalog.PIN
    if pinned:
        storage.write(path, b"{}")
    else:
        storage.remove(path)
    return reader.url


def _summing(progress: Callable[[int, int], None], total: int) -> Callable[[int], None]:
    done = 0

    def add(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress(min(done, total), total)

    return add


def _resolve(place: Place, storage_options: Mapping[str, Any] | None) -> tuple[Storage, str]:
    """Return the storage of a place's root, and the checkpoint's folder in it; no folder if it is a root."""
    text = place.path if isinstance(place, CheckpointInfo) else os.fspath(place)
    parent, _, name = text.rstrip("/").rpartition("/")
    if AttemptName.parse(name):
        return open_storage(parent or ("/" if text.startswith("/") else "."), storage_options), name
    return open_storage(text, storage_options), ""


def nothing_in(storage: Storage, what: str = "holds no checkpoint") -> CheckpointNotFound:
    """Return what to raise of a root without checkpoints: it names a folder below that has some, as a run has."""
    folders = [entry.name for entry in storage.entries("")[:_MOST_LOOKS] if entry.is_folder]
    below = next((name for name in folders if any(AttemptName.parse(e.name) for e in storage.entries(name))), "")
    return CheckpointNotFound(f"{storage.url}: {what}" + (f"; {storage.url}/{below} does" if below else ""))


def _newest(storage: Storage) -> str:
    found = catalog.scan(storage)
    if found.committed:
        return found.committed[-1].folder
    if found.broken:
        return found.broken[-1][0].folder
    raise nothing_in(storage)


def select(
    reader: Reader, names: str | Iterable[str], rank: int | Literal["any"] | None = None
) -> list[tuple[str, int]]:
    """Return the (name, owner) asked for, of all ranks together and of `rank`.

    Raises StateMismatch if one of the names, or anything that a glob matches, is not there.
    """
    table = reader.table.keys()
    keys = [key for key in table if rank == "any" or key[1] in (SHARED, rank)]
    if isinstance(names, str):
        literal = [key for key in keys if key[0] == names]
        chosen = literal or [key for key in keys if fnmatch.fnmatchcase(key[0], names)]
        absent = [names] if not chosen and names != "*" else []
    else:
        wanted = set(names)
        chosen = [key for key in keys if key[0] in wanted]
        absent = sorted(wanted - {name for name, _ in chosen})
    if absent:
        raise StateMismatch(f"{reader.url}: holds no tensor named {', '.join(map(repr, absent))}")
    return chosen
