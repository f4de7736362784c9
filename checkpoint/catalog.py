"""The checkpoints of one root: which exist, and which is newest."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from checkpoint.errors import (
    CheckpointError,
    CheckpointNotFound,
    CorruptCheckpoint,
    StorageError,
    UnsupportedFormat,
)
from checkpoint.names import COMMIT, TABLE, AttemptName
from checkpoint.reader import Reader
from checkpoint.storage import Storage

Verify = Literal["record", "quick", "deep"]
"""How far a checkpoint is checked: its commit record; also file sizes and slice table; also every byte."""

PIN = "PIN.json"
"""In a checkpoint's folder: retention leaves it alone."""
PROMOTION = "PROMOTION.json"
"""In a checkpoint's folder: it is being copied to another tier, or is to be; retention leaves it alone."""
RETIRED = "RETIRED.json"
"""In a folder: its checkpoint went, files of it are still referred to."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """One committed checkpoint."""

    path: str
    """Path or URL of its folder; `checkpoint.read` and `checkpoint.verify` take it."""
    folder: str
    """Its folder's name inside the root."""
    step: int
    """Optimizer step it was saved after."""
    sequence: int
    """Its place in the order of commits; `latest` is the largest that verifies."""
    run_id: str
    """The launch that saved it."""
    world_size: int
    """Ranks that saved it."""
    created: str
    """Time of the commit: UTC, ISO 8601."""
    nbytes: int
    """Bytes of its files."""
    shared: Any = field(repr=False)
    """What rank 0 handed to save as `shared`."""
    versions: Mapping[str, str] = field(repr=False)
    """Versions of the libraries that wrote it."""
    tier: str = "local"
    """Where this copy lies."""


def info_of(reader: Reader, tier: str = "local") -> CheckpointInfo:
    """Return the description of an open checkpoint."""
    record = reader.record
    return CheckpointInfo(
        path=reader.url,
        folder=reader.folder,
        step=record.step,
        sequence=record.sequence,
        run_id=record.run_id,
        world_size=record.world_size,
        created=record.created,
        nbytes=record.nbytes,
        shared=reader.shared,
        versions=record.versions,
        tier=tier,
    )


@dataclass(frozen=True, slots=True)
class Scan:
    """What a root holds."""

    committed: tuple[Reader, ...]
    """Checkpoints whose commit record verifies, oldest commit first."""
    broken: tuple[tuple[AttemptName, CheckpointError], ...]
    """Checkpoints whose commit record does not, and why."""
    uncommitted: tuple[AttemptName, ...]
    """Attempts under way or abandoned."""
    retired: tuple[AttemptName, ...]
    """Checkpoints no more: what is left are files that others refer to."""

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing, so that it may be no root at all."""
        return not (self.committed or self.broken or self.uncommitted or self.retired)


class Known:
    """Checkpoints of one root that were read before: what did not change since is not read again."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[object, Reader]] = {}

    def open(self, storage: Storage, folder: str) -> Reader:
        """As `Reader`; record and slice table are read where their size or the time of their last change differ."""
        stamp = _stamp(storage, folder)
        before, reader = self._seen.pop(folder, (None, None))
        reader = reader.again() if reader and stamp and stamp == before else Reader(storage, folder)
        if stamp:
            self._seen[folder] = stamp, reader
        return reader

    def note(self, storage: Storage, reader: Reader) -> None:
        """Take a checkpoint that this process has written."""
        stamp = _stamp(storage, reader.folder)
        if stamp:
            self._seen[reader.folder] = stamp, reader


def _stamp(storage: Storage, folder: str) -> object:
    """Return what changes with a checkpoint's record and table; None where that cannot be told."""
    found = [(e.name, e.nbytes, e.modified_s) for e in storage.entries(folder) if e.name in (COMMIT, TABLE)]
    return found if len(found) == 2 and all(time is not None for *_, time in found) else None


