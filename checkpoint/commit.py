"""Prepare, vote, commit: how the files of many ranks become one checkpoint, or none.

    step-00000100.a0.5a3f…/            attempt 0 of step 100 in one launch; never written twice
        r00000.safetensors             prepare: every rank writes its tensors
        r00000.objects.json                     and its objects,
        parts/r00000.arrow             vote:    then its slice table, last
        slices.arrow                   commit:  rank 0 merges the tables when all have voted
        COMMIT.json                             and writes the record: from here the checkpoint exists
        ABORT.json                     instead: the first rank that fails says so, and the others stop

Ranks share nothing but the storage. The folder of an attempt is a function of what every rank knows: the step, how
often this launch saved that step before, and the launch's `run_id`, which is equal on all ranks and new for every
launch. So nothing is negotiated, and what a killed launch left behind lies under another name: it is neither waited
for nor mistaken for a vote.

A rank that voted can no longer abort, and rank 0 alone commits: COMMIT and another rank's ABORT exclude each other.
"""

from __future__ import annotations

import platform
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy
import pyarrow
import torch
import xxhash

from checkpoint import objects
from checkpoint.errors import (
    CheckpointError,
    CommitTimeout,
    CorruptCheckpoint,
    CoverageError,
    SaveAborted,
    StorageError,
)
from checkpoint.format import fingerprint
from checkpoint.manifest import SHARED, CommitRecord, FileRecord, SavedSlice, SliceTable
from checkpoint.reshard import coverage_problem
from checkpoint.storage import Storage, write
from checkpoint.writer import Written, rank_name

COMMIT = "COMMIT.json"
ABORT = "ABORT.json"
TABLE = "slices.arrow"
PARTS = "parts"

_FOLDER = re.compile(r"step-(\d{8,})\.a(\d+)\.([0-9a-f]{16})")


@dataclass(frozen=True, slots=True)
class AttemptName:
    """Names one attempt at saving one step."""

    step: int
    ordinal: int
    launch: str
    """Digest of the launch's run_id."""

    @classmethod
    def of(cls, step: int, ordinal: int, run_id: str) -> AttemptName:
        return cls(step, ordinal, xxhash.xxh3_64_hexdigest(run_id.encode()))

    @classmethod
    def parse(cls, folder: str) -> AttemptName | None:
        """Returns the attempt a folder's name stands for; None if it is no attempt's."""
        match = _FOLDER.fullmatch(folder)
        return cls(int(match[1]), int(match[2]), match[3]) if match else None

    @property
    def folder(self) -> str:
        return f"step-{self.step:08d}.a{self.ordinal}.{self.launch}"


