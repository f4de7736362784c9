"""Host memory in which copies wait to be written: fixed-size slots of one block of shared memory.

One size and a free list: nothing fragments, nothing wraps, slots come back in any order, and a tensor of any size
passes through. The block is a memory file, so that another process can map it. Its pages exist from their first use
on, and stay: fresh ones cost more than the copy into them.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

from checkpoint.digest import ALIGN_BYTES, CHUNK_BYTES

SLOT_BYTES = CHUNK_BYTES + ALIGN_BYTES
"""A parcel of CHUNK_BYTES, and room for it to start where it will start in its page of the file."""


@dataclass(frozen=True, slots=True, eq=False)
class Slot:
    """Room for one parcel, page-aligned."""

    index: int
    address: int
    memory: memoryview
    """All SLOT_BYTES of it."""

    @property
    def offset(self) -> int:
        """Where the slot starts in the memory file."""
        return self.index * SLOT_BYTES


class Arena:
    """A block of shared memory in slots. Threads take and give back at once."""

    def __init__(self, num_slots: int) -> None:
        if num_slots < 1:
            raise ValueError(f"an arena has at least one slot of {SLOT_BYTES} bytes, not {num_slots}")
        self.num_slots = num_slots
        self.descriptor = os.memfd_create("checkpoint-arena", os.MFD_CLOEXEC)
        """The memory file: `num_slots` times SLOT_BYTES."""
        try:
            os.ftruncate(self.descriptor, num_slots * SLOT_BYTES)
            self._map = mmap.mmap(self.descriptor, num_slots * SLOT_BYTES)
        except BaseException:
            os.close(self.descriptor)
            raise
        self._view = memoryview(self._map)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._changed = threading.Condition()
        # Taken from the end: slots whose pages exist are used again before fresh ones.
        self._free = [self._slot(i) for i in reversed(range(num_slots))]
        self._closed = False

    def __enter__(self) -> Arena:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def num_free(self) -> int:
        """Slots that nobody holds."""
        return len(self._free)

    def try_take(self) -> Slot | None:
        """Return a free slot; None if there is none."""
        with self._changed:
            return self._free.pop() if self._free else None

    def take(self, given_up: Callable[[], bool]) -> Slot | None:
        """Return a slot, as soon as one is free; None once `given_up()`, looked at whenever `wake` is called."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._free) or given_up())
            return None if given_up() else self._free.pop()

    def give_back(self, slot: Slot) -> None:
        """Let a slot be taken again."""
        with self._changed:
            self._free.append(slot)
            self._changed.notify_all()

    def wake(self) -> None:
        """Let those who wait for a slot look whether they still want it."""
        with self._changed:
            self._changed.notify_all()

    def close(self) -> None:
        """Give the memory back to the system; slots must not be touched from here on. Idempotent."""
        if self._closed:
            return
        self._closed = True
        with self._changed:
            self._free.clear()
        self._view.release()
        os.close(self.descriptor)
        # What still refers to the map, a slot's memory somewhere, keeps it until it goes.
        del self._map

    def _slot(self, index: int) -> Slot:
        start = index * SLOT_BYTES
        return Slot(index, self._address + start, self._view[start : start + SLOT_BYTES])
