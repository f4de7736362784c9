"""Copies of a state into the arena while training goes on, and the fence that stands before the next update.

Nothing is copied on the caller of `save`. One thread copies the parcels of each save in the order in which their
tensors are updated; whoever waits at the fence helps. From a GPU the thread only orders the copies, on a stream of
its own that waits for what was ordered before the save; the fence lets the training's stream wait, not its host.
"""

from __future__ import annotations

import collections
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from checkpoint.arena import Arena, Slot
from checkpoint.copies import Copies, Events, Streams
from checkpoint.errors import SaveFailed, TornSnapshot
from checkpoint.guard import Guard
from checkpoint.planning import Draft
from checkpoint.shard import Parcel, ShardPlan
from checkpoint.spans import Trace
from checkpoint.writer import Flow

_BATCH_BYTES = 512 << 20
"""Bytes whose copies from a GPU are ordered, and waited for, at once."""


class Snapshot:
    """The tensors of one save, from the call until their last byte is copied."""

    def __init__(
        self, draft: Draft, moments: Sequence[Any], arena: Arena, trace: Trace, *, is_digested: bool = False
    ) -> None:
        """Remember a state; `moments` are events of its devices, after all that it is the result of.

        `is_digested` lets what is copied from host memory alone be digested meanwhile.
        """
        self.trace = trace
        self.called_s = time.monotonic()
        self.pressure_s = 0.0
        """Time in which nothing was copied because no slot was free."""
        self.fence_s = 0.0
        """Time that `fence` kept from its callers."""
        self.staged_s = 0.0
        """From the call until all was copied; 0 before."""
        self.staged_bytes = 0
        """Bytes that are in their slots, or were."""
        self.num_groups = len(draft.blueprint.watched)
        self.has_device = bool(draft.blueprint.devices)
        self.is_hurried = False
        """Whether somebody waits for the copies: the digests of what is left are the writers' task then."""
        self._is_digested = is_digested and not self.has_device
        self._arena = arena
        self._moments = moments
        self._guard = Guard(draft)
        self._draft: Draft | None = draft
        self._copies: Copies | None = None
        self._streams: Streams | None = None
        self._flow: Flow | None = None
        self._error: BaseException | None = None
        self._early: list[tuple[Parcel, Slot, list[int] | None]] = []
        self._to_claim: collections.deque[Parcel] = collections.deque()
        # Parcels of each group; and one more, for its end.
        self._to_copy = [1] * self.num_groups
        self._to_land = [1] * self.num_groups
        self._events: list[Events] = [{} for _ in range(self.num_groups)]
        self._num_filling = 0
        self._is_held = self.has_device
        self._changed = threading.Condition()

    @property
    def error(self) -> BaseException | None:
        """What ended the copies before their time."""
        return self._error

    @property
    def is_over(self) -> bool:
        """Whether nothing is read from the tensors any more."""
        return self._error is not None or not any(self._to_land)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until nothing is read from the tensors any more; return whether that came in time."""
        with self._changed:
            return self._changed.wait_for(lambda: self.is_over, timeout_s)

    def attach(self, flow: Flow) -> None:
        """Let parcels go to a flow, those that are there already and those to come."""
        with self._changed:
            self._flow = flow
            error = self._error
        self._put_early()
        if error is not None:
            flow.cancel(error)

    def unhold(self) -> None:
        """Let parcels from a GPU go to the flow.

        Until all copies are ordered, or wait for slots, none does: hashing and writing would contend for the
        interpreter with the ordering, which the fence waits for.
        """
        self._is_held = False
        self._put_early()

    def _put_early(self) -> None:
        with self._changed:
            flow = self._flow
            if flow is None or self._is_held:
                return
            early, self._early = self._early, []
        for filled in early:
            flow.put(*filled)

    def fail(self, error: BaseException) -> None:
        """Copy nothing more, for the first reason given; the tensors may be mutated. No effect once all is copied."""
        with self._changed:
            if self.is_over:
                return
            self._error = error
            self._to_claim.clear()
            early, self._early = self._early, []
            flow = self._flow
            self._changed.notify_all()
        for _, slot, _ in early:
            self._arena.give_back(slot)
        if flow is not None:
            flow.cancel(error)
        self._arena.wake()
        self._let_go()

    def begin(self, draft: Draft, plan: Callable[[], ShardPlan], streams: Streams) -> None:
        """Look at the tensors on GPUs for the first time, plan, and offer their parcels to who copies.

        Raises what ended the copies, if they ended before they began.
        """
        if self._error is not None:
            raise self._error
        for device in draft.blueprint.devices:
            with streams.on(device) as stream:
                for moment in self._moments:
                    stream.wait_event(moment)
                self._guard.look_on(device)
        parcels = plan().parcels
        with self._changed:
            if self._error is not None:
                raise self._error
            self._streams = streams
            self._copies = Copies(draft, streams)
            for parcel in parcels:
                self._to_copy[parcel.group] += 1
                self._to_land[parcel.group] += 1
            self._to_claim.extend(parcels)

    @property
    def has_parcels(self) -> bool:
        """Whether there is something left to copy that nobody copies yet."""
        return bool(self._to_claim)

    def claim(self) -> Parcel | None:
        """Return a parcel for the caller to copy; None if there is none."""
        with self._changed:
            if not self._to_claim:
                return None
            self._num_filling += 1
            return self._to_claim.popleft()

    def fill(self, batch: Sequence[tuple[Parcel, Slot]]) -> tuple[Events, list[int] | None]:
        """Copy claimed parcels into their slots, or order that: then they are there after the events.

        Returns the digests too of a parcel that was digested meanwhile.
        """
        try:
            copies = self._copies
            if copies is None:  # it failed since they were claimed
                raise self._error or AssertionError("parcels are claimed after their copies began")
            is_digested = self._is_digested and not self.is_hurried
            name = "copy and hash" if is_digested else "copy"
            with self.trace.span(name, sum(parcel.nbytes for parcel, _ in batch)):
                if is_digested:
                    ((parcel, slot),) = batch
                    return {}, copies.fill_and_digest(parcel, slot)
                return copies.fill(batch), None
        finally:
            with self._changed:
                self._num_filling -= len(batch)
                self._changed.notify_all()

    def close(self, group: int, events: Events) -> Events | None:
        """Count a parcel as copied but for these events; return the group's last events if it was the last one."""
        with self._changed:
            self._events[group].update(events)
            if self._error is not None:
                return None
            if self._to_copy[group] > 1:
                self._to_copy[group] -= 1
                return None
            last = dict(self._events[group])
        assert self._streams is not None
        for device in last:
            with self._streams.on(device):
                self._guard.look_again_on(device, group)
            last[device] = self._streams.mark(device)
        if not last:
            self._settle(group)
        with self._changed:
            self._events[group] = last
            self._to_copy[group] = 0
            self._changed.notify_all()
        return last

    def land(self, parcel: Parcel, slot: Slot, digests: list[int] | None) -> None:
        """Say that a parcel's bytes are in its slot."""
        with self._changed:
            self.staged_bytes += parcel.nbytes
            flow, is_wanted = self._flow, self._error is None
            is_early = is_wanted and (flow is None or self._is_held)
            if is_early:
                self._early.append((parcel, slot, digests))
        if flow is not None and not is_early:
            flow.put(parcel, slot, digests)
        elif not is_wanted:
            self._arena.give_back(slot)
        self._land(parcel.group)

    def land_group(self, group: int) -> None:
        """Say that all of a group's parcels are in their slots."""
        self._guard.judge(group)
        self._settle(group)
        self._land(group)

    def await_group(self, group: int, timeout_s: float, help_out: Callable[[], bool]) -> None:
        """Return when the tensors of all groups up to this one may be mutated, on the streams now current.

        `help_out` copies one more parcel and says whether there was one and a slot for it.
        """
        due = range(min(group, self.num_groups - 1) + 1)
        deadline = time.monotonic() + timeout_s

        def ready() -> bool:
            if self._error is not None:  # a copy that has begun still reads
                return self._num_filling == 0
            return not any(self._to_copy[g] for g in due)

        while not ready() and help_out():
            pass
        with self._changed:
            in_time = self._changed.wait_for(ready, max(0.0, deadline - time.monotonic()))
        if not in_time:
            self.fail(SaveFailed(f"copies did not end within {timeout_s:g} s: writing the state does not go on"))
        for g in due:
            if self._events[g]:
                self._settle(g)
            for device, event in self._events[g].items():
                torch.cuda.current_stream(device).wait_event(event)

    def group_of(self, storages: set[int]) -> int | None:
        """Return the last group that has a tensor in one of the storages, given by address; None if none has."""
        draft = self._draft
        if draft is None:
            return None
        for group in reversed(range(self.num_groups)):
            entries = (draft.tensors[entry] for entry in draft.blueprint.watched[group])
            if any(storage_address(tensor) in storages for tensor in entries):
                return group
        return None

    def _settle(self, group: int) -> None:
        self._guard.settle(group)
        names = self._guard.changed
        if names:
            self.fail(torn(names))

    def _land(self, group: int) -> None:
        with self._changed:
            self._to_land[group] -= 1
            if not self.is_over:
                return
            if not self.staged_s:
                self.staged_s = time.monotonic() - self.called_s
            self._changed.notify_all()
        self._let_go()

    def _let_go(self) -> None:
        """Drop the tensors; a copy under way keeps those it reads."""
        self._guard.let_go()
        self._copies = None
        self._draft = None