class Attempt:
    """One rank's side of one attempt."""

    def __init__(
        self, storage: Storage, name: AttemptName, rank: int, world_size: int, timeout_s: float
    ) -> None:
        self.name = name
        self.folder = name.folder
        self._storage = storage
        self._rank = rank
        self._world_size = world_size
        self._timeout_s = timeout_s

    def begin(self) -> None:
        """Raises if another rank has failed already, or if this rank's files of this attempt exist."""
        self._raise_if_aborted()
        if self._storage.size(self._part(self._rank)) is not None:
            raise StorageError(
                f"{self.folder}: rank {self._rank} has voted in this attempt before; run_id must be new for every "
                "launch, and only one process may be this rank"
            )

    def vote(self, written: Written, replicated: str) -> None:
        """Says that this rank's files are durable; `replicated` fingerprints what it takes for replicated."""
        metadata = {
            "rank": self._rank,
            "world_size": self._world_size,
            "step": self.name.step,
            "files": [[f.path, f.nbytes, f.head_bytes, f.fingerprint] for f in written.files],
            "replicated": replicated,
        }
        table = SliceTable.of(written.rows, metadata)
        write(self._storage, self._part(self._rank), table.to_bytes())

    def commit(self, run_id: str, shared: Any, sequence: Callable[[], int]) -> CommitRecord:
        """Rank 0: waits for every vote, checks that they make one whole state, and commits it."""
        self._await_votes()
        parts = [self._read_part(rank) for rank in range(self._world_size)]
        merged = SliceTable.merge(parts, {})
        check_votes(parts, merged)
        files = [FileRecord(*f) for part in parts for f in part.metadata["files"]]
        for file in files:
            size = self._storage.size(f"{self.folder}/{file.path}")
            if size != file.nbytes:
                raise StorageError(
                    f"{self.folder}/{file.path}: {file.nbytes} bytes were written but the storage holds {size}"
                )
        table = merged.to_bytes()
        write(self._storage, f"{self.folder}/{TABLE}", table)
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
        write(self._storage, f"{self.folder}/{COMMIT}", record.to_bytes())
        return record

    def await_commit(self) -> CommitRecord:
        """Other ranks: waits until rank 0 has committed."""

        def committed() -> bool:
            return self._storage.size(f"{self.folder}/{COMMIT}") is not None

        if not self._wait(committed):
            missing = self._missing()
            raise CommitTimeout(
                f"{self.folder}: rank 0 did not commit within {self._timeout_s:g} s"
                + (f"; no vote from {_ranks(missing)}" if missing else ""),
                missing or (0,),
            )
        source = f"{self.folder}/{COMMIT}"
        return CommitRecord.from_bytes(self._storage.read(source), source)

    def abandon(self, error: BaseException) -> StorageError | None:
        """After a failure: frees this rank's space and tells the other ranks, unless the commit may have happened.

        Returns the storage's error if even that failed; the other ranks then learn of it by their timeout.
        """
        try:
            if self._storage.size(f"{self.folder}/{COMMIT}") is not None:
                return None
            stem = rank_name(self._rank)
            for path in (f"{PARTS}/{stem}.arrow", f"{stem}.safetensors", f"{stem}.objects.json"):
                self._storage.remove(f"{self.folder}/{path}")
            if not isinstance(error, SaveAborted):
                reason = f"{type(error).__name__}: {error}"
                text = objects.canonical({"rank": self._rank, "reason": reason})
                write(self._storage, f"{self.folder}/{ABORT}", text)
        except StorageError as second:
            return second
        return None

    def _await_votes(self) -> None:
        if not self._wait(lambda: not self._missing()):
            missing = self._missing()
            raise CommitTimeout(
                f"{self.folder}: no vote from {_ranks(missing)} within {self._timeout_s:g} s", missing
            )

    def _missing(self) -> tuple[int, ...]:
        voted = {entry.name for entry in self._storage.entries(f"{self.folder}/{PARTS}")}
        return tuple(r for r in range(self._world_size) if f"{rank_name(r)}.arrow" not in voted)

    def _wait(self, ready: Callable[[], bool]) -> bool:
        """Returns whether `ready` came true in time; raises SaveAborted as soon as a rank has failed."""
        deadline = time.monotonic() + self._timeout_s
        pause_s = 0.002
        while not ready():
            self._raise_if_aborted()
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                return False
            time.sleep(min(pause_s, left_s))
            pause_s = min(pause_s * 1.5, self._storage.longest_poll_s)
        return True

    def _raise_if_aborted(self) -> None:
        path = f"{self.folder}/{ABORT}"
        if self._storage.size(path) is None:
            return
        record = objects.parse(self._storage.read(path), path)
        raise SaveAborted(f"{self.folder}: rank {record['rank']} failed: {record['reason']}", record["rank"])

    def _read_part(self, rank: int) -> SliceTable:
        path = self._part(rank)
        return SliceTable.from_bytes(self._storage.read(path), path)

    def _part(self, rank: int) -> str:
        return f"{self.folder}/{PARTS}/{rank_name(rank)}.arrow"


def check_votes(parts: Sequence[SliceTable], merged: SliceTable) -> None:
    """Raises CoverageError unless the ranks' slices make every tensor whole, exactly once. Pure."""
    problems = []
    for rank, part in enumerate(parts):
        if part.metadata["world_size"] != len(parts):
            problems.append(
                f"rank {rank} takes the world for {part.metadata['world_size']} ranks, rank 0 for {len(parts)}"
            )
        elif part.metadata["replicated"] != parts[0].metadata["replicated"]:
            problems.append(f"rank {rank} has other replicated tensors (names, shapes or dtypes) than rank 0")
    problems += tensor_problems(merged)
    if problems:
        shown = problems[:20] + ([f"and {len(problems) - 20} more"] if len(problems) > 20 else [])
        raise CoverageError("the ranks' slices do not make one state: " + "; ".join(shown))


def tensor_problems(table: SliceTable) -> list[str]:
    """Returns what is wrong with each tensor of a table, by name. Pure."""
    problems = []
    kinds: dict[str, bool] = {}
    for name, owner in table.keys():  # noqa: SIM118  not a mapping
        rows = table.rows(name, owner)
        who = repr(name) if owner == SHARED else f"{name!r} of rank {owner}"
        if kinds.setdefault(name, owner == SHARED) != (owner == SHARED):
            problems.append(f"{who} is rank-local on some ranks and not on others")
        problem = _disagreement(rows) or coverage_problem(rows[0].global_shape, [r.region for r in rows])
        if problem:
            problems.append(f"{who} {problem}")
    return problems


def _disagreement(rows: Sequence[SavedSlice]) -> str | None:
    for row in rows[1:]:
        if (row.dtype, row.global_shape) != (rows[0].dtype, rows[0].global_shape):
            return (
                f"is {rows[0].dtype} {list(rows[0].global_shape)} in {rows[0].file} "
                f"but {row.dtype} {list(row.global_shape)} in {row.file}"
            )
    return None


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
