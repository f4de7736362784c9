"""The tiers of one run, nearest first: which is due, what comes next, and what a restart takes.

    memory → local → remote

Each holds whole checkpoints, and the copies of one save have the same folder name in all of them. Saves are
numbered in one sequence over all tiers, so that the newest is the newest wherever it lies; of its copies the
nearest is taken, and a copy that does not verify gives way to the next one, then to the checkpoint before.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from checkpoint import catalog
from checkpoint.catalog import CheckpointInfo
from checkpoint.config import CheckpointConfig
from checkpoint.errors import (
    CheckpointError,
    CorruptCheckpoint,
    InvalidState,
    StateMismatch,
    StorageError,
    UnsupportedFormat,
)
from checkpoint.reader import Reader
from checkpoint.storage import Storage

TierName = Literal["memory", "local", "remote"]
Gather = Callable[[Any], Sequence[Any]]
"""Gives a JSON value of this rank to all ranks, and returns those of all, by rank."""

_T = TypeVar("_T")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Tier:
    """One place that holds checkpoints."""

    name: TierName
    storage: Storage


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """A checkpoint in a tier."""

    tier: Tier
    reader: Reader

    @property
    def info(self) -> CheckpointInfo:
        return catalog.info_of(self.reader, self.tier.name)


@dataclass(frozen=True, slots=True)
class Recovered(Generic[_T]):
    """What a restart took."""

    value: _T
    """What `load` returned."""
    tier: TierName
    """Where it was read from."""
    skipped: tuple[str, ...]
    """What was newer or nearer and could not be used, with the reasons."""


def problems(config: CheckpointConfig) -> list[str]:
    """Return what is wrong with the configuration of the memory and the remote tier. Pure."""
    memory, remote = config.memory, config.remote
    least = {
        "memory.every": (memory.every, 0),
        "memory.keep_last": (memory.keep_last, 1),
        "memory.limit_bytes": (memory.limit_bytes, 0),
        "memory.peers": (memory.peers, 0),
        "remote.every": (remote.every, 1),
        "remote.keep_last": (remote.keep_last, 1),
        "remote.keep_every": (remote.keep_every, 0),
    }
    found = [f"config.{n}: {v}; allowed are integers from {low}" for n, (v, low) in least.items() if v < low]
    if remote.retry_s <= 0:
        found.append(f"config.remote.retry_s: {remote.retry_s}; allowed are seconds above 0")
    if remote.url and config.every > 0 and remote.every > 0 and remote.every % config.every:
        found.append(f"config.remote.every: {remote.every}; allowed are multiples of config.every, {config.every}")
    return found


def due(config: CheckpointConfig, step: int) -> tuple[TierName, ...]:
    """Return the tiers that a save after this step goes to by the configured cadences, nearest first. Pure.

    What goes to the remote tier goes to the local one first.
    """
    asked = {
        "memory": config.memory.every,
        "local": config.every,
        "remote": config.remote.every if config.remote.url else 0,
    }
    names: tuple[TierName, ...] = ("memory", "local", "remote")
    found = tuple(name for name in names if step > 0 and asked[name] > 0 and step % asked[name] == 0)
    return found if "local" in found else tuple(name for name in found if name != "remote")


def ordered(found: Sequence[Found]) -> list[Found]:
    """Return checkpoints in the order in which a restart tries them: the newest save first, a save's as given. Pure."""
    newest: dict[str, int] = {}
    for item in found:
        newest[item.reader.folder] = max(newest.get(item.reader.folder, 0), item.reader.record.sequence)
    return sorted(found, key=lambda item: (-newest[item.reader.folder], item.reader.folder))


class Tiers:
    """All tiers of one run. Methods may be called from any thread."""

    def __init__(self, tiers: Sequence[Tier]) -> None:
        """Use tiers, given nearest first."""
        self.tiers = tuple(tiers)
        self._before: int | None = None
        self._highest = 0
        self._lock = threading.Lock()

    def sequence(self, ordinal: int, storage: Storage, known: catalog.Known | None = None) -> int:
        """Rank 0: return the sequence of the `ordinal`-th save of this launch, counted from 1, in one of the storages.

        `known` are that storage's checkpoints.

        Looks at all tiers once, at the first save; a tier that cannot be read then counts as it was when it could be.
        Copies of one save have the same sequence, even where a later one is committed first, in another tier.
        """
        with self._lock:
            if self._before is None:
                self._scan(skip_unreadable=True)
                self._before = self._highest
            return max(self._before + ordinal, catalog.next_sequence(storage, skip_unreadable=True, known=known))

    def storage(self, name: str) -> Storage | None:
        """Return the storage of a tier; None if there is no such tier."""
        return next((tier.storage for tier in self.tiers if tier.name == name), None)

    def latest(self, verify: catalog.Verify = "quick") -> Found | None:
        """Return the newest checkpoint that verifies, from the nearest tier; warn about all that is skipped.

        None only where every tier can be read and nothing was ever committed.

        Raises:
            CorruptCheckpoint: there are checkpoints, and none verifies. StorageError: a tier could not be read, and
                no other has a checkpoint.
        """
        found, reasons = self._scan()
        for item in ordered(found):
            try:
                catalog.check(item.reader, verify)
            except (CorruptCheckpoint, UnsupportedFormat, StorageError) as error:
                if _is_gone(item.reader):
                    return self.latest(verify)
                reasons.append(error)
                _log.warning("%s is skipped: %s", item.reader.url, error)
            else:
                return item
        _raise_any(reasons)
        return None

    def find(self, path: str) -> Found | None:
        """Return the checkpoint that has this path or URL; None if it is in none of these tiers."""
        for tier in self.tiers:
            root, _, folder = path.rpartition("/")
            if root == tier.storage.url:
                return Found(tier, Reader(tier.storage, folder))
        return None

    def checkpoints(self) -> list[CheckpointInfo]:
        """Return what is committed in all tiers, oldest commit first, of a save the farthest tier first."""
        found, _ = self._scan()
        return [item.info for item in reversed(ordered(found))]

    def candidates(self) -> tuple[list[Found], list[CheckpointError]]:
        """Return what is committed, in the order in which a restart tries it, and why more could not be seen."""
        found, reasons = self._scan()
        return ordered(found), reasons

    def _scan(self, *, skip_unreadable: bool = False) -> tuple[list[Found], list[CheckpointError]]:
        found: list[Found] = []
        reasons: list[CheckpointError] = []
        for tier in self.tiers:
            try:
                scan = catalog.scan(tier.storage, skip_unreadable=skip_unreadable)
            except StorageError as error:
                reasons.append(error)
                _log.warning("the %s tier is skipped: %s", tier.name, error)
                continue
            found += [Found(tier, reader) for reader in scan.committed]
            for name, broken in scan.broken:
                reasons.append(broken)
                _log.warning("%s/%s is skipped: %s", tier.storage.url, name.folder, broken)
        self._highest = max([self._highest, *(item.reader.record.sequence for item in found)])
        return found, reasons


