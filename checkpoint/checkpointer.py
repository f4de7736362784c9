"""Saves and loads: the object a training loop holds."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from checkpoint import objects as plain
from checkpoint.catalog import Catalog, CheckpointInfo, Verify, info_of
from checkpoint.commit import Attempt, AttemptName
from checkpoint.config import CheckpointConfig
from checkpoint.errors import CheckpointError, InvalidState
from checkpoint.format import DTYPES, fingerprint
from checkpoint.handle import SaveHandle, SaveStats
from checkpoint.reader import Reader
from checkpoint.staging import Staged, stage
from checkpoint.state import Piece, TensorLike, owners, pieces_of
from checkpoint.storage import open_storage
from checkpoint.writer import write_rank

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a load brought beside the tensors it filled."""

    step: int
    """Step the checkpoint was saved after."""
    objects: dict[str, Any]
    """This rank's objects; empty if the saving world had no such rank."""
    shared: Any
    """What rank 0 handed to save as `shared`."""
    missing: tuple[str, ...]
    """strict=False: asked for, not in the checkpoint; left untouched."""
    unexpected: tuple[str, ...]
    """strict=False: in the checkpoint, not asked for."""
    missing_local: tuple[str, ...]
    """RankLocal entries that this rank has no saved counterpart for; left untouched."""
    info: CheckpointInfo
    """The checkpoint."""


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    """One save, handed to its thread."""

    handle: SaveHandle
    attempt: Attempt
    staged: Sequence[Staged]
    objects: bytes
    shared: Any
    replicated: str
    called_s: float