def scan(storage: Storage, *, skip_unreadable: bool = False, known: Known | None = None) -> Scan:
    """Look at every attempt of a root.

    What is committed is never taken for nothing because it was superseded meanwhile.

    Raises StorageError where a commit record cannot be read, or counts it as broken with `skip_unreadable`.
    """
    found = _scan(storage, skip_unreadable, known)
    # An attempt that is listed, and has no record when it is looked at, may have lost it to a newer one's retention.
    while not found.committed and (found.uncommitted or found.retired):
        before, found = found, _scan(storage, skip_unreadable, known)
        if (before.uncommitted, before.retired) == (found.uncommitted, found.retired):
            break
    return found


def _scan(storage: Storage, skip_unreadable: bool, known: Known | None) -> Scan:
    committed: list[Reader] = []
    broken: list[tuple[AttemptName, CheckpointError]] = []
    uncommitted: list[AttemptName] = []
    retired: list[AttemptName] = []
    names = (AttemptName.parse(entry.name) for entry in storage.entries("") if entry.is_folder)
    for name in sorted((n for n in names if n), key=lambda n: (n.step, n.launch, n.ordinal)):
        try:
            committed.append(known.open(storage, name.folder) if known else Reader(storage, name.folder))
        except CheckpointNotFound:
            is_retired = storage.size(f"{name.folder}/{RETIRED}") is not None
            (retired if is_retired else uncommitted).append(name)
        except (CorruptCheckpoint, UnsupportedFormat) as error:
            broken.append((name, error))
        except StorageError as error:
            # A read that fails says nothing about the checkpoint, unless another process has just removed it.
            if storage.size(f"{name.folder}/{COMMIT}") is None:
                uncommitted.append(name)
            elif skip_unreadable:
                broken.append((name, error))
            else:
                raise
    committed.sort(key=lambda reader: reader.record.sequence)
    return Scan(tuple(committed), tuple(broken), tuple(uncommitted), tuple(retired))


def checkpoints(storage: Storage) -> list[CheckpointInfo]:
    """Return the checkpoints whose commit record verifies, oldest commit first; warn about the others."""
    found = scan(storage)
    _warn_broken(found)
    return [info_of(reader) for reader in found.committed]


def latest(storage: Storage, verify: Verify) -> Reader | None:
    """Return the newest checkpoint that verifies; warn about each that is skipped, with the reason.

    None only where nothing was ever committed: a root whose checkpoints are all damaged is not an empty one.
    Looks again where one was removed while it was looked at, as newer ones supersede it.

    Raises:
        CorruptCheckpoint: something was committed, and nothing verifies. StorageError: a read failed.
    """
    found = scan(storage)
    _warn_broken(found)
    reasons = [f"{name.folder}: {error}" for name, error in found.broken]
    for reader in reversed(found.committed):
        try:
            check(reader, verify)
        except (CorruptCheckpoint, UnsupportedFormat, StorageError) as error:
            if reader.is_gone():
                return latest(storage, verify)
            if isinstance(error, StorageError):
                raise
            _log.warning("%s is skipped, an older checkpoint is taken: %s", reader.folder, error)
            reasons.append(f"{reader.folder}: {error}")
        else:
            return reader
    if reasons:
        raise CorruptCheckpoint(f"{storage.url}: none of its checkpoints is whole: {'; '.join(sorted(reasons))}")
    return None


def next_sequence(storage: Storage, *, skip_unreadable: bool = False, known: Known | None = None) -> int:
    """Return the sequence of the next commit; `skip_unreadable` as for `scan`."""
    found = scan(storage, skip_unreadable=skip_unreadable, known=known)
    return 1 + max((reader.record.sequence for reader in found.committed), default=0)


def check(reader: Reader, verify: Verify) -> None:
    """Raise CorruptCheckpoint with the first fault found."""
    if verify not in ("record", "quick", "deep"):
        raise ValueError(f"verify: {verify!r}; allowed are 'record', 'quick' and 'deep'")
    mark = reader.mark()
    if mark:
        raise CorruptCheckpoint(mark)
    if verify != "record":
        reader.check_files()
    if verify == "deep":
        for problem in reader.problems():
            raise CorruptCheckpoint(problem)


def _warn_broken(found: Scan) -> None:
    for name, error in found.broken:
        _log.warning("%s is skipped: %s", name.folder, error)
