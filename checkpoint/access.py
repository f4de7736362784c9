"""Checkpoints by path, without a Checkpointer, a model or a process group: read and verify."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from checkpoint import catalog
from checkpoint.catalog import CheckpointInfo
from checkpoint.commit import AttemptName
from checkpoint.errors import CheckpointError, CheckpointNotFound, StateMismatch
from checkpoint.manifest import SHARED
from checkpoint.reader import Reader
from checkpoint.storage import Storage, open_storage

Place = str | os.PathLike[str] | CheckpointInfo
"""A checkpoint's folder, a root (its newest checkpoint that verifies is meant), or what `latest` returned."""


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
    rank: int | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> dict[str, torch.Tensor]:
    """Return whole tensors, verified, in new host memory, however many ranks saved their slices.

    Args:
        place: the checkpoint.
        names: a glob (`*`, `?`, `[...]`) over the names, or names to be taken literally.
        rank: also read the RankLocal tensors of this rank of the saving world.
        storage_options: for the fsspec file system.

    Raises:
        StateMismatch: no tensor has such a name. CorruptCheckpoint: bytes are not what was committed.
    """
    reader = open_reader(place, storage_options)
    return {name: reader.assemble(name, owner) for name, owner in select(reader, names, rank)}


def verify(place: Place, *, deep: bool = True, storage_options: Mapping[str, Any] | None = None) -> VerifyReport:
    """Check a checkpoint against its commit record: sizes and the slice table, or with `deep` every byte.

    A root stands for its newest commit, sound or not. Faults are reported, not raised.

    Raises:
        CheckpointNotFound: there is no checkpoint.
    """
    storage, folder = _resolve(place, storage_options)
    folder = folder or _newest(storage)
    try:
        reader = Reader(storage, folder)
    except CheckpointNotFound:
        raise
    except CheckpointError as error:
        return VerifyReport(f"{storage.url}/{folder}", deep, (str(error),), 0, 0)
    mark = reader.mark()
    problems = [mark] if mark else []
    num_tensors = 0
    try:
        if deep:
            problems += reader.problems()
        else:
            reader.check_files()
        num_tensors = len(reader.table.keys())
    except CheckpointError as error:
        if str(error) not in problems:
            problems.append(str(error))
    return VerifyReport(reader.url, deep, tuple(problems), num_tensors, reader.record.nbytes)


def open_reader(place: Place, storage_options: Mapping[str, Any] | None = None) -> Reader:
    """Return the checkpoint at a place, its commit record verified. Raises CheckpointNotFound."""
    storage, folder = _resolve(place, storage_options)
    if folder:
        return Reader(storage, folder)
    reader = catalog.latest(storage, "quick")
    if reader is None:
        raise CheckpointNotFound(f"{storage.url}: holds no checkpoint that verifies")
    return reader


def _resolve(place: Place, storage_options: Mapping[str, Any] | None) -> tuple[Storage, str]:
    """Return the storage of a place's root, and the checkpoint's folder in it; no folder if it is a root."""
    text = place.path if isinstance(place, CheckpointInfo) else os.fspath(place)
    parent, _, name = text.rstrip("/").rpartition("/")
    if AttemptName.parse(name):
        return open_storage(parent or ("/" if text.startswith("/") else "."), storage_options), name
    return open_storage(text, storage_options), ""


def _newest(storage: Storage) -> str:
    found = catalog.scan(storage)
    if found.committed:
        return found.committed[-1].folder
    if found.broken:
        return found.broken[-1][0].folder
    raise CheckpointNotFound(f"{storage.url}: holds no checkpoint")


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
