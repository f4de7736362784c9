"""Saves and loads: the object a training loop holds."""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Literal

from checkpoint import catalog, hooks
from checkpoint import objects as plain
from checkpoint.access import open_reader
from checkpoint.arena import slot_bytes
from checkpoint.catalog import CheckpointInfo
from checkpoint.comparison import Delta
from checkpoint.config import CheckpointConfig
from checkpoint.copies import moments
from checkpoint.errors import (
    CheckpointError,
    CommitTimeout,
    InvalidState,
    SaveAborted,
    SaveSkipped,
    StorageError,
)
from checkpoint.format import CHUNK_BYTES, DEVICE_CHUNK_BYTES
from checkpoint.handle import SaveHandle
from checkpoint.hooks import Hook
from checkpoint.loading import Loaded, load
from checkpoint.names import AttemptName
from checkpoint.opening import check_arguments
from checkpoint.planning import Planner, UpdateOrder
from checkpoint.preemption import Preemption
from checkpoint.promotion import Promoter
from checkpoint.reader import Reader
from checkpoint.request import Request
from checkpoint.saving import Saver
from checkpoint.state import TensorLike
from checkpoint.storage import Storage, open_storage
from checkpoint.tiers import Found, Gather, Tier, TierName, Tiers, alone, due, recover

_LEAST_SLOTS = 8
"""Staging memory that has no more large slots than this is better used in small ones."""

_GRACE_S = 10.0
"""Time a pending save gets to end when an error leaves the `with` block."""

OnError = Literal["raise", "warn"] | Callable[[BaseException], None]
"""What becomes of the error of a save."""