def storage_address(tensor: Tensor) -> int:
    """Return where the memory starts that a tensor is a view of: what tensors that share it have in common."""
    return tensor.untyped_storage().data_ptr()


def torn(names: Sequence[str]) -> TornSnapshot:
    """Return the error of tensors that changed under their copies."""
    shown = ", ".join(map(repr, names[:8])) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return TornSnapshot(
        f"{shown} changed before the copies were over; call fence() before every update, or let fence_on(optimizer) "
        "do it",
        tuple(names),
    )


class Copier:
    """The thread that copies the parcels of one snapshot after the other."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._streams = Streams()
        self._pending: list[Snapshot] = []
        self._lock = threading.Lock()
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._landings: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=_serve, args=(jobs,), name=f"checkpoint-{name}", daemon=True)
            for name, jobs in (("copier", self._jobs), ("lander", self._landings))
        ]
        for thread in self._threads:
            thread.start()

    def submit(
        self,
        snapshot: Snapshot,
        draft: Draft,
        plan: Callable[[], ShardPlan],
        give_up: Callable[[BaseException], object],
    ) -> None:
        """Let a snapshot be copied after those before it.

        The copier calls `plan` once, unless the snapshot ends before that, and `give_up` if it ends before its copies.
        """
        with self._lock:
            self._pending = [s for s in self._pending if not s.is_over]
            self._pending.append(snapshot)
        self._jobs.put(lambda: self._copy(snapshot, draft, plan, give_up))

    def fence(self, group: int | None, timeout_s: float) -> None:
        """Return when the tensors that are updated in turn `group` or before may be mutated; None stands for all."""
        for snapshot in self._not_over():
            self._await(snapshot, snapshot.num_groups - 1 if group is None else group, timeout_s)

    def fence_storages(self, addresses: Callable[[], set[int]], timeout_s: float) -> None:
        """Return when all tensors in some storages may be mutated; `addresses` is called if anything is pending."""
        found: set[int] | None = None
        for snapshot in self._not_over():
            found = addresses() if found is None else found
            group = snapshot.group_of(found)
            if group is not None:
                self._await(snapshot, group, timeout_s)

    def _not_over(self) -> list[Snapshot]:
        with self._lock:
            return [snapshot for snapshot in self._pending if not snapshot.is_over]

    def _await(self, snapshot: Snapshot, group: int, timeout_s: float) -> None:
        begun_s = time.monotonic()
        snapshot.is_hurried = True
        snapshot.await_group(group, timeout_s, lambda: self._help(snapshot))
        snapshot.fence_s += time.monotonic() - begun_s
        snapshot.trace.add_since("fence", begun_s)

    def close(self) -> None:
        """Stop when every snapshot is over. Idempotent."""
        for jobs, thread in zip((self._jobs, self._landings), self._threads, strict=True):
            if thread.is_alive():
                jobs.put(None)
                thread.join()

    def _copy(
        self,
        snapshot: Snapshot,
        draft: Draft,
        plan: Callable[[], ShardPlan],
        give_up: Callable[[BaseException], object],
    ) -> None:
        try:
            snapshot.begin(draft, plan, self._streams)
            del draft, plan
            for group in range(snapshot.num_groups):
                self._close(snapshot, group, {})
        except BaseException as error:  # noqa: BLE001  carried to the save
            snapshot.fail(error)
            give_up(snapshot.error or error)
        while snapshot.has_parcels:
            slot = self._arena.try_take()
            if slot is None:
                snapshot.unhold()
                begun_s = time.monotonic()
                slot = self._arena.take(lambda: not snapshot.has_parcels)
                snapshot.pressure_s += time.monotonic() - begun_s
                snapshot.trace.add_since("wait for a slot", begun_s)
            if slot is not None:
                self._fill_next(snapshot, slot)
        snapshot.unhold()

    def _help(self, snapshot: Snapshot) -> bool:
        """Copy one parcel on the caller, if there is one and a slot for it."""
        if snapshot.has_device or not snapshot.has_parcels:  # one thread alone orders what a stream does
            return False
        slot = self._arena.try_take()
        return slot is not None and self._fill_next(snapshot, slot)

    def _fill_next(self, snapshot: Snapshot, slot: Slot) -> bool:
        """Copy the next parcel into a slot, and from a GPU some more at once, as far as there are slots."""
        batch = self._claim(snapshot, slot)
        if not batch:
            return False
        begun_s = time.monotonic()
        try:
            events, digests = snapshot.fill(batch)
        except BaseException as error:  # noqa: BLE001  carried to the save
            snapshot.fail(error)
            try:
                self._streams.wait()  # copies of the batch that were ordered still write to its slots
            except BaseException as second:  # noqa: BLE001  carried by the first; the slots are lost with the GPU
                error.add_note(f"the GPU does not end its copies: {second!r}")
                return False
            for _, taken in batch:
                self._arena.give_back(taken)
            return False

        def land() -> None:
            if events:
                snapshot.trace.add_since("transfer", begun_s, sum(parcel.nbytes for parcel, _ in batch))
            for parcel, taken in batch:
                snapshot.land(parcel, taken, digests)

        self._after(snapshot, events, land)
        for parcel, _ in batch:
            self._close(snapshot, parcel.group, events)
        return True

    def _claim(self, snapshot: Snapshot, slot: Slot) -> list[tuple[Parcel, Slot]]:
        batch: list[tuple[Parcel, Slot]] = []
        taken: Slot | None = slot
        while taken is not None:
            parcel = snapshot.claim()
            if parcel is None:
                self._arena.give_back(taken)
                break
            batch.append((parcel, taken))
            is_full = not snapshot.has_device or sum(p.nbytes for p, _ in batch) >= _BATCH_BYTES
            taken = None if is_full else self._arena.try_take()
        return batch

    def _close(self, snapshot: Snapshot, group: int, events: Events) -> None:
        try:
            last = snapshot.close(group, events)
        except BaseException as error:  # noqa: BLE001  carried to the save
            snapshot.fail(error)
            return
        if last is not None:
            self._after(snapshot, last, lambda: snapshot.land_group(group))

    def _after(self, snapshot: Snapshot, events: Events, action: Callable[[], None]) -> None:
        """Do something when the events are over: at once without any."""
        if not events:
            action()
            return

        def wait() -> None:
            try:
                for event in events.values():
                    event.synchronize()
            except BaseException as error:  # noqa: BLE001  carried to the save; the slot may still be written to
                snapshot.fail(error)
                return
            action()

        self._landings.put(wait)


def _serve(jobs: queue.SimpleQueue[Callable[[], None] | None]) -> None:
    while (job := jobs.get()) is not None:
        job()