def alone(value: Any) -> Sequence[Any]:
    """Be the `Gather` of a single rank."""
    return [value]


def recover(
    tiers: Tiers, load: Callable[[Found], _T], *, verify: catalog.Verify = "quick", gather: Gather = alone
) -> Recovered[_T] | None:
    """Load the newest checkpoint that every rank can load; None where nothing was ever committed.

    Every rank calls it. A copy that one rank finds damaged is given up by all of them, for the same next one; rank
    0 says which are tried. `load` may be called several times, and overwrites what it filled before.

    Raises:
        StateMismatch: what is saved and what is loaded into differ, or the latter cannot be loaded into, on any rank.
        CheckpointError: `load` failed on another rank by an error that is none of ours, which that rank raises.
        CorruptCheckpoint, StorageError: as `Tiers.latest`.
    """
    found, reasons = tiers.candidates()
    here = {(item.tier.name, item.reader.folder): item for item in found}
    seen = gather([[tier, folder] for tier, folder in here])
    everywhere = set.intersection(*({tuple(pair) for pair in pairs} for pairs in seen))
    skipped = [str(reason) for reason in reasons]
    for tier_name, folder in dict.fromkeys((tier, folder) for pairs in seen for tier, folder in pairs):
        if (tier_name, folder) not in everywhere:
            reasons.append(StorageError(f"{folder} in the {tier_name} tier: not every rank sees it"))
            skipped.append(str(reasons[-1]))
            _log.warning("%s", reasons[-1])
            continue
        item = here[tier_name, folder]
        value, error = _attempt(item, load, verify)
        verdicts = [
            (rank, kind, text) for rank, (kind, text) in enumerate(gather(_verdict(item.reader, error))) if text
        ]
        if not verdicts and value is not None:
            return Recovered(value[0], item.tier.name, tuple(skipped))
        what = f"{item.reader.url}: " + "; ".join(f"rank {rank}: {text}" for rank, _, text in verdicts)
        if error is not None and not isinstance(error, CheckpointError):
            raise error
        if any(kind == "failed" for _, kind, _ in verdicts):
            raise CheckpointError(what) from error
        if any(kind == "gone" for _, kind, _ in verdicts):  # superseded meanwhile: there is a newer one
            _log.warning("looking again: %s", what)
            return recover(tiers, load, verify=verify, gather=gather)
        if any(kind == "mismatch" for _, kind, _ in verdicts):
            raise StateMismatch(what) from error
        skipped.append(what)
        _log.warning("skipped: %s", what)
        reasons.append(CorruptCheckpoint(what))
    told_by_all = gather([[isinstance(reason, StorageError), str(reason)] for reason in reasons])
    _raise_any([StorageError(text) if kind else CorruptCheckpoint(text) for told in told_by_all for kind, text in told])
    return None


def _attempt(
    item: Found, load: Callable[[Found], _T], verify: catalog.Verify
) -> tuple[tuple[_T] | None, Exception | None]:
    try:
        catalog.check(item.reader, verify)
        return (load(item),), None
    except Exception as error:  # noqa: BLE001  told to the other ranks, which wait for it, before this one raises it
        return None, error


def _verdict(reader: Reader, error: Exception | None) -> list[str]:
    if error is None:
        return ["", ""]
    text = f"{type(error).__name__}: {error}"
    if not isinstance(error, CheckpointError):
        return ["failed", text]
    if isinstance(error, StateMismatch | InvalidState):
        return ["mismatch", text]
    return ["gone" if _is_gone(reader) else "damaged", text]


def _is_gone(reader: Reader) -> bool:
    """Whether a checkpoint was removed since it was opened, as far as can be told."""
    try:
        return reader.is_gone()
    except StorageError:
        return False


def _raise_any(reasons: Sequence[CheckpointError]) -> None:
    """Raise if there is a reason why nothing was found."""
    if not reasons:
        return
    text = "; ".join(dict.fromkeys(map(str, reasons)))
    if any(isinstance(reason, StorageError) for reason in reasons):
        raise StorageError(f"no checkpoint can be read: {text}") from reasons[0]
    raise CorruptCheckpoint(f"none of the checkpoints is whole: {text}") from reasons[0]