_log = logging.getLogger(__name__)


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
        memory: Storage | None = None,
        on_error: OnError | None = None,
    ) -> None:
        """Open a root: a path, or any fsspec URL with its `storage_options`. It is the local tier.

        `memory` is the storage of the memory tier (`checkpoint.hosts.join`). Copies to the configured remote tier that
        an earlier launch left unfinished are taken up; what its file system needs beside the URL is taken from that
        one's own environment (`AWS_ENDPOINT_URL`, `FSSPEC_S3_…`).

        `run_id` is equal on all ranks and new for every launch; a single rank may leave it out. It keeps
        apart what this launch writes and what a killed one left behind. `on_error` takes the place of the configured
        one, and may be a function that is called with each error of a save, by `poll`.
        """
        self._config = config or CheckpointConfig()
        check_arguments(self._config, rank, world_size, run_id)
        if self._config.memory.every and memory is None:
            raise ValueError("config.memory.every: needs the storage of the memory tier: memory=hosts.join(…)")
        self._rank = rank
        self._world_size = world_size
        self._run_id = run_id or secrets.token_hex(8)
        self._storage = open_storage(root, storage_options, direct_io=self._config.direct_io)
        self._on_error: OnError = on_error if on_error is not None else self._config.on_error
        self._planner = Planner(rank, world_size, _device_parcel_bytes(self._config))
        url, direct_io = self._config.remote.url, self._config.direct_io
        remote = open_storage(url, direct_io=direct_io) if url else None
        places: list[tuple[TierName, Storage | None]] = [
            ("memory", memory),
            ("local", self._storage),
            ("remote", remote),
        ]
        if self._config.writer == "process":
            from checkpoint.process import check_reachable

            check_reachable([storage for storage in (memory, self._storage) if storage is not None])
        self._tiers = Tiers([Tier(name, storage) for name, storage in places if storage is not None])
        self._promoter = None if remote is None else self._new_promoter(remote)
        self._delta = Delta(self._storage, rank) if self._config.delta else None
        self._saver = Saver(self._config, rank, world_size, self._run_id, self._tiers, self._promoter)
        deadline_s = self._config.urgent_deadline_s
        self._preemption = Preemption(self._start_ahead, self._saver.cancel, deadline_s, is_alone=world_size == 1)
        self._armed_with: tuple[Any, ...] = ()
        self._handles: list[SaveHandle] = []
        self.num_skipped = 0
        """Saves that were skipped because too many were under way, in each tier."""
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
        """Whether the cadence of any tier asks for a save after this step."""
        return bool(due(self._config, step))

    def save(
        self,
        step: int,
        tensors: Mapping[str, TensorLike],
        objects: Mapping[str, Any] | None = None,
        *,
        shared: Any = None,
        update_order: UpdateOrder = (),
        urgent: bool = False,
        tiers: Sequence[TierName] | None = None,
    ) -> SaveHandle:
        """Start a save of this rank's part of the state; every rank calls it. Returns in milliseconds.

        The tensors are copied in the background: call `fence` before they are mutated, or let `fence_on` do it.
        A save whose tensors are mutated all the same fails with TornSnapshot. Writing, voting and committing go on
        in the background too. Errors of saves before are reported as `poll` does. A save that `preempt` started for
        this step is joined, also if it has failed: a second call tries again. With two saves still under way it
        waits for the older one, or skips this one, as `on_pressure` says.

        Args:
            step: optimizer steps done.
            tensors: by name. A torch.Tensor is replicated: all ranks hold the same, one writes it.
            objects: this rank's plain Python values by name.
            shared: a plain Python value; rank 0's is kept in the commit record.
            update_order: names of the tensors that are updated first, second, …; those not named are updated first.
            urgent: fail unless committed within the configured `urgent_deadline_s`; goes to the local tier too.
            tiers: where it goes, and then it is never skipped; as configured for the step without, or to the local tier
                where none is due.

        Raises:
            InvalidState: the arguments cannot be saved; the other ranks' saves fail with SaveAborted.
        """
        called_s = time.monotonic()
        self._check(step)
        chosen = self._chosen(step, urgent, tiers)
        try:
            self.poll()
            request = self._aimed(self._request(step, tensors, objects, shared, update_order), chosen)
        except BaseException as error:
            with self._preemption.lock:
                name, ahead = self._saver.name(step), self._preemption.join(step)
            if ahead is None:
                self._saver.abandon(name, self._targets(chosen), error)
            raise
        if urgent:
            request = replace(request, deadline_s=self._config.urgent_deadline_s)
        has_room = urgent or self._saver.has_room(may_skip=tiers is None)
        with self._preemption.lock:
            name, handle = self._saver.name(step), self._preemption.join(step)
            if handle is None:
                handle = self._start(name, request) if has_room else self._saver.skip(name, request)
                self._preemption.note(handle)
        handle.is_wished = False
        self._handles.append(handle)
        handle.call_s += time.monotonic() - called_s
        return handle

    def arm(
        self,
        step: int,
        tensors: Mapping[str, TensorLike],
        objects: Mapping[str, Any] | None = None,
        *,
        shared: Any = None,
        update_order: UpdateOrder = (),
    ) -> None:
        """Keep a state at hand for `preempt`: call it after every update, with what `save` would get.

        Nothing is copied. The tensors must stay as they are until the next fence, which is where the update begins.
        Raises InvalidState; an urgent save that was waiting for this moment is started.
        """
        self._check(step)
        request = self._request(step, tensors, objects, shared, update_order)
        self._armed_with = (tensors, objects, shared, update_order)
        self._preemption.arm(self._aimed(request, self._chosen(step, True, None)))

    def preempt(self) -> None:
        """Save what is armed at once, in the middle of a step; or as soon as the update that is under way is over.

        The save is urgent (`urgent_deadline_s`) and is found in `preempted`. Returns at once; any thread may call it,
        and any handler of a signal.
        """
        self._preemption.wish()

    @property
    def preempted(self) -> SaveHandle | None:
        """Return the last save that `preempt` started, None before there is one."""
        return self._preemption.handle

    def prepare(self, tensors: Mapping[str, TensorLike], update_order: UpdateOrder = ()) -> None:
        """Get ready to save such tensors: staging memory is got and locked for GPUs (0.8 s per GiB), the plan is made.

        Without it, the first save does so, and the fence behind it waits. Raises InvalidState.
        """
        self._saver.prepare(self._planner.draft(tensors, update_order))

    def fence(self, group: int | None = None) -> None:
        """Return when the tensors that are updated in turn `group`, or before, may be mutated; None stands for all.

        On GPUs that holds for what is ordered on the current stream from now on, and the host hardly waits.
        """
        self._preemption.update_begins()
        self._saver.fence(group)

    def fence_storages(self, addresses: Callable[[], set[int]]) -> None:
        """As `fence`, for the tensors in some storages; `addresses` says where they start, if it is asked."""
        self._preemption.update_begins()
        self._saver.fence_storages(addresses)

    def fence_on(self, target: Any) -> Hook:
        """Fence before every update of a torch optimizer or a DeepSpeed engine, for just what it updates.

        Remove the hook that is returned to stop that. Raises TypeError.
        """
        return hooks.fence_on(target, self)

    def poll(self) -> None:
        """Report the errors of saves that ended: raise or warn, as configured. Never waits.

        What the memory tier could not store is only warned about, and so is what the remote tier could not.
        An error is reported once; not at all if it was seen through its handle. Of several, the first is raised.
        """
        ended = [h for h in self._handles if h.done()]
        self._handles = [h for h in self._handles if not h.done()]
        found: list[BaseException] = []
        for handle in ended:
            for outcome in handle.outcomes:
                error = None if outcome.error_seen else outcome.exception()
                if isinstance(error, SaveSkipped):
                    self.num_skipped += 1
                elif error is not None:
                    _log.warning("the save of step %d failed, training goes on: %s", handle.step, error)
                    # A lost host takes agents with it: that must not end the training of the others.
                    is_loss = isinstance(error, StorageError | CommitTimeout | SaveAborted)
                    is_told = callable(self._on_error) or not (outcome.tier == "memory" and is_loss)
                    found += [error] if is_told and not handle.is_wished else []
        if callable(self._on_error):
            for error in found:
                self._on_error(error)
        elif found and self._on_error == "raise":
            raise found[0]

    def latest(self, verify: catalog.Verify = "quick") -> CheckpointInfo | None:
        """Return the newest checkpoint that verifies, from the nearest tier that has it; warn about each that it skips.

        None if nothing was committed in any tier, and all can be read.

        `record` checks the commit record; `quick` also that every file has its size and the slice table its
        fingerprint; `deep` reads every byte.

        Raises:
            CorruptCheckpoint: there are checkpoints, and none verifies. StorageError: a tier could not be read, and no
                other has a checkpoint.
        """
        found = self._tiers.latest(verify)
        return found.info if found else None

    def recover(
        self,
        tensors: Mapping[str, TensorLike],
        *,
        strict: bool = True,
        verify: catalog.Verify = "quick",
        gather: Gather = alone,
    ) -> Loaded | None:
        """Load the newest checkpoint that every rank can load, from the nearest tier; None if nothing was committed.

        A copy found damaged gives way to that of the next tier, then to the checkpoint before; `skipped` tells. Every
        rank calls it, with a `gather` that hands a JSON value of each to all (`all_gather_object`, say), so that all
        ranks load the same. If strict, what the destinations hold counts for nothing, as with `load(…, fresh=True)`.

        Raises:
            StateMismatch: on any rank, as `load`. CorruptCheckpoint, StorageError: as `latest`.
        """

        def load_found(found: Found) -> Loaded:
            tier = found.tier.name
            return load(found.reader, tensors, self._rank, self._config, strict=strict, tier=tier, fresh=strict)

        taken = recover(self._tiers, load_found, verify=verify, gather=gather)
        return replace(taken.value, skipped=taken.skipped) if taken else None

    def load(
        self, info: CheckpointInfo, tensors: Mapping[str, TensorLike], *, strict: bool = True, fresh: bool = False
    ) -> Loaded:
        """Fill the destinations in place with this rank's part, from whatever slices were saved.

        Nothing is overwritten before every byte that is needed has been verified. A checkpoint found damaged
        is marked, so that `latest` passes over it from then on. No communication: each rank loads for itself.

        Args:
            info: from `latest` or `list`, of this root or another.
            tensors: the destinations, described as for `save`; any device, any strides.
            strict: whether names on one side only are an error.
            fresh: whether the destinations hold nothing worth keeping: each chunk is then copied as soon as it is
                verified itself, in one reading instead of two; after an error they are partly overwritten.

        Raises:
            StateMismatch: names, shapes or dtypes differ.
            CorruptCheckpoint: bytes are not what was committed; no destination was touched, unless the files changed
                or went away between their verification and the copy that follows it.
        """
        return load(self._reader(info), tensors, self._rank, self._config, strict=strict, tier=info.tier, fresh=fresh)

    def admit_with(self, admit: Callable[[], object]) -> None:
        """Call `admit` on rank 0 before each commit, and before what it supersedes is removed.

        It raises where this process may do neither any more, because the job goes on without it; the save then fails
        with that. Call it before the first save.
        """
        self._saver.admit = admit

    def cancel(self, error: BaseException) -> None:
        """Let every save under way fail with `error`, unless it is being committed already. Any thread may call it.

        For a job that lost ranks: their votes will never come, and `close` need not wait for them.
        """
        self._saver.cancel_all(error)

    def distrust(self, after_step: int, reason: str) -> int:
        """Mark all checkpoints of later steps, in every tier, as wrong though whole; return how many there were.

        `latest` and `recover` pass over them from then on; their files stay, and none is copied to the remote tier any
        more. For a run that learns late that it went wrong. One rank calls it, before any loads.

        Raises:
            StorageError: one could not be marked, or a tier not be read.
        """
        outcomes: dict[str, bool] = {}  # by URL: whether it was still there
        unmarked: list[str] = []
        # Again until nothing is new: one may have been copied meanwhile, by who did not see its mark yet.
        while True:
            found, reasons = self._tiers.candidates()
            wrong = [one.reader for one in found if one.reader.record.step > after_step]
            new = [reader for reader in wrong if reader.url not in outcomes]
            for reader in new:
                outcomes[reader.url] = False
                try:
                    outcomes[reader.url] = reader.distrust(self._rank, reason)
                except StorageError as error:
                    unmarked.append(f"{reader.url} bears no mark: {error}")
            if not new:
                break
        unmarked += [str(one) for one in reasons if isinstance(one, StorageError)]
        if unmarked:
            raise StorageError(
                f"not all checkpoints after step {after_step} are marked as wrong: {'; '.join(unmarked)}"
            )
        return sum(outcomes.values())

    def close(self, timeout_s: float | None = None) -> None:
        """Wait for the pending saves, report their errors as `poll` does, release the staging memory. Idempotent.

        A copy to the remote tier is waited for too, but not tried again if it fails: the next launch goes on with it.

        Raises TimeoutError if one has not ended after `timeout_s`; it goes on while the process lives.
        """
        self._closed = True
        if self._saver.pid != os.getpid():  # what is to be closed is another process's
            return
        self._saver.is_closing = True
        self._preemption.close()
        end_s = None if timeout_s is None else time.monotonic() + timeout_s
        if not self._saver.wait(timeout_s=timeout_s):
            raise TimeoutError(f"a save is not committed {timeout_s} s after close was called")
        self._saver.close()
        left_s = None if end_s is None else max(0.0, end_s - time.monotonic())
        if self._promoter is not None and not self._promoter.close(left_s):
            raise TimeoutError(
                f"a copy to {self._config.remote.url} has not ended {timeout_s} s after close was called"
            )
        self.poll()

    def list(self) -> list[CheckpointInfo]:
        """Return the checkpoints of all tiers whose commit record verifies, oldest save first."""
        return self._tiers.checkpoints()

    def _new_promoter(self, remote: Storage) -> Promoter:
        return Promoter(
            self._storage,
            remote,
            self._config.remote,
            rank=self._rank,
            world_size=self._world_size,
            timeout_s=self._config.commit_timeout_s,
        )

    def _reader(self, info: CheckpointInfo) -> Reader:
        found = self._tiers.find(info.path)
        return found.reader if found else open_reader(info)

    def _check(self, step: int) -> None:
        if self._closed:
            raise ValueError("save: this Checkpointer is closed")
        if self._saver.pid != os.getpid():
            raise ValueError("save: this Checkpointer was made before the process was forked; make one here")
        if type(step) is not int or step < 0:
            raise InvalidState(f"step: {step!r}; allowed are integers from 0")

    def _request(
        self, step: int, tensors: Mapping[str, TensorLike], objects: Any, shared: Any, update_order: UpdateOrder
    ) -> Request:
        """Return what a save needs. Raises InvalidState."""
        armed = self._preemption.armed_at(step)
        given = (tensors, objects, shared, update_order)
        if armed and all(a is b for a, b in zip(given, self._armed_with, strict=True)):
            return replace(armed, deadline_s=None)
        draft = self._planner.draft(tensors, update_order)
        plain.encode(shared, "shared")  # what cannot be written is told here, not at the commit
        return Request(
            step=step,
            draft=draft,
            moments=moments(draft.blueprint.devices),
            objects=plain.encode(dict(objects or {}), "objects"),
            shared=plain.to_json(shared, "shared"),
            tiers=(),
            delta=self._delta,
        )

    def _start_ahead(self, request: Request, is_asked: bool) -> SaveHandle:
        """Start a save for a wish: in other tiers of the last attempt that `save` asked for, or ahead of the next."""
        return self._start(self._saver.name_ahead(request.step, is_asked=is_asked), request)

    def _start(self, name: AttemptName, request: Request) -> SaveHandle:
        try:
            return self._saver.start(name, request)
        except BaseException as error:
            self._saver.abandon(name, request.tiers, error)
            raise

    def _chosen(self, step: int, urgent: bool, tiers: Sequence[TierName] | None) -> set[TierName]:
        """Return where the save of a step goes, sooner or later."""
        chosen: set[TierName] = set(due(self._config, step) if tiers is None else tiers)
        if not chosen or urgent:
            chosen.add("local")
        absent = sorted(name for name in chosen if self._tiers.storage(name) is None)
        if absent or ("remote" in chosen and "local" not in chosen):
            had = ", ".join(tier.name for tier in self._tiers.tiers)
            raise InvalidState(f"tiers: {sorted(chosen)}; there are {had}, and the remote one takes what is local")
        return chosen

    def _targets(self, chosen: set[TierName]) -> Sequence[tuple[str, Storage]]:
        """Return where a save goes at once."""
        return [(tier.name, tier.storage) for tier in self._tiers.tiers if tier.name in chosen - {"remote"}]

    def _aimed(self, request: Request, chosen: set[TierName]) -> Request:
        return replace(request, tiers=self._targets(chosen), promoted="remote" in chosen)


def _device_parcel_bytes(config: CheckpointConfig) -> int:
    """Return how much of a state on a GPU is copied at once: little where all of the staging memory is."""
    has_room = config.staging_bytes == "auto" or config.staging_bytes >= _LEAST_SLOTS * slot_bytes(DEVICE_CHUNK_BYTES)
    return DEVICE_CHUNK_BYTES if has_room else CHUNK_BYTES
