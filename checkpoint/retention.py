"""What becomes superfluous, and is removed: by a launch after its commits, or by hand."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field

from checkpoint import catalog
from checkpoint.catalog import PIN, PROMOTION, RETIRED
from checkpoint.config import CheckpointConfig
from checkpoint.errors import CheckpointError, CorruptCheckpoint, StorageError, UnsupportedFormat
from checkpoint.manifest import SliceTable
from checkpoint.names import COMMIT, PARTS, REMOVAL, TABLE, AttemptName
from checkpoint.reader import Reader
from checkpoint.storage import Storage, sizes

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Removal:
    """A folder that goes, but for files that a checkpoint refers to which stays."""

    folder: str
    stays: tuple[str, ...] = ()
    """Names of files, sorted."""

    def __str__(self) -> str:
        return f"{self.folder} but for {', '.join(self.stays)}" if self.stays else self.folder


def removable(
    storage: Storage,
    *,
    keep_last: int,
    keep_every: int,
    abandoned: Callable[[AttemptName], bool],
    known: catalog.Known | None = None,
    with_votes: bool = False,
) -> list[Removal]:
    """Return what may go: superseded checkpoints, retired ones that nothing refers to, abandoned attempts.

    A file stays while a checkpoint that stays refers to it, whatever became of the checkpoint that it was part of;
    `with_votes` also while an attempt that stays may come to refer to it.
    Raises ValueError if nothing at all were to stay.
    """
    if keep_last < 1:
        raise ValueError(f"keep_last: {keep_last}; allowed are integers from 1")
    found = catalog.scan(storage, known=known)
    held = functools.partial(_is_held, storage)
    gone = superseded(found.committed, is_sound, keep_last=keep_last, keep_every=keep_every, held=held)
    left = [name for name in found.uncommitted if abandoned(name)]
    paths = [file.path for reader in found.committed if reader not in gone for file in reader.record.files]
    for name in found.uncommitted if with_votes else ():
        paths += [] if name in left else _named_by(storage, name)
    referred = references(paths)
    removals = [Removal(reader.folder, referred.get(reader.folder, ())) for reader in gone]
    for name in found.retired:
        stays = referred.get(name.folder, ())
        there = {entry.name for entry in storage.entries(name.folder)}
        if not stays or there - {RETIRED, *stays}:
            removals.append(Removal(name.folder, stays))
    return removals + [Removal(name.folder) for name in left if name.folder not in referred]


def references(paths: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Return which files of which folders are named by paths that have one, sorted. Pure."""
    found: dict[str, set[str]] = {}
    for path in paths:
        folder, _, name = path.rpartition("/")
        if folder:
            found.setdefault(folder, set()).add(name)
    return {folder: tuple(sorted(names)) for folder, names in found.items()}


def collect(
    storage: Storage, *, keep_last: int, keep_every: int, abandoned: Callable[[AttemptName], bool]
) -> Generator[Removal, None, None]:
    """Remove what may go, as `removable`, and yield it; launches may be saving into the root at the same time.

    A save that refers to files of other checkpoints says so first, in its votes, and then looks whether these are
    marked; here they are marked first, and then looked for in votes. So one of the two sees the other, whatever
    their order: the save fails and the next one writes everything, or the files stay. A mark stays until the files
    are gone, or will not go: however this ends, unless it is killed, none is left behind.
    """
    planned = removable(storage, keep_last=keep_last, keep_every=keep_every, abandoned=abandoned)
    folders = {removal.folder for removal in planned}
    with contextlib.ExitStack() as marks:
        for folder in folders:
            marks.callback(storage.remove, f"{folder}/{REMOVAL}")
            storage.write(f"{folder}/{REMOVAL}", b"{}")
        sure = removable(
            storage,
            keep_last=keep_last,
            keep_every=keep_every,
            abandoned=lambda name: name.folder in folders,
            with_votes=True,
        )
        for removal in sorted(sure, key=lambda removal: removal.folder):
            if removal.folder in folders:
                remove(storage, removal)
                yield removal


def superseded(
    committed: Sequence[Reader],
    sound: Callable[[Reader], bool],
    *,
    keep_last: int,
    keep_every: int,
    held: Callable[[Reader], bool] = lambda reader: False,
) -> list[Reader]:
    """Return which checkpoints, given oldest commit first, may go. Pure.

    The `keep_last` newest sound ones stay, and every newer one, sound or not: a broken checkpoint never
    pushes a good one out. Of a step that `keep_every` divides, the newest sound commit stays. What is `held`
    stays beside them.
    """
    milestones: set[int] = set()
    num_kept = 0
    gone = []
    for reader in reversed(committed):
        step = reader.record.step
        is_milestone = keep_every > 0 and step % keep_every == 0 and step not in milestones
        if num_kept >= keep_last and not is_milestone:
            if not held(reader):
                gone.append(reader)
        elif sound(reader):
            num_kept += 1
            milestones.add(step)
    return gone[::-1]


