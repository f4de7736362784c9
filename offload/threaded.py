"""A tier whose transfers are blocking calls, run by a few threads."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from types import TracebackType
from typing import Generic, Self, TypeVar

import torch

from offload.blocks import flat_bytes, new_block, of, unknown, what
from offload.digest import digest
from offload.errors import BlockError, Corrupted, OffloadError, TierError, TierFull
from offload.medium import Medium
from offload.throttle import Throttled
from offload.tier import Block, TierSpec

P = TypeVar("P")


@dataclass(slots=True)
class _Held(Generic[P]):
    """What the tier knows of one of its blocks."""

    place: P
    taken_bytes: int
    fault: OffloadError | None
    """Why it cannot be read."""
    in_place: bool = False
    """Changed by others than transfers: no digest holds."""
    digest: int | None = None
    """Of what was written; None: not taken, or changed in place since."""
    last: Future[None] | None = None
    """The transfer that was asked for last."""


class ThreadedTier(Generic[P]):
    """A `Tier` over a medium, slowed to the spec where that is an emulated one.

    `timeout_s` is the longest time that `free` and `close` wait for transfers. With `digests` every write takes
    the digest of its bytes and every read compares, before its future is done.
    """

    def __init__(
        self,
        spec: TierSpec,
        medium: Medium[P],
        *,
        num_threads: int,
        timeout_s: float = 300.0,
        digests: bool = False,
    ) -> None:
        self._spec = spec
        self._medium: Medium[P] = Throttled(medium, spec) if spec.emulated else medium
        self._digests = digests
        self._timeout_s = timeout_s
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix=f"tier-{spec.name}")
        self._lock = threading.Lock()  # over the blocks, their last transfers, and the bytes used
        self._blocks: dict[Block, _Held[P]] = {}
        self._used_bytes = 0
        self._closed = False
        self._pid = os.getpid()

    @property
    def spec(self) -> TierSpec:
        """What the tier can hold and how fast it is."""
        return self._spec

    @property
    def used_bytes(self) -> int:
        """Bytes of the capacity that blocks take, rounded up to the granularity of the medium."""
        with self._lock:
            return self._used_bytes

    def allocate(self, num_bytes: int, owner: str = "") -> Block:
        """Return a new block, which holds nothing until it is written."""
        block = new_block(self._spec, num_bytes, owner)
        taken = -(-num_bytes // self._medium.granularity_bytes) * self._medium.granularity_bytes
        with self._lock:
            self._check_open()
            free = self._spec.capacity_bytes - self._used_bytes
            if taken > free:
                raise TierFull(
                    f"tier {self._spec.label}: no room for {taken} bytes{of(block)}: {free} of "
                    f"{self._spec.capacity_bytes} are free; free blocks or give it {taken - free} more"
                )
            try:
                place = self._medium.reserve(taken)
            except TierFull as error:
                raise TierFull(f"tier {self._spec.label}: {what(block)}: {error}") from error
            self._used_bytes += taken
            nothing = BlockError(f"tier {self._spec.label}: {what(block)} holds nothing yet; write it first")
            self._blocks[block] = _Held(place, taken, nothing)
        return block

    def write(self, block: Block, source: torch.Tensor) -> Future[None]:
        """Copy the bytes of `source` into the block."""
        data = flat_bytes(self._spec, block, source)

        def store(held: _Held[P]) -> None:
            held.fault = TierError(self._about("writing", block))
            try:
                held.digest = digest(data) if self._digests and not held.in_place else None
                self._medium.store(held.place, data)
            except (OSError, TierError) as error:
                held.fault = TierError(f"{self._about('writing', block)}: {error}")
                raise held.fault from error
            held.fault = None

        return self._submit(block, store)

    def read(self, block: Block, into: torch.Tensor) -> Future[None]:
        """Copy what the last write of the block asked for into `into`."""
        data = flat_bytes(self._spec, block, into)

        def load(held: _Held[P]) -> None:
            if held.fault is not None:
                raise type(held.fault)(str(held.fault)) from held.fault
            try:
                self._medium.load(held.place, data)
            except (OSError, TierError) as error:
                raise TierError(f"{self._about('reading', block)}: {error}") from error
            if held.digest is not None and digest(data) != held.digest:
                raise Corrupted(
                    f"tier {self._spec.label}: {what(block)} came back different from what was written; "
                    "the device is not to be trusted: restore from a checkpoint, on another one"
                )

        return self._submit(block, load)

    def view(self, block: Block) -> torch.Tensor | None:
        """Return the block's own bytes where the CPU can address them; see `Tier.view`."""
        with self._lock:
            self._check_open()
            held = self._find(block)
        view = self._medium.view(held.place, block.num_bytes)
        if view is not None:
            if held.last is not None:
                self._await([held.last])
            held.fault = held.digest = None
            held.in_place = True
        return view

    def free(self, block: Block) -> None:
        """Give the block's room back; waits for its transfers."""
        with self._lock:
            self._check_open()
            held = self._find(block)
            del self._blocks[block]
        if held.last is not None:
            self._await([held.last])
        with self._lock:
            self._medium.release(held.place)
            self._used_bytes -= held.taken_bytes

    def close(self) -> None:
        """End all transfers and drop everything held; a second call does nothing."""
        if self._pid != os.getpid():
            return
        with self._lock:
            if self._closed:
                return
            self._closed = True
            held = list(self._blocks.values())
            self._blocks.clear()
            self._used_bytes = 0
        try:
            self._await([block.last for block in held if block.last is not None])
        finally:
            self._pool.shutdown(wait=False, cancel_futures=True)
        self._pool.shutdown()
        self._medium.close()
        for block in held:
            if isinstance(block.fault, TierError):
                raise block.fault

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _submit(self, block: Block, work: Callable[[_Held[P]], None]) -> Future[None]:
        with self._lock:
            self._check_open()
            held = self._find(block)
            # The queue is first in, first out: a transfer waits only for one that has a thread already.
            held.last = self._pool.submit(_run_after, held.last, lambda: work(held))
            return held.last

    def _find(self, block: Block) -> _Held[P]:
        if block not in self._blocks:
            raise unknown(self._spec, block)
        return self._blocks[block]

    def _check_open(self) -> None:
        if self._closed:
            raise TierError(f"tier {self._spec.label}: it is closed")
        if self._pid != os.getpid():
            raise TierError(
                f"tier {self._spec.label}: it is process {self._pid}'s: this one was forked from it, without its "
                "threads; use it there, or make a tier here"
            )

    def _await(self, transfers: list[Future[None]]) -> None:
        late = wait(transfers, self._timeout_s).not_done
        if late:
            raise TierError(
                f"tier {self._spec.label}: {len(late)} transfers did not end in {self._timeout_s} s; "
                "the device does not answer"
            )

    def _about(self, verb: str, block: Block) -> str:
        return f"tier {self._spec.label}: {verb} {what(block)} failed"


def _run_after(previous: Future[None] | None, work: Callable[[], None]) -> None:
    if previous is not None:
        wait([previous])  # whatever became of it: its own future tells
    work()