class Checkpointer:
    """Saves a state that is spread over ranks, and loads it into any other spread.

    Every rank makes one with the same root, configuration, world size and run_id, and calls `save` for the same
    steps in the same order. Ranks meet in the storage alone; no process group is needed. Methods are for one thread.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        config: CheckpointConfig | None = None,
        rank: int = 0,
        world_size: int = 1,
        run_id: str = "",
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        """Opens a root: a path or any fsspec URL.

        `run_id` is equal on all ranks and new for every launch; a single rank may leave it out. It keeps apart what
        this launch writes and what a killed one left behind.
        """
        if world_size < 1 or not 0 <= rank < world_size:
            raise ValueError(f"rank: {rank} is not a rank of a world of {world_size}")
        if world_size > 1 and not run_id:
            raise ValueError(
                "run_id: needed with several ranks: a text equal on all of them and new for every launch"
            )
        self._config = config or CheckpointConfig()
        self._rank = rank
        self._world_size = world_size
        self._run_id = run_id or secrets.token_hex(8)
        self._storage = open_storage(root, storage_options)
        self._catalog = Catalog(self._storage)
        self._opened_s = time.time()
        self._saves: Counter[int] = Counter()
        self._thread: threading.Thread | None = None
        self._pending: list[SaveHandle] = []
        self._closed = False

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        with contextlib.suppress(CheckpointError):  # the block's own error is the one to tell
            self.close()

    def should_save(self, step: int) -> bool:
        """Whether the configured cadence asks for a save after this step."""
        return self._config.every > 0 and step > 0 and step % self._config.every == 0

    def save(
        self,
        step: int,
        tensors: Mapping[str, TensorLike],
        objects: Mapping[str, Any] | None = None,
        *,
        shared: Any = None,
    ) -> SaveHandle:
        """Starts a save of this rank's part of the state; every rank calls it.

        Returns when the tensors have been copied to host memory: they may be mutated at once. Writing, voting and
        committing go on in the background. Waits first for the save before this one, and reports its error as
        `poll` does.

        Args:
            tensors: by name. A torch.Tensor is replicated: all ranks hold the same, one writes it.
            objects: this rank's plain Python values by name.
            shared: a plain Python value; rank 0's is kept in the commit record.

        Raises:
            InvalidState: the arguments cannot be saved; the other ranks' saves of this step fail with SaveAborted.
        """
        called_s = time.monotonic()
        self._check_open()
        self._join()
        self.poll()
        name = AttemptName.of(step, self._saves[step], self._run_id)
        self._saves[step] += 1
        attempt = Attempt(self._storage, name, self._rank, self._world_size, self._config.commit_timeout_s)
        try:
            if step < 0:
                raise InvalidState(f"step: {step} is negative")
            pieces = pieces_of(tensors)
            staged = stage(self._mine(pieces))
            text = plain.encode(dict(objects or {}), "objects")
            tree = plain.to_json(shared, "shared")
        except Exception as error:
            attempt.abandon(error)
            raise
        handle = SaveHandle(step, time.monotonic() - called_s)
        job = _Job(handle, attempt, staged, text, tree, _fingerprint(pieces), called_s)
        self._pending.append(handle)
        self._thread = threading.Thread(target=self._run, args=(job,), name=f"checkpoint-{step}", daemon=True)
        self._thread.start()
        return handle

    def fence(self) -> None:
        """Returns when the tensors of pending saves may be mutated; at once, since `save` copies them."""

    def poll(self) -> None:
        """Reports the errors of saves that ended: raises or warns, as configured. Never waits.

        An error that was seen through its handle is not reported again.
        """
        ended = [h for h in self._pending if h.done()]
        self._pending = [h for h in self._pending if not h.done()]
        for handle in ended:
            if handle._seen:
                continue
            error = handle.exception()
            if error is None:
                continue
            if self._config.on_error == "raise":
                raise error
            _log.warning("the save of step %d failed, training goes on: %s", handle.step, error)

    def latest(self, verify: Verify = "quick") -> CheckpointInfo | None:
        """Returns the newest checkpoint that verifies, None if there is none; warns about each that it skips.

        `record` checks the commit record; `quick` also that every file has its size and the slice table its
        fingerprint; `deep` reads every byte.
        """
        return self._catalog.latest(verify)

    def list(self) -> list[CheckpointInfo]:
        """Returns the checkpoints whose commit record verifies, oldest commit first."""
        return self._catalog.list()

    def load(self, info: CheckpointInfo, tensors: Mapping[str, TensorLike], *, strict: bool = True) -> Loaded:
        """Fills the destinations in place with this rank's part, from whatever slices were saved.

        Nothing is overwritten before every byte it needs has been verified. No communication: each rank loads for
        itself.

        Args:
            tensors: the destinations, described as for `save`; any device, any strides.
            strict: whether names on one side only are an error.

        Raises:
            StateMismatch: names, shapes or dtypes differ. CorruptCheckpoint: bytes are not what was committed.
        """
        self._check_open()
        reader = Reader(self._storage, info.folder)
        report = reader.load(
            pieces_of(tensors), self._rank, strict=strict, buffer_bytes=self._config.load_buffer_bytes
        )
        return Loaded(
            step=reader.record.step,
            objects=reader.objects(self._rank),
            shared=reader.shared,
            missing=report.missing,
            unexpected=report.unexpected,
            missing_local=report.missing_local,
            info=info_of(reader),
        )

    def close(self) -> None:
        """Waits for the pending save, then reports its error as `poll` does. Idempotent."""
        self._join()
        self._closed = True
        self.poll()

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("this Checkpointer is closed")

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _mine(self, pieces: Sequence[Piece]) -> list[Piece]:
        """Returns the pieces this rank writes."""
        owner = owners(pieces, self._world_size)
        return [
            p
            for p in pieces
            if owner.get(p.name, self._rank) == self._rank
            and (p.nbytes or not _numel(p) or p.kind != "sliced")
        ]

    def _run(self, job: _Job) -> None:
        """The thread of one save: whatever happens ends in the handle."""
        try:
            outcome = self._write_and_commit(job)
        except BaseException as error:  # noqa: BLE001  carried to the handle
            second = job.attempt.abandon(error)
            if second is not None:
                error.add_note(f"the other ranks could not be told and will time out: {second}")
            job.handle._future.set_exception(error)
            return
        job.handle._future.set_result(outcome)
        if self._rank == 0:
            self._collect(job.attempt.name)

    def _write_and_commit(self, job: _Job) -> tuple[CheckpointInfo, SaveStats]:
        attempt = job.attempt
        attempt.begin()
        begun_s = time.monotonic()
        written = write_rank(self._storage, attempt.folder, self._rank, job.staged, job.objects)
        write_s = time.monotonic() - begun_s
        attempt.vote(written, job.replicated)
        if self._rank == 0:
            attempt.commit(self._run_id, job.shared, self._catalog.next_sequence)
        else:
            attempt.await_commit()
        stats = SaveStats(
            blocked_s=job.handle.blocked_s,
            write_s=write_s,
            durable_s=time.monotonic() - job.called_s,
            nbytes=sum(s.piece.nbytes for s in job.staged),
        )
        return info_of(Reader(self._storage, attempt.folder)), stats

    def _collect(self, committed: AttemptName) -> None:
        """Removes what the new checkpoint supersedes, and what can no longer become a checkpoint."""
        try:
            _, _, uncommitted = self._catalog.scan()
            abandoned = [n for n in uncommitted if n.launch == committed.launch or self._is_left_over(n)]
            self._catalog.collect(
                keep_last=self._config.keep_last, keep_every=self._config.keep_every, abandoned=abandoned
            )
        except CheckpointError as error:
            _log.warning("superseded checkpoints stay, the next save tries again: %s", error)

    def _is_left_over(self, name: AttemptName) -> bool:
        """Whether nothing of another launch's attempt was written since this launch opened the root."""
        entries = self._storage.entries(name.folder) + self._storage.entries(f"{name.folder}/parts")
        times = [e.modified_s for e in entries if not e.is_folder]
        return all(t is not None and t < self._opened_s for t in times)


def _numel(piece: Piece) -> int:
    total = 1
    for n in piece.global_shape:
        total *= n
    return total


def _fingerprint(pieces: Sequence[Piece]) -> str:
    """Returns what all ranks must agree on: the replicated tensors' names, types and shapes."""
    lines = sorted(
        (p.name, DTYPES[p.tensor.dtype], *p.global_shape) for p in pieces if p.kind == "replicated"
    )
    return fingerprint(plain.canonical(lines))