def is_sound(reader: Reader) -> bool:
    """Whether every file is there in its size and nobody found the checkpoint damaged."""
    try:
        catalog.check(reader, "quick")
    except CorruptCheckpoint:
        return False
    return True


def remove(storage: Storage, removal: Removal) -> None:
    """Remove a checkpoint: its commit record first, so that no half of it is ever taken for one.

    One whose files others need is retired: marked, so that what is left of it goes with the last of them. What says
    that it is being removed goes last: a save that looks after that finds no file that would still go.
    """
    folder = removal.folder
    if removal.stays:
        storage.write(f"{folder}/{RETIRED}", b"{}")
    storage.remove(f"{folder}/{COMMIT}")
    there = [entry.name for entry in storage.entries(folder)]
    if removal.stays or REMOVAL in there:
        for name in there:
            if name not in (RETIRED, REMOVAL, *removal.stays):
                storage.remove(f"{folder}/{name}")
    if not removal.stays:
        storage.remove(folder)
    elif REMOVAL in there:
        storage.remove(f"{folder}/{REMOVAL}")


def write_times(storage: Storage, folder: str) -> list[float | None]:
    """Return when each file of an attempt was last written, by the storage's clock; None if it has none.

    Where folders have a time too, theirs is among them: a folder just made may hold no file yet.
    """
    itself = [e for e in storage.entries("") if e.name == folder]
    inside = [e for f in (folder, f"{folder}/{PARTS}") for e in storage.entries(f)]
    return [e.modified_s for e in itself + inside if not (e.is_folder and e.modified_s is None)]


def is_idle_since(storage: Storage, name: AttemptName, time_s: float) -> bool:
    """Whether nothing in an attempt's folder was written at or after a Unix time."""
    return all(t is not None and t < time_s for t in write_times(storage, name.folder))


def _named_by(storage: Storage, name: AttemptName) -> list[str]:
    """Return the files that an attempt's votes speak of, or the table of a copy that is about to be committed."""
    found: list[str] = []
    votes = [f"{name.folder}/{PARTS}/{vote}" for vote in sizes(storage, f"{name.folder}/{PARTS}")]
    for path in (f"{name.folder}/{TABLE}", *(vote for vote in votes if vote.endswith(".arrow"))):
        try:
            if storage.size(path) is not None:
                found += SliceTable.from_bytes(storage.read(path), path).places().files
        except (CorruptCheckpoint, UnsupportedFormat) as error:
            _log.warning("no checkpoint can come of this, and nothing stays for it: %s", error)
        except StorageError:
            if storage.size(path) is not None:  # it did not just go away
                raise
    return found


def _is_held(storage: Storage, reader: Reader) -> bool:
    return any(storage.size(f"{reader.folder}/{name}") is not None for name in (PIN, PROMOTION))


@dataclass(slots=True)
class Retention:
    """Removes superseded checkpoints and abandoned attempts of one tier."""

    keep_last: int
    keep_every: int
    known: catalog.Known = field(default_factory=catalog.Known)
    """What was read of the tier's checkpoints before."""
    failed: set[AttemptName] = field(default_factory=set)
    """Attempts of this launch that failed here."""
    _first_write_s: float | None = None

    @classmethod
    def of(cls, config: CheckpointConfig, tier: str) -> Retention:
        """Return what a configuration asks of a tier."""
        keep_last = config.memory.keep_last if tier == "memory" else config.keep_last
        # A save under way may refer to what the checkpoint before the newest one has.
        keep_last = max(3, keep_last) if config.delta else keep_last
        return cls(keep_last, 0 if tier == "memory" else config.keep_every)

    def collect(self, storage: Storage, committed: AttemptName) -> None:
        """Remove what the newest checkpoint supersedes, and attempts that can no longer become one.

        Of this launch these are the attempts that failed here: every rank voted since, so none still writes
        to them. Of other launches, what was last written before anything of this launch's first checkpoint.
        What cannot be removed is warned about, and tried again after the next save.
        """
        try:
            if self._first_write_s is None:
                times = write_times(storage, committed.folder)
                self._first_write_s = min((t for t in times if t is not None), default=0.0)
            first_write_s = self._first_write_s

            def abandoned(name: AttemptName) -> bool:
                if name.launch == committed.launch:
                    return name in self.failed
                return is_idle_since(storage, name, first_write_s)

            removals = removable(
                storage,
                keep_last=self.keep_last,
                keep_every=self.keep_every,
                abandoned=abandoned,
                known=self.known,
            )
            for removal in removals:
                remove(storage, removal)
        except CheckpointError as error:
            _log.warning("superseded checkpoints stay, the next save tries again: %s", error)
