"""Prepare, vote, commit: how the files of many ranks become one checkpoint, or none.

    step-00000100.a0.5a3f…/            attempt 0 of step 100 in one launch; never written twice
        r00000.safetensors             prepare: every rank writes its tensors
        r00000.objects.json                     and its objects,
        parts/r00000.arrow             vote:    then its slice table, last
        slices.arrow                   commit:  rank 0 merges the tables when all have voted
        COMMIT.json                             and writes the record: from here the checkpoint exists
        ABORT.json                     instead: the first rank that fails says so, and the others stop

Ranks share nothing but the storage. The folder of an attempt is a function of what every rank knows: the
step, how often this launch saved that step before, and the launch's `run_id`, which is equal on all ranks and
new for every launch. So nothing is negotiated, and what a killed launch left behind lies under another name:
it is neither waited for nor mistaken for a vote.

A rank that voted never takes its vote back, and rank 0 alone commits: so COMMIT and the ABORT of another rank
exclude each other, and nobody removes a file that a commit may rely on.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy
import pyarrow
import torch

from checkpoint import objects
from checkpoint.errors import CommitTimeout, CoverageError, SaveAborted, SaveSkipped, StorageError
from checkpoint.format import fingerprint
from checkpoint.manifest import CommitRecord, FileRecord, SliceTable
from checkpoint.names import ABORT, COMMIT, PARTS, REMOVAL, TABLE, AttemptName
from checkpoint.shard import Written, rank_name
from checkpoint.storage import Storage, sizes

_FIRST_PAUSE_S = 0.004


class Agreement:
    """What the ranks' votes for the saves of one launch agree on: looked into where it is not as it was."""

    def __init__(self) -> None:
        self._facts: list[object] = []
        self._outline: pyarrow.Table | None = None

    def check(self, parts: Sequence[SliceTable], merged: SliceTable) -> None:
        """As `check_votes`; at once if it found nothing wrong with votes that differ from these in their digests."""
        facts: list[object] = [[p.metadata["world_size"], p.metadata["replicated"], len(p)] for p in parts]
        outline = merged.outline()
        if self._outline is None or facts != self._facts or not outline.equals(self._outline):
            check_votes(parts, merged)
            self._facts, self._outline = facts, outline


