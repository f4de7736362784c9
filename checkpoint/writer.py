"""From filled slots to durable files: hash, write, give the slot back."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from checkpoint.digest import digests
from checkpoint.spans import Trace

if TYPE_CHECKING:  # the writer process does without torch
    from checkpoint.arena import Arena, Slot
    from checkpoint.shard import Parcel, ShardPlan
    from checkpoint.storage import BlockSink, Storage


@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """One place that a shard is written to."""

    tier: str
    """Unique in a save."""
    storage: Storage
    path: str
    """Of the shard, in the storage."""


class Flow(Protocol):
    """One shard on its way to its targets. Any thread may call any method."""

    @property
    def written_bytes(self) -> int:
        """Bytes that are through: written to every target that did not fail."""

    def put(self, parcel: Parcel, slot: Slot, digests: list[int] | None = None) -> None:
        """Hand over a filled slot: the parcel's bytes start at its page offset. Returns soon.

        The digests of its cuts come with it if they are known already.
        Slots were given to parcels by rising file offset, so that one that comes out of its turn waits only for
        parcels that are on their way. The slot goes back to the arena when no target needs it any more, whatever
        happens.
        """

    def cancel(self, error: BaseException) -> None:
        """Fail every target that is not durable yet: no more parcels come. What was put is given back all the same."""

    def wait(self, tier: str) -> list[int]:
        """Return when a target's file is whole and durable: the digests of all cuts in file order.

        Raises the error that kept it from becoming so.
        """


class Drain(Protocol):
    """Who hashes and writes: kept from save to save."""

    def begin(self, plan: ShardPlan, arena: Arena, targets: Sequence[Target], trace: Trace) -> Flow:
        """Start to open the targets' files; returns at once. The header is written by the drain.

        Shards begun one after the other are written side by side: the slots of all are in one arena. What is done
        is told to `trace`: spans "hash" (unless the copier has), "write", and "sync" from the last byte to durable.
        """

    def close(self) -> None:
        """Stop when all that was begun has ended. Idempotent."""


class ThreadDrain:
    """Threads of this process; writing, and hashing for the most part, leave the interpreter to the training."""

    def __init__(self, num_threads: int) -> None:
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._serve, name=f"checkpoint-writer-{i}", daemon=True) for i in range(num_threads)
        ]
        self._ends: set[Future[None]] = set()
        self._closed = False
        for thread in self._threads:
            thread.start()

    def begin(self, plan: ShardPlan, arena: Arena, targets: Sequence[Target], trace: Trace) -> Flow:
        flow = _ThreadFlow(plan, arena, targets, trace, self._work.put)
        self._ends = {end for end in self._ends if not end.done()} | set(flow.ends)
        return flow

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        wait(self._ends)
        for _ in self._threads:
            self._work.put(None)
        for thread in self._threads:
            thread.join()

    def _serve(self) -> None:
        while (task := self._work.get()) is not None:
            task()


class _Filled:
    """A parcel in its slot, until every target has it or failed."""

    def __init__(self, parcel: Parcel, slot: Slot, num_targets: int, free: Callable[[_Filled], None]) -> None:
        self.parcel = parcel
        self.slot = slot
        self.data = slot.memory[parcel.page_offset : parcel.page_offset + parcel.nbytes]
        self._left = num_targets
        self._free = free
        self._lock = threading.Lock()

    def release(self) -> None:
        """Say that one more target does not need the slot."""
        with self._lock:
            self._left -= 1
            is_last = self._left == 0
        if is_last:
            self._free(self)


class _ThreadFlow:
    """A Flow of which every parcel is hashed, and then written to one file after the other, by one thread."""

    def __init__(
        self,
        plan: ShardPlan,
        arena: Arena,
        targets: Sequence[Target],
        trace: Trace,
        submit: Callable[[Callable[[], None]], None],
    ) -> None:
        self._arena = arena
        self._trace = trace
        self._submit = submit
        self._digests: list[list[int]] = [[] for _ in plan.parcels]
        self._written_bytes = 0
        self._lock = threading.Lock()
        self._files = {target.tier: _File(target, plan, trace, submit) for target in targets}

    @property
    def ends(self) -> list[Future[None]]:
        """What ends with each target's file."""
        return [file.durable for file in self._files.values()]

    @property
    def written_bytes(self) -> int:
        return self._written_bytes

    def put(self, parcel: Parcel, slot: Slot, digests: list[int] | None = None) -> None:
        filled = _Filled(parcel, slot, len(self._files), self._free)
        if digests is not None:
            self._digests[parcel.index] = digests
        self._submit(lambda: self._take(filled, digests is None))

    def cancel(self, error: BaseException) -> None:
        for file in self._files.values():
            file.fail(error)

    def wait(self, tier: str) -> list[int]:
        self._files[tier].durable.result()
        return [digest for found in self._digests for digest in found]

    def _take(self, filled: _Filled, is_to_digest: bool) -> None:
        try:
            if is_to_digest and not all(file.has_failed for file in self._files.values()):
                with self._trace.span("hash", filled.parcel.nbytes):
                    for cut in filled.parcel.cuts:
                        self._digests[filled.parcel.index] += digests(filled.data[cut.start : cut.start + cut.nbytes])
        except BaseException as error:  # noqa: BLE001  carried to whoever waits for the files
            self.cancel(error)
        for file in self._files.values():
            file.put(filled)

    def _free(self, filled: _Filled) -> None:
        filled.data.release()
        with self._lock:
            self._written_bytes += filled.parcel.nbytes
        self._arena.give_back(filled.slot)


