"""Saves on their way: copied, written and committed in the background, one after the other."""

from __future__ import annotations

import atexit
import functools
import logging
import os
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from checkpoint import catalog, process
from checkpoint.arena import Arena, Slot, free_memory_bytes, slot_bytes
from checkpoint.commit import Agreement, Attempt
from checkpoint.config import CheckpointConfig
from checkpoint.errors import SaveFailed, SaveSkipped, StorageError
from checkpoint.format import fingerprint
from checkpoint.handle import Outcome, SaveHandle, SaveStats
from checkpoint.manifest import FileRecord, TableForm
from checkpoint.names import AttemptName
from checkpoint.planning import Draft
from checkpoint.promotion import Promoter
from checkpoint.reader import Reader
from checkpoint.request import Request, Save, new_handle
from checkpoint.retention import Retention
from checkpoint.shard import ShardPlan, Written, plan_shard, rank_name
from checkpoint.spans import Trace
from checkpoint.staging import Copier, Snapshot
from checkpoint.storage import Storage
from checkpoint.tiers import Tiers
from checkpoint.writer import Drain, Flow, Target, ThreadDrain

_MAX_UNDER_WAY = 2
"""Saves: one being written while the next is copied."""

_TOUCHING = 8
"""Threads that let the pages of staging memory exist."""

_EXIT_S = 10.0
"""Time that saves under way get when the process ends and nobody has called close."""

_LOOK_S = 0.2
"""Between two looks at whether a save that waits for the one before has been given up."""

_log = logging.getLogger(__name__)
_savers: weakref.WeakSet[Saver] = weakref.WeakSet()


@atexit.register
def _see_off() -> None:
    for saver in list(_savers):
        saver.see_off()