class Attempt:
    """One rank's side of one attempt."""

    def __init__(
        self,
        storage: Storage,
        name: AttemptName,
        rank: int,
        world_size: int,
        timeout_s: float,
        agreement: Agreement | None = None,
        admit: Callable[[], object] | None = None,
    ) -> None:
        """`agreement` is kept by rank 0 from attempt to attempt; `admit` raises where this rank may not commit."""
        self.name = name
        self.folder = name.folder
        self.table: SliceTable | None = None
        """After `commit`: all ranks' slices."""
        self._agreement = agreement or Agreement()
        self._admit = admit
        self._own: SliceTable | None = None
        self._storage = storage
        self._rank = rank
        self._world_size = world_size
        self._timeout_s = timeout_s
        self._voted = False
        self._aborted_by_other = False
        self._cancelled: BaseException | None = None

    def begin(self) -> None:
        """Raise if another rank has failed already, or if a launch before this one used the same name."""
        self._raise_if_aborted()
        if self._is_committed() or self._storage.size(self._part(self._rank)) is not None:
            raise StorageError(
                f"{self.folder}: rank {self._rank} finds its own files in a new attempt; run_id must be new "
                "for every launch, and one process alone may be this rank"
            )

    def vote(self, written: Written, replicated: str) -> None:
        """Say that this rank's files are durable; `replicated` fingerprints what it takes for replicated."""
        metadata = {
            "rank": self._rank,
            "world_size": self._world_size,
            "step": self.name.step,
            "files": [[f.path, f.nbytes, f.head_bytes, f.fingerprint] for f in written.files],
            "replicated": replicated,
        }
        rows = written.rows if isinstance(written.rows, SliceTable) else SliceTable.of(written.rows, {})
        self._own = rows.described(metadata)
        table = self._own.to_bytes()
        self._voted = True  # from the attempt to write it on: a vote whose write failed may still be there
        # What it speaks of is durable. It need not be itself: it is for a rank 0 that runs.
        self._storage.show(self._part(self._rank), table)

    def commit(self, run_id: str, shared: Any, sequence: Callable[[], int]) -> CommitRecord:
        """Rank 0: wait for every vote, check that they make one whole state, and commit it."""
        self._await_votes()
        parts = [self._read_part(rank) for rank in range(self._world_size)]
        merged = SliceTable.merge(parts)
        self._agreement.check(parts, merged)
        # Several ranks may refer to one file of a checkpoint before.
        files = list(dict.fromkeys(FileRecord(*f) for part in parts for f in part.metadata["files"]))
        self._check_sizes(files)
        table = merged.to_bytes()
        self._storage.write(f"{self.folder}/{TABLE}", table)
        files.append(FileRecord(TABLE, len(table), len(table), fingerprint(table)))
        record = CommitRecord(
            step=self.name.step,
            sequence=sequence(),
            run_id=run_id,
            world_size=self._world_size,
            created=datetime.now(UTC).isoformat(timespec="milliseconds"),
            files=tuple(files),
            shared=shared,
            versions=_versions(),
        )
        if self._admit is not None:
            self._admit()  # last: what is read here must still hold when the record is written
        self._storage.write_new(f"{self.folder}/{COMMIT}", record.to_bytes())
        self.table = merged
        return record

    def await_commit(self) -> None:
        """Other ranks: wait until rank 0 has committed."""
        # Rank 0 may vote last, and only then starts to wait for the others.
        timeout_s = 2 * self._timeout_s
        if not self._wait(self._is_committed, timeout_s):
            missing = self._missing()
            votes = f"; no vote from {_ranks(missing)}" if missing else ""
            raise CommitTimeout(f"{self.folder}: rank 0 did not commit within {timeout_s:g} s{votes}", missing or (0,))

    def cancel(self, error: BaseException) -> None:
        """Let whatever waits for other ranks raise `error` instead, unless it has gone on. From any thread."""
        self._cancelled = error

    def abandon(self, error: BaseException) -> None:
        """After a failure: free this rank's space and tell the other ranks.

        Does nothing once a commit may rely on this rank's files: after the vote of any rank but 0, unless the
        attempt was aborted by another, and after the commit itself. Raises StorageError if the storage does
        not let the others know; they then learn of the failure by their timeout.
        """
        aborted = self._aborted_by_other
        if (self._voted and self._rank and not aborted) or self._is_committed():
            return
        stem = rank_name(self._rank)
        for path in (f"{PARTS}/{stem}.arrow", f"{stem}.safetensors", f"{stem}.objects.json"):
            self._storage.remove(f"{self.folder}/{path}")
        if not aborted:
            reason = f"{type(error).__name__}: {error}".encode(errors="backslashreplace").decode()
            skipped = isinstance(error, SaveSkipped)
            text = objects.canonical({"rank": self._rank, "reason": reason, "skipped": skipped})
            self._storage.write(f"{self.folder}/{ABORT}", text)

    def _await_votes(self) -> None:
        if not self._wait(lambda: not self._missing(), self._timeout_s):
            missing = self._missing()
            raise CommitTimeout(f"{self.folder}: no vote from {_ranks(missing)} within {self._timeout_s:g} s", missing)

    def _missing(self) -> tuple[int, ...]:
        voted = sizes(self._storage, f"{self.folder}/{PARTS}")
        return tuple(r for r in range(self._world_size) if f"{rank_name(r)}.arrow" not in voted)

    def _wait(self, ready: Callable[[], bool], timeout_s: float) -> bool:
        """Return whether `ready` came true in time; raise SaveAborted as soon as a rank has failed."""
        deadline = time.monotonic() + timeout_s
        pause_s = _FIRST_PAUSE_S
        while True:
            if self._cancelled is not None:
                raise self._cancelled
            if ready():
                return True
            self._raise_if_aborted()
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                return False
            time.sleep(min(pause_s, left_s))
            pause_s = min(pause_s * 2, self._storage.longest_poll_s)

    def _raise_if_aborted(self) -> None:
        if self._cancelled is not None:
            raise self._cancelled
        path = f"{self.folder}/{ABORT}"
        if self._storage.size(path) is None:
            return
        record = objects.parse(self._storage.read(path), path)
        self._aborted_by_other = True
        if record.get("skipped"):
            raise SaveSkipped(f"{self.folder}: rank {record['rank']} skips it: {record['reason']}")
        raise SaveAborted(f"{self.folder}: rank {record['rank']} failed: {record['reason']}", record["rank"])

    def _check_sizes(self, files: Sequence[FileRecord]) -> None:
        """Raise StorageError unless the storage holds every file in its size, also those of other attempts, to stay."""
        paths = {file: file.path if "/" in file.path else f"{self.folder}/{file.path}" for file in files}
        found: dict[str, int] = {}
        folders = {path.rpartition("/")[0] for path in paths.values()}
        going = {folder for folder in folders if is_going(self._storage, folder)}
        for folder in folders:
            found |= {f"{folder}/{name}": nbytes for name, nbytes in sizes(self._storage, folder).items()}
        going |= {folder for folder in folders if f"{folder}/{REMOVAL}" in found}
        if going:
            raise StorageError(
                f"{self.folder}: cannot be committed: {', '.join(sorted(going))} is being removed (by gc?)"
            )
        for file, path in paths.items():
            if found.get(path) != file.nbytes:
                raise StorageError(
                    f"{path}: {file.nbytes} bytes were written, the storage holds {found.get(path, 'no such file')}"
                )

    def _is_committed(self) -> bool:
        return self._storage.size(f"{self.folder}/{COMMIT}") is not None

    def _read_part(self, rank: int) -> SliceTable:
        if rank == self._rank and self._own is not None:
            return self._own
        path = self._part(rank)
        return SliceTable.from_bytes(self._storage.read(path), path)

    def _part(self, rank: int) -> str:
        return f"{self.folder}/{PARTS}/{rank_name(rank)}.arrow"


def is_going(storage: Storage, folder: str) -> bool:
    """Whether a folder is being removed. Asked before its files are looked at: when the mark goes, they are gone."""
    return storage.size(f"{folder}/{REMOVAL}") is not None


def check_votes(parts: Sequence[SliceTable], merged: SliceTable) -> None:
    """Raise CoverageError unless the ranks' slices make every tensor whole, exactly once. Pure."""
    problems = []
    for rank, part in enumerate(parts):
        world_size = part.metadata["world_size"]
        if world_size != len(parts):
            problems.append(f"rank {rank} takes the world for {world_size} ranks, rank 0 for {len(parts)}")
        elif part.metadata["replicated"] != parts[0].metadata["replicated"]:
            problems.append(f"rank {rank} has other replicated tensors (names, shapes or dtypes) than rank 0")
    problems += merged.problems()
    if problems:
        raise CoverageError(f"the ranks' slices do not make one state: {brief(problems)}")


def brief(problems: Sequence[str], limit: int = 20) -> str:
    """Return the problems as one line, the first `limit` of them in full."""
    more = len(problems) - limit
    return "; ".join([*problems[:limit], *([f"and {more} more"] if more > 0 else [])])


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:16])) + (f" and {len(ranks) - 16} more" if len(ranks) > 16 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "pyarrow": pyarrow.__version__,
    }
