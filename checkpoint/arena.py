"""Host memory in which copies wait to be written: fixed-size slots of one block of memory.

One size and a free list: nothing fragments, nothing wraps, slots come back in any order, and a tensor of any size
passes through. The block may be a memory file, for another process to map. Its pages exist from their first use
on, and stay: fresh ones cost more than the copy into them. The last slot given back is the first taken, so no more
memory is used than was ever needed at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from checkpoint.digest import ALIGN_BYTES, CHUNK_BYTES
from checkpoint.errors import SaveFailed

SLOT_BYTES = CHUNK_BYTES + ALIGN_BYTES
"""A parcel of CHUNK_BYTES, and room for it to start where it will start in its page of the file."""


def slot_bytes(parcel_bytes: int) -> int:
    """Return the size of the slots for parcels of up to `parcel_bytes`."""
    return parcel_bytes + ALIGN_BYTES


class Slot:
    """Room for one parcel, page-aligned."""

    __slots__ = ("_is_pinned", "_tensor", "address", "index", "memory")

    def __init__(self, index: int, address: int, memory: memoryview) -> None:
        self.index = index
        self.address = address
        self.memory = memory
        """All of it."""
        self._is_pinned = False
        self._tensor: torch.Tensor | None = None

    @property
    def tensor(self) -> torch.Tensor:
        """The memory as bytes."""
        if self._tensor is None:
            self._tensor = torch.frombuffer(self.memory, dtype=torch.uint8)
        return self._tensor

    @property
    def offset(self) -> int:
        """Where the slot starts in the memory file."""
        return self.index * len(self.memory)

    def touch(self) -> None:
        """Let the pages exist. Overwrites them."""
        ctypes.memset(self.address, 0, len(self.memory))

    def pin(self) -> None:
        """Lock the pages for copies from GPUs; only the first time takes any (0.8 s per GiB).

        Raises SaveFailed where the driver refuses.
        """
        if self._is_pinned:
            return
        portable = 1  # to all GPUs of the process
        cudart: Any = torch.cuda.cudart  # untyped
        code = int(cudart().cudaHostRegister(self.address, len(self.memory), portable))
        if code:
            raise SaveFailed(
                f"staging memory cannot be pinned for GPUs (CUDA error {code}); "
                "set staging_bytes to less, or raise the limit on locked memory"
            )
        self._is_pinned = True

    def let_go(self) -> None:
        """Undo `pin`, and hold no view of the memory but `memory`."""
        self._tensor = None
        if self._is_pinned:
            self._is_pinned = False
            cudart: Any = torch.cuda.cudart
            cudart().cudaHostUnregister(self.address)


class Arena:
    """A block of memory in slots. Threads take and give back at once."""

    def __init__(
        self, num_slots: int, num_allowed: int | None = None, *, is_file: bool = False, slot_bytes: int = SLOT_BYTES
    ) -> None:
        """Reserve addresses for `num_slots`; hand out no more than `num_allowed` (default: all) until `allow`.

        `is_file` makes it a memory file, that other processes can map. Raises SaveFailed if the system refuses.
        """
        if num_slots < 1:
            raise ValueError(f"an arena has at least one slot of {slot_bytes} bytes, not {num_slots}")
        self.num_slots = num_slots
        self.slot_bytes = slot_bytes
        """Of every slot; a multiple of the page."""
        self.descriptor = -1
        """The memory file: `num_slots` times `slot_bytes`; -1 without one."""
        nbytes = num_slots * slot_bytes
        try:
            if is_file:
                self.descriptor = os.memfd_create("checkpoint-arena", os.MFD_CLOEXEC)
                os.ftruncate(self.descriptor, nbytes)
                self._map = mmap.mmap(self.descriptor, nbytes)
            else:
                # Private memory is in large pages on more systems than shared memory is.
                self._map = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            if self.descriptor >= 0:
                os.close(self.descriptor)
            raise SaveFailed(
                f"{nbytes} bytes of staging memory cannot be had: {error.strerror}; "
                "set staging_bytes to less, or raise the process's limits"
            ) from error
        for advice in ("MADV_HUGEPAGE", "MADV_DONTFORK"):  # workers that training forks have no use for it
            if hasattr(mmap, advice):
                with contextlib.suppress(OSError):  # a kernel without it: the first touch, or a fork, takes longer
                    self._map.madvise(getattr(mmap, advice))
        self._view = memoryview(self._map)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._num_allowed = num_slots if num_allowed is None else num_allowed
        self._slots: list[Slot] = []  # those that were ever used
        self._free: list[Slot] = []
        self._changed = threading.Condition()
        self._closed = False

    def __enter__(self) -> Arena:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def num_free(self) -> int:
        """Slots that could be taken."""
        with self._changed:
            return len(self._free) + self._num_allowed - len(self._slots)

    @property
    def touched_bytes(self) -> int:
        """Memory of the slots that were ever used, which is what the arena costs."""
        return len(self._slots) * self.slot_bytes

    def allow(self, num_slots: int) -> None:
        """Hand out up to `num_slots`, or as many as there are, from now on; never fewer than before."""
        with self._changed:
            self._num_allowed = max(self._num_allowed, min(num_slots, self.num_slots))
            self._changed.notify_all()

    def try_take(self) -> Slot | None:
        """Return a free slot; None if there is none."""
        with self._changed:
            return self._take()

    def take(self, given_up: Callable[[], bool]) -> Slot | None:
        """Return a slot, as soon as one is free; None once `given_up()`, looked at whenever `wake` is called."""
        with self._changed:
            while not given_up():
                slot = self._take()
                if slot is not None:
                    return slot
                self._changed.wait()
            return None

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
        for slot in self._slots:
            slot.let_go()
            slot.memory.release()
        self._view.release()
        if self.descriptor >= 0:
            os.close(self.descriptor)
        # A view that somebody still has keeps the memory until it goes.
        del self._map

    def _take(self) -> Slot | None:
        # The last one given back first: its pages exist, and may still be in the cores' caches.
        if self._free:
            return self._free.pop()
        if len(self._slots) >= self._num_allowed:
            return None
        start = len(self._slots) * self.slot_bytes
        slot = Slot(len(self._slots), self._address + start, self._view[start : start + self.slot_bytes])
        self._slots.append(slot)
        return slot


def free_memory_bytes() -> int:
    """Return the memory that this process could still get, by the kernel and by its control group."""
    facts = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(facts["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
    except OSError:  # no control group of version 2, or the root one: no limit
        return free
    return free if limit == "max" else max(0, min(free, int(limit) - used))