class Saver:
    """Carries out the saves of one rank. One thread at a time starts them."""

    def __init__(
        self,
        config: CheckpointConfig,
        rank: int,
        world_size: int,
        run_id: str,
        tiers: Tiers,
        promoter: Promoter | None,
    ) -> None:
        self.admit: Callable[[], object] | None = None
        """Called before each commit and before anything is removed; raises where this process may do neither."""
        self.pid = os.getpid()
        """The process whose threads carry the saves out; a fork of it has none."""
        self.is_closing = False
        """Whether somebody waits for the saves, so that the end of the process need not."""
        self._tiers = tiers
        self._promoter = promoter
        self._config = config
        self._rank = rank
        self._world_size = world_size
        self._run_id = run_id
        self._num_saves = 0
        self._ordinals: Counter[int] = Counter()
        self._retention: dict[str, Retention] = {tier.name: Retention.of(config, tier.name) for tier in tiers.tiers}
        self._agreements: dict[str, Agreement] = {tier.name: Agreement() for tier in tiers.tiers}
        self._form: tuple[ShardPlan, TableForm] | None = None
        self._arena: Arena | None = None
        self._copier: Copier | None = None
        self._drain: Drain | None = None
        self._under_way: list[tuple[Save, threading.Thread]] = []
        self._telling: list[threading.Thread] = []
        self._lock = threading.Lock()
        _savers.add(self)

    def name_ahead(self, step: int, *, is_asked: bool) -> AttemptName:
        """Return what `name` will return next for a step; or, if `is_asked`, what it returned last."""
        return AttemptName.of(step, self._ordinals[step] - is_asked, self._run_id)

    def name(self, step: int) -> AttemptName:
        """Return the name of the next attempt at a step; every rank asks as often, and gets the same."""
        name = AttemptName.of(step, self._ordinals[step], self._run_id)
        self._ordinals[step] += 1
        return name

    def abandon(self, name: AttemptName, tiers: Sequence[tuple[str, Storage]], error: BaseException) -> None:
        """Tell the other ranks that this one cannot take part in an attempt."""
        for tier, storage in tiers:
            self._abandon(tier, self._attempt(tier, name, storage, None), error)

    def has_room(self, *, may_skip: bool) -> bool:
        """Return whether another save may start; while there are too many, wait, unless it is to be skipped then."""
        return self.wait(_MAX_UNDER_WAY - 1, 0 if may_skip and self._config.on_pressure == "skip" else None)

    def start(self, name: AttemptName, request: Request) -> SaveHandle:
        """Start a save, however many are under way."""
        called_s = time.monotonic()
        arena, copier = self._arena_for(request.draft)
        trace = Trace()
        # By the copier, which has the bytes in its cache; not where another process has nothing else to do.
        is_digested = isinstance(self._drain, ThreadDrain)
        snapshot = Snapshot(request.draft, request.moments, arena, trace, is_digested=is_digested)
        tiers = [tier for tier, _ in request.tiers]
        handle = new_handle(request, snapshot, trace)
        attempts = {t: self._attempt(t, name, storage, request.deadline_s) for t, storage in request.tiers}
        after = {t: e for save, _ in self._running() for t, e in save.ended.items()}
        ended = {tier: threading.Event() for tier in tiers}
        self._num_saves += 1
        save = Save(request, handle, self._num_saves, snapshot, trace, called_s, attempts, after, ended)
        self._run(save, self._conduct)
        # Last: the copier begins at once, and would keep the interpreter from the caller for milliseconds.
        copier.submit(snapshot, request.draft, functools.partial(self._plan, save), save.plan_fails)
        return handle

    def skip(self, name: AttemptName, request: Request) -> SaveHandle:
        """Return a save that is skipped here, and so by every rank."""
        handle = new_handle(request, None, Trace())
        error = SaveSkipped(
            f"step {request.step} is not saved: rank {self._rank} still writes {len(self._running())} saves before it"
        )
        handle.fail(error)
        self._telling = [thread for thread in self._telling if thread.is_alive()]
        self._telling.append(threading.Thread(target=self.abandon, args=(name, request.tiers, error), daemon=True))
        self._telling[-1].start()
        return handle

    def cancel(self, handle: SaveHandle, error: BaseException) -> None:
        """Let a save fail, unless it is being committed already."""
        for save, _ in self._running():
            if save.handle is handle:
                self._fail_all(save, error)

    def cancel_all(self, error: BaseException) -> None:
        """Let every save under way fail, unless it is being committed already. From any thread."""
        for save, _ in self._running():
            self._fail_all(save, error)

    def prepare(self, draft: Draft) -> None:
        """Get the memory that saves of such a state need, and lock it for its GPUs."""
        arena, _ = self._arena_for(draft)
        slots = []
        try:
            while (slot := arena.try_take()) is not None:
                slots.append(slot)
            with ThreadPoolExecutor(min(_TOUCHING, os.cpu_count() or 1)) as pool:
                list(pool.map(Slot.touch, slots))  # what is there already is locked in a fraction of the time
            if draft.blueprint.devices:
                for slot in slots:
                    slot.pin()
        finally:
            for slot in slots:
                arena.give_back(slot)

    def fence(self, group: int | None) -> None:
        """Return when the tensors that are updated in turn `group` or before may be mutated."""
        if self._copier is not None:
            self._copier.fence(group, self._config.commit_timeout_s)

    def fence_storages(self, addresses: Callable[[], set[int]]) -> None:
        """Return when all tensors in some storages may be mutated."""
        if self._copier is not None:
            self._copier.fence_storages(addresses, self._config.commit_timeout_s)

    def wait(self, at_most: int = 0, timeout_s: float | None = None) -> bool:
        """Wait until no more than `at_most` saves are under way; return whether that came in time."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while len(running := self._running()) > at_most:
            left_s = None if deadline is None else deadline - time.monotonic()
            if left_s is not None and left_s <= 0:
                return False
            running[0][1].join(left_s)
        return True

    def see_off(self) -> None:
        """Give the saves under way a moment before the process ends, and say which of them are lost."""
        if self.is_closing or self.pid != os.getpid() or self.wait(timeout_s=_EXIT_S):
            return
        for save, _ in self._running():
            _log.warning("the save of step %d is lost: the process ends before it; call close()", save.request.step)

    def close(self) -> None:
        """Release threads and memory; no save may be under way. Idempotent."""
        for thread in self._telling:
            thread.join()
        if self._copier is not None:
            self._copier.close()
        if self._drain is not None:
            self._drain.close()
        if self._arena is not None:
            self._arena.close()
        self._arena = self._copier = self._drain = None

    def _arena_for(self, draft: Draft) -> tuple[Arena, Copier]:
        """Return the arena, with room for a state, and its copier."""
        needed = max(1, len(draft.blueprint.shard.parcels))
        if self._arena is None or self._copier is None:
            nbytes = self._config.staging_bytes
            is_file = self._has_writer_process(draft)
            size = slot_bytes(draft.blueprint.shard.parcel_bytes)
            if nbytes == "auto":
                share = free_memory_bytes() // 4 // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
                self._arena = Arena(max(2, share // size), 2, is_file=is_file, slot_bytes=size)
            else:
                self._arena = Arena(nbytes // size, is_file=is_file, slot_bytes=size)
            self._copier = Copier(self._arena)
            self._drain = self._new_drain(in_process=is_file)
        self._arena.allow(needed)
        return self._arena, self._copier

    def _has_writer_process(self, draft: Draft) -> bool:
        if self._config.writer != "auto":
            return self._config.writer == "process"
        places = [tier.storage for tier in self._tiers.tiers if tier.name != "remote"]
        return bool(draft.blueprint.devices) and process.can_reach(places)

    def _new_drain(self, *, in_process: bool) -> Drain:
        if in_process:
            return process.ProcessDrain(self._config.writer_threads)
        return ThreadDrain(self._config.writer_threads)

    def _attempt(self, tier: str, name: AttemptName, storage: Storage, deadline_s: float | None) -> Attempt:
        timeout_s = min(self._config.commit_timeout_s, deadline_s or self._config.commit_timeout_s)
        return Attempt(storage, name, self._rank, self._world_size, timeout_s, self._agreements[tier], self.admit)

    def _run(self, save: Save, work: Callable[[Save], None]) -> None:
        thread = threading.Thread(target=work, args=(save,), name=f"checkpoint-step-{save.request.step}", daemon=True)
        thread.start()
        with self._lock:
            self._under_way.append((save, thread))

    def _running(self) -> list[tuple[Save, threading.Thread]]:
        """Return the saves under way, oldest first, and their threads."""
        with self._lock:
            self._under_way = [(save, thread) for save, thread in self._under_way if thread.is_alive()]
            return list(self._under_way)

    # What follows runs in the background

    def _plan(self, save: Save) -> ShardPlan:
        """Return what the copier has to copy, for the writers to know as well."""
        request = save.request
        blueprint = request.draft.blueprint
        try:
            plan, known = blueprint.shard, None
            if request.delta is not None and [tier for tier, _ in request.tiers] == ["local"]:
                pieces = [request.draft.piece(i) for i in range(len(blueprint.pieces))]
                with save.trace.span("compare", sum(piece.nbytes for piece in pieces)):
                    known = request.delta.narrow(pieces, request.moments)
                plan = plan_shard(blueprint.pieces, known.parts, blueprint.groups, self._rank, plan.parcel_bytes)
        except BaseException as error:
            save.plan.set_exception(error)
            raise
        save.plan.set_result((plan, known))
        return plan

    def _conduct(self, save: Save) -> None:
        """Be the thread of one save; whatever happens ends in its handle."""
        timer = self._watch(save)
        try:
            flow, tiers = self._open(save)
            if flow is not None:
                threads = [
                    threading.Thread(target=self._finish, args=(save, t, flow), name=f"checkpoint-{t}", daemon=True)
                    for t in tiers[1:]
                ]
                for thread in threads:
                    thread.start()
                for tier in tiers[:1]:
                    self._finish(save, tier, flow)
                for thread in threads:
                    thread.join()
        except BaseException as error:  # noqa: BLE001  carried to the handle
            self._fail_all(save, error)
        finally:
            if timer is not None:
                timer.cancel()
            for event in save.ended.values():
                event.set()

    def _watch(self, save: Save) -> threading.Timer | None:
        """Let an urgent save fail when its time is over, wherever it then hangs."""
        deadline_s = save.request.deadline_s
        if deadline_s is None:
            return None
        error = SaveFailed(
            f"step {save.request.step}: the urgent save was not committed within its {deadline_s:g} s; "
            "raise urgent_deadline_s, or give it a faster tier"
        )
        timer = threading.Timer(deadline_s, self._fail_all, args=(save, error))
        timer.daemon = True
        timer.start()
        return timer

    def _fail_all(self, save: Save, error: BaseException) -> None:
        """End a save wherever it has not ended."""
        save.snapshot.fail(error)
        save.handle.fail(error)
        for attempt in save.attempts.values():
            attempt.cancel(error)

    def _open(self, save: Save) -> tuple[Flow | None, list[str]]:
        """Begin the attempts and let the copies flow to the tiers where that went well; return these.

        Also of a save that was given up meanwhile: whoever has begun an attempt sees it through, or the other ranks
        would not be told.
        """
        begun = []
        for tier, storage in save.request.tiers:
            attempt = save.attempts[tier]
            try:
                attempt.begin()
                # Before the shard: of an upload that is killed, an object store shows no folder by itself, and what
                # nobody sees is not collected. New: a second process that takes itself for this rank ends here.
                storage.write_new(f"{attempt.folder}/{rank_name(self._rank)}.objects.json", save.request.objects)
            except BaseException as error:  # noqa: BLE001  carried to the handle
                self._end_badly(save, tier, error)
            else:
                begun.append(tier)
        if not begun:
            return None, []
        targets = [
            Target(tier, storage, f"{save.attempts[tier].folder}/{rank_name(self._rank)}.safetensors")
            for tier, storage in save.request.tiers
            if tier in begun
        ]
        try:
            plan, _ = save.plan.result()
            assert self._drain is not None
            assert self._arena is not None
            flow = self._drain.begin(plan, self._arena, targets, save.trace)
        except BaseException as error:  # noqa: BLE001  carried to the handle
            for target in targets:
                self._end_badly(save, target.tier, error)
            return None, []
        save.handle.follow(flow, sum(parcel.nbytes for parcel in plan.parcels))
        if save.handle.done():  # its deadline passed meanwhile
            flow.cancel(SaveFailed(f"step {save.request.step}: given up before it was written"))
        save.snapshot.attach(flow)
        return flow, begun

    def _finish(self, save: Save, tier: str, flow: Flow) -> None:
        """See a save through in one tier."""
        try:
            info, stats = self._write_and_commit(save, tier, flow)
        except BaseException as error:  # noqa: BLE001  carried to the handle
            self._end_badly(save, tier, error)
        else:
            is_promoted = tier == "local" and self._is_promoted(save, info.folder)
            save.handle.commit(tier, info, stats)
            if is_promoted:
                self._promote(save, info.folder)
            if self._rank == 0:
                if self.admit is not None:
                    self.admit()
                self._retention[tier].collect(dict(save.request.tiers)[tier], save.attempts[tier].name)
        finally:
            save.ended[tier].set()

    def _write_and_commit(self, save: Save, tier: str, flow: Flow) -> tuple[catalog.CheckpointInfo, SaveStats]:
        attempt, request, snapshot = save.attempts[tier], save.request, save.snapshot
        storage = dict(request.tiers)[tier]
        digests = flow.wait(tier)
        snapshot.wait()
        if snapshot.error is not None:
            raise snapshot.error
        plan, known = save.plan.result()
        shard = FileRecord(plan.path, plan.nbytes, len(plan.header), fingerprint(plan.header))
        written_s = time.monotonic() - save.called_s
        path, size = f"{rank_name(self._rank)}.objects.json", len(request.objects)
        files = [shard, FileRecord(path, size, size, fingerprint(request.objects)), *(known.files if known else ())]
        # So that the newest commit is the newest state; unless its deadline ends this save first.
        while tier in save.after and not save.handle.at(tier).done() and not save.after[tier].wait(_LOOK_S):
            pass
        if save.handle.at(tier).done():
            raise SaveFailed(f"{attempt.folder}: not committed in time")
        with save.trace.span("commit"):
            rows = (*plan.rows(digests), *(known.rows if known else ())) if request.delta is not None else ()
            table = rows or self._form_of(plan).filled(digests)
            attempt.vote(Written(table, tuple(files)), request.draft.blueprint.replicated)
            if tier == "local" and request.promoted and self._promoter is not None:
                self._promoter.announce(attempt.folder)
            if self._rank == 0:
                reader = self._commit(save, tier, storage)
            else:
                attempt.await_commit()
                reader = Reader(storage, attempt.folder)
        if request.delta is not None and tier == "local":
            request.delta.committed(attempt.folder, rows, files)
        stats = SaveStats(
            call_s=save.handle.call_s,
            fence_s=snapshot.fence_s,
            staged_s=snapshot.staged_s,
            written_s=written_s,
            durable_s=time.monotonic() - save.called_s,
            pressure_s=snapshot.pressure_s,
            nbytes=sum(piece.nbytes for piece in request.draft.blueprint.pieces),
            written_bytes=sum(parcel.nbytes for parcel in plan.parcels),
        )
        return catalog.info_of(reader, tier), stats

    def _commit(self, save: Save, tier: str, storage: Storage) -> Reader:
        """Rank 0: commit what all have voted for."""
        attempt, known = save.attempts[tier], self._retention[tier].known

        def sequence() -> int:
            return self._tiers.sequence(save.ordinal, storage, known)

        record = attempt.commit(self._run_id, save.request.shared, sequence)
        reader = Reader(storage, attempt.folder, record=record, table=attempt.table)
        known.note(storage, reader)
        return reader

    def _form_of(self, plan: ShardPlan) -> TableForm:
        """Return a plan's slice table without digests; that of the plan before is at hand."""
        form = self._form
        if form is None or form[0] is not plan:
            form = self._form = plan, TableForm(plan.slices)
        return form[1]

    def _is_promoted(self, save: Save, folder: str) -> bool:
        """Whether a local checkpoint is copied to the remote tier.

        Rank 0 has the say, which it marked before it committed: ranks may start one save for different reasons, a wish
        here and the loop there, and would wait for each other's copies.
        """
        if self._rank == 0 or self._promoter is None or save.request.promoted:
            return save.request.promoted
        try:
            is_marked = dict(save.request.tiers)["local"].size(f"{folder}/{catalog.PROMOTION}") is not None
        except StorageError as error:
            _log.warning("%s is not copied on by rank %d: %s", folder, self._rank, error)
            return False
        if is_marked:
            save.handle.add(Outcome(save.request.step, "remote"))
        return is_marked

    def _promote(self, save: Save, folder: str) -> None:
        """Let the committed local checkpoint be copied to the remote tier, and the handle know how that ends."""
        assert self._promoter is not None
        outcome = save.handle.at("remote")

        def tell(copy: Future[catalog.CheckpointInfo]) -> None:
            outcome.settle(copy.exception() or copy.result())

        self._promoter.submit(folder).add_done_callback(tell)

    def _end_badly(self, save: Save, tier: str, error: BaseException) -> None:
        """End a save in one tier; where that was the last one, nothing more is copied."""
        self._abandon(tier, save.attempts[tier], error)
        save.handle.fail(error, tier)
        if tier == "local" and save.request.promoted:
            save.handle.fail(error, "remote")
        if all(save.handle.at(t).done() for t in save.attempts):
            save.snapshot.fail(error)

    def _abandon(self, tier: str, attempt: Attempt, error: BaseException) -> None:
        self._retention[tier].failed.add(attempt.name)
        try:
            attempt.abandon(error)
        except Exception as second:  # noqa: BLE001  carried by the first error, which must get through
            error.add_note(f"the other ranks could not be told and will time out: {second!r}")
