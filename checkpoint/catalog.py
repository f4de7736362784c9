"""The checkpoints of one root: which exist, which is newest, which may go."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from checkpoint.commit import AttemptName
from checkpoint.errors import CheckpointError, CheckpointNotFound, CorruptCheckpoint
from checkpoint.reader import Reader
from checkpoint.storage import Storage

Verify = Literal["record", "quick", "deep"]
"""How far a checkpoint is checked: its commit record; also file sizes and slice table; also every byte."""

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


def info_of(reader: Reader) -> CheckpointInfo:
    """Returns the description of an open checkpoint."""
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
    )


class Catalog:
    """Looks at a root's checkpoints and removes what is superseded."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def folders(self) -> list[AttemptName]:
        """Returns every attempt, committed or not, by step."""
        names = (AttemptName.parse(e.name) for e in self._storage.entries("") if e.is_folder)
        return sorted((n for n in names if n), key=lambda n: (n.step, n.launch, n.ordinal))

    def scan(self) -> tuple[list[Reader], list[tuple[AttemptName, CheckpointError]], list[AttemptName]]:
        """Returns committed checkpoints in the order of their commits, broken ones with why, and uncommitted ones."""
        good, broken, uncommitted = [], [], []
        for name in self.folders():
            try:
                good.append(Reader(self._storage, name.folder))
            except CheckpointNotFound:
                uncommitted.append(name)
            except CheckpointError as error:
                broken.append((name, error))
        return sorted(good, key=lambda r: (r.record.sequence, r.folder)), broken, uncommitted

    def list(self) -> list[CheckpointInfo]:
        """Returns the checkpoints whose commit record verifies, oldest commit first."""
        good, broken, _ = self.scan()
        for name, error in broken:
            _log.warning("%s is skipped: %s", name.folder, error)
        return [info_of(reader) for reader in good]

    def latest(self, verify: Verify = "quick") -> CheckpointInfo | None:
        """Returns the newest checkpoint that verifies; logs a warning with the reason for each that it skips."""
        good, broken, _ = self.scan()
        for name, error in broken:
            _log.warning("%s is skipped: %s", name.folder, error)
        for reader in reversed(good):
            try:
                check(reader, verify)
                return info_of(reader)
            except CheckpointError as error:
                _log.warning("%s is skipped, an older checkpoint is taken: %s", reader.folder, error)
        return None

    def next_sequence(self) -> int:
        """Returns the sequence of the next commit."""
        good, _, _ = self.scan()
        return 1 + max((r.record.sequence for r in good), default=0)

    def remove(self, folder: str) -> None:
        """Removes a checkpoint: first its commit record, so that no half of it is ever taken for one."""
        from checkpoint.commit import COMMIT

        self._storage.remove(f"{folder}/{COMMIT}")
        self._storage.remove(folder)

    def collect(self, *, keep_last: int, keep_every: int, abandoned: Sequence[AttemptName]) -> list[str]:
        """Removes superseded checkpoints and the given abandoned attempts; returns the folders removed."""
        good, _, _ = self.scan()
        sound = {reader.folder for reader in good if _verifies(reader)}
        steps = [(reader.folder, reader.record.step) for reader in good]
        removed = superseded(steps, sound, keep_last=keep_last, keep_every=keep_every)
        removed += [name.folder for name in abandoned]
        for folder in removed:
            self.remove(folder)
        return removed


def superseded(
    checkpoints: Sequence[tuple[str, int]], sound: set[str], *, keep_last: int, keep_every: int
) -> list[str]:
    """Returns which (folder, step), oldest commit first, may go. Pure.

    The `keep_last` newest sound ones stay, and everything newer than the oldest of these, sound or not: a broken
    checkpoint never pushes a good one out. Of the steps that `keep_every` divides, the newest commit stays.
    """
    kept_steps: set[int] = set()
    num_sound = 0
    gone = []
    for folder, step in reversed(checkpoints):
        milestone = keep_every > 0 and step % keep_every == 0 and step not in kept_steps
        if num_sound >= keep_last and not milestone:
            gone.append(folder)
        if folder in sound:
            num_sound += 1
            kept_steps.add(step)
    return gone[::-1]


def check(reader: Reader, verify: Verify) -> None:
    """Raises CorruptCheckpoint with the first fault found."""
    if verify in ("quick", "deep"):
        reader.check_files()
    if verify == "deep":
        for problem in reader.problems():
            raise CorruptCheckpoint(problem)


def _verifies(reader: Reader) -> bool:
    try:
        reader.check_files()
    except CorruptCheckpoint:
        return False
    return True