class _File:
    """One target's file, held open by a thread of its own until every parcel is in it."""

    def __init__(
        self, target: Target, plan: ShardPlan, trace: Trace, submit: Callable[[Callable[[], None]], None]
    ) -> None:
        self.durable: Future[None] = Future()
        """Ends when the file is whole and durable, or will never be."""
        self._target = target
        self._plan = plan
        self._trace = trace
        self._submit = submit
        self._sink: BlockSink | None = None
        self._error: BaseException | None = None
        self._left = sum(parcel.nbytes for parcel in plan.parcels)
        self._next = len(plan.header)
        self._held: dict[int, _Filled] = {}  # by file offset: before the file is open, or before their turn
        self._num_writing = 0
        self._changed = threading.Condition()
        threading.Thread(target=self._hold_open, name=f"checkpoint-{target.tier}", daemon=True).start()

    @property
    def has_failed(self) -> bool:
        return self._error is not None

    def put(self, filled: _Filled) -> None:
        """Write a parcel now, or when its turn has come."""
        with self._changed:
            self._held[filled.parcel.file_start] = filled
        self._write_due()

    def fail(self, error: BaseException) -> None:
        """Let the file never become whole, for the first reason given; no effect once it is."""
        with self._changed:
            if self._error is None and not self.durable.done():
                self._error = error
            self._changed.notify_all()
        self._write_due()

    def _write_due(self) -> None:
        """Write what may be written, release what is never to be."""
        while (filled := self._take_due()) is not None:
            try:
                self._write(filled)
            except BaseException as error:  # noqa: BLE001  carried to whoever waits for the file
                self.fail(error)
            finally:
                with self._changed:
                    self._num_writing -= 1
                    self._left -= filled.parcel.nbytes
                    self._next += filled.parcel.nbytes
                    self._changed.notify_all()
                filled.release()

    def _take_due(self) -> _Filled | None:
        with self._changed:
            if not self._held:
                return None
            if self._error is None and not self._is_due():
                return None
            start = self._next if self._next in self._held else next(iter(self._held))
            self._num_writing += 1
            return self._held.pop(start)

    def _is_due(self) -> bool:
        """Whether one of the held parcels may be written now."""
        if self._sink is None or not self._sink.in_order:
            return self._sink is not None
        return self._num_writing == 0 and self._next in self._held

    def _write(self, filled: _Filled) -> None:
        if self._error is None and self._sink is not None:
            with self._trace.span("write", filled.parcel.nbytes):
                self._sink.write_at(filled.parcel.file_start, filled.data)

    def _hold_open(self) -> None:
        written_s = time.monotonic()
        try:
            with self._target.storage.create_at(self._target.path, self._plan.nbytes) as sink:
                sink.write_at(0, memoryview(bytearray(self._plan.header)))
                with self._changed:
                    self._sink = sink
                    num_held = len(self._held)
                    self._changed.notify_all()
                for _ in range(num_held):
                    self._submit(self._write_due)
                with self._changed:
                    self._changed.wait_for(self._is_over)
                    if self._error is not None:
                        raise self._error
                written_s = time.monotonic()
        except BaseException as error:  # noqa: BLE001  carried to whoever waits for the file
            self.fail(error)
            self.durable.set_exception(error)
        else:
            self._trace.add_since("sync", written_s)
            self.durable.set_result(None)

    def _is_over(self) -> bool:
        """Whether nobody writes any more: the file may be closed."""
        return self._num_writing == 0 and (self._left == 0 or self._error is not None)
