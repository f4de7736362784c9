"""Saves and loads: the object a training loop holds."""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from checkpoint import catalog
from checkpoint import objects as plain
from checkpoint.access import open_reader
from checkpoint.catalog import CheckpointInfo
from checkpoint.commit import Attempt, AttemptName
from checkpoint.config import CheckpointConfig
from checkpoint.errors import CheckpointError, CorruptCheckpoint, InvalidState, StorageError
from checkpoint.format import DTYPES, fingerprint
from checkpoint.handle import SaveHandle, SaveStats
from checkpoint.reader import Reader
from checkpoint.staging import Staged, Staging
from checkpoint.state import Piece, TensorLike, pieces_of, written_by
from checkpoint.storage import open_storage
from checkpoint.writer import write_rank

_GRACE_S = 10.0
"""Time a pending save gets to end when an error leaves the `with` block."""

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
    outcome: Future[tuple[CheckpointInfo, SaveStats]]
    attempt: Attempt
    staged: Sequence[Staged]
    objects: bytes
    shared: Any
    replicated: str
    called_s: float


class Checkpointer:
    """Saves a state that is spread over ranks, and loads it into any other spread.

    Every rank makes one with the same root, configuration, world size and run_id, and calls `save` for the
    same steps in the same order. Ranks meet in the storage alone; no process group is needed. One thread uses
    it.
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
        """Open a root: a path, or any fsspec URL with its `storage_options`.

        `run_id` is equal on all ranks and new for every launch; a single rank may leave it out. It keeps
        apart what this launch writes and what a killed one left behind.
        """
        self._config = config or CheckpointConfig()
        _check_arguments(self._config, rank, world_size, run_id)
        self._rank = rank
        self._world_size = world_size
        self._run_id = run_id or secrets.token_hex(8)
        self._storage = open_storage(root, storage_options)
        self._first_write_s: float | None = None
        self._staging = Staging()
        self._saves: Counter[int] = Counter()
        self._failed: set[AttemptName] = set()
        self._thread: threading.Thread | None = None
        self._handle: SaveHandle | None = None
        self._closed = False

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        # The block's own error is the one to tell, soon: other ranks may be gone, and their votes never come.
        try:
            self.close(timeout_s=_GRACE_S)
        except (CheckpointError, TimeoutError) as second:
            _log.warning("a save did not end well either: %s", second)

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
        """Start a save of this rank's part of the state; every rank calls it.

        Returns when the tensors have been copied to host memory: they may be mutated at once. Writing, voting
        and committing go on in the background. Waits first for the save before this one, and reports its
        error as `poll` does.

        Args:
            step: optimizer steps done.
            tensors: by name. A torch.Tensor is replicated: all ranks hold the same, one writes it.
            objects: this rank's plain Python values by name.
            shared: a plain Python value; rank 0's is kept in the commit record.

        Raises:
            InvalidState: the arguments cannot be saved; the other ranks' saves fail with SaveAborted.
        """
        called_s = time.monotonic()
        if self._closed:
            raise ValueError("save: this Checkpointer is closed")
        if type(step) is not int or step < 0:
            raise InvalidState(f"step: {step!r}; allowed are integers from 0")
        self._join()
        self.poll()
        name = AttemptName.of(step, self._saves[step], self._run_id)
        self._saves[step] += 1
        attempt = Attempt(self._storage, name, self._rank, self._world_size, self._config.commit_timeout_s)
        try:
            pieces = pieces_of(tensors)
            staged = self._staging.copy(written_by(self._rank, self._world_size, pieces))
            text = plain.encode(dict(objects or {}), "objects")
            tree = plain.to_json(shared, "shared")
            plain.encode(shared, "shared")  # what cannot be written is told here, not at the commit
        except BaseException as error:
            self._abandon(attempt, error)
            raise
        outcome: Future[tuple[CheckpointInfo, SaveStats]] = Future()
        self._handle = SaveHandle(step, time.monotonic() - called_s, outcome)
        job = _Job(self._handle, outcome, attempt, staged, text, tree, _fingerprint(pieces), called_s)
        self._thread = threading.Thread(target=self._run, args=(job,), name=f"checkpoint-{step}", daemon=True)
        self._thread.start()
        return self._handle

    def fence(self) -> None:
        """Return when the tensors of pending saves may be mutated; at once, since `save` copies them."""

    def poll(self) -> None:
        """Report the error of a save that ended: raise or warn, as configured. Never waits.

        An error is reported once; not at all if it was seen through its handle.
        """
        if self._handle is None or not self._handle.done():
            return
        handle, self._handle = self._handle, None
        if handle.error_seen:
            return
        error = handle.exception()
        if error is None:
            return
        if self._config.on_error == "raise":
            raise error
        _log.warning("the save of step %d failed, training goes on: %s", handle.step, error)

    def latest(self, verify: catalog.Verify = "quick") -> CheckpointInfo | None:
        """Return the newest checkpoint that verifies, None if nothing was committed; warn about each that it skips.

        `record` checks the commit record; `quick` also that every file has its size and the slice table its
        fingerprint; `deep` reads every byte.

        Raises:
            CorruptCheckpoint: there are checkpoints, and none verifies. StorageError: a read failed.
        """
        reader = catalog.latest(self._storage, verify)
        return catalog.info_of(reader) if reader else None

    def load(self, info: CheckpointInfo, tensors: Mapping[str, TensorLike], *, strict: bool = True) -> Loaded:
        """Fill the destinations in place with this rank's part, from whatever slices were saved.

        Nothing is overwritten before every byte that is needed has been verified. A checkpoint found damaged
        is marked, so that `latest` passes over it from then on. No communication: each rank loads for itself.

        Args:
            info: from `latest` or `list`, of this root or another.
            tensors: the destinations, described as for `save`; any device, any strides.
            strict: whether names on one side only are an error.

        Raises:
            StateMismatch: names, shapes or dtypes differ.
            CorruptCheckpoint: bytes are not what was committed; no destination was touched, unless the files changed
                or went away between their verification and the copy that follows it.
        """
        pieces = pieces_of(tensors)
        reader = self._reader(info)
        try:
            own = reader.objects(self._rank)
            shared = reader.shared
            report = reader.load(pieces, self._rank, strict=strict, buffer_bytes=self._config.load_buffer_bytes)
        except CorruptCheckpoint as error:
            self._condemn(reader, error)
            raise
        return Loaded(
            step=reader.record.step,
            objects=own,
            shared=shared,
            missing=report.missing,
            unexpected=report.unexpected,
            missing_local=report.missing_local,
            info=catalog.info_of(reader),
        )

    def close(self, timeout_s: float | None = None) -> None:
        """Wait for the pending save, report its error as `poll` does, release the staging memory. Idempotent.

        Raises TimeoutError if the save has not ended after `timeout_s`; it goes on while the process lives.
        """
        self._closed = True
        if not self._join(timeout_s):
            raise TimeoutError(f"a save is not committed {timeout_s} s after close was called")
        self._staging.release()
        self.poll()

    def list(self) -> list[CheckpointInfo]:
        """Return the checkpoints whose commit record verifies, oldest commit first."""
        return catalog.checkpoints(self._storage)

    def _reader(self, info: CheckpointInfo) -> Reader:
        if info.path == f"{self._storage.url}/{info.folder}":
            return Reader(self._storage, info.folder)
        return open_reader(info)

    def _condemn(self, reader: Reader, error: CorruptCheckpoint) -> None:
        try:
            reader.condemn(self._rank, error)
        except StorageError as second:
            error.add_note(f"it could not be marked as damaged: {second}")

    def _abandon(self, attempt: Attempt, error: BaseException) -> None:
        self._failed.add(attempt.name)
        try:
            attempt.abandon(error)
        except Exception as second:  # noqa: BLE001  carried by the first error, which must get through
            error.add_note(f"the other ranks could not be told and will time out: {second!r}")

    def _join(self, timeout_s: float | None = None) -> bool:
        """Wait for the thread of the last save; return whether it ended."""
        if self._thread is None:
            return True
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            return False
        self._thread = None
        return True

    def _run(self, job: _Job) -> None:
        """Be the thread of one save; whatever happens ends in its handle."""
        try:
            done = self._write_and_commit(job)
        except BaseException as error:  # noqa: BLE001  carried to the handle
            self._abandon(job.attempt, error)
            job.outcome.set_exception(error)
            return
        job.outcome.set_result(done)
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
            attempt.commit(self._run_id, job.shared, lambda: catalog.next_sequence(self._storage))
        else:
            attempt.await_commit()
        stats = SaveStats(
            blocked_s=job.handle.blocked_s,
            write_s=write_s,
            durable_s=time.monotonic() - job.called_s,
            nbytes=sum(s.piece.nbytes for s in job.staged),
        )
        return catalog.info_of(Reader(self._storage, attempt.folder)), stats

    def _collect(self, committed: AttemptName) -> None:
        """Remove what the newest checkpoint supersedes, and attempts that can no longer become one.

        Of this launch these are the attempts that failed here: every rank voted since, so none still writes
        to them. Of other launches, what was last written before anything of this launch's first checkpoint.
        """
        config = self._config
        try:
            if self._first_write_s is None:
                times = catalog.write_times(self._storage, committed.folder)
                self._first_write_s = min((t for t in times if t is not None), default=0.0)
            first_write_s = self._first_write_s

            def abandoned(name: AttemptName) -> bool:
                if name.launch == committed.launch:
                    return name in self._failed
                return catalog.is_idle_since(self._storage, name, first_write_s)

            folders = catalog.removable(
                self._storage, keep_last=config.keep_last, keep_every=config.keep_every, abandoned=abandoned
            )
            for folder in folders:
                catalog.remove(self._storage, folder)
        except CheckpointError as error:
            _log.warning("superseded checkpoints stay, the next save tries again: %s", error)


def _check_arguments(config: CheckpointConfig, rank: int, world_size: int, run_id: str) -> None:
    """Raise ValueError with everything that is wrong."""
    problems = []
    if world_size < 1 or not 0 <= rank < world_size:
        problems.append(f"rank: {rank} is not a rank of a world of {world_size}")
    if world_size > 1 and not run_id:
        problems.append("run_id: needed with several ranks: a text equal on all and new for every launch")
    for name, least in (("every", 0), ("keep_last", 1), ("keep_every", 0), ("load_buffer_bytes", 0)):
        if getattr(config, name) < least:
            problems.append(f"config.{name}: {getattr(config, name)}; allowed are integers from {least}")
    if config.commit_timeout_s <= 0:
        problems.append(f"config.commit_timeout_s: {config.commit_timeout_s}; allowed are seconds above 0")
    if config.on_error not in ("raise", "warn"):
        problems.append(f"config.on_error: {config.on_error!r}; allowed are 'raise' and 'warn'")
    if problems:
        raise ValueError("; ".join(sorted(problems)))


def _fingerprint(pieces: Sequence[Piece]) -> str:
    """Return what all ranks must agree on: the replicated tensors' names, types and shapes."""
    lines = sorted((p.name, DTYPES[p.tensor.dtype], *p.global_shape) for p in pieces if p.kind == "replicated")
    return fingerprint(plain.canonical(lines))
