"""Device memory that a step leaves free between its backward and the end of the next forward."""

from __future__ import annotations

from collections.abc import Callable

import torch


class Room:
    """Lends memory that does not raise the peak: what backward has given back, and the next forward will not need.

    Everything lent is to be back when `measure` is called, at the end of a forward, before its largest tensors. What
    is allocated then and the most that was ever allocated say how much may be lent until the next time; before the
    first time it is nothing. Steps that need more than the ones before find less room, as with any cache.
    """

    def __init__(self, allocated: Callable[[], tuple[int, int]]) -> None:
        """`allocated` returns the bytes that are allocated now, and the most that were."""
        self._allocated = allocated
        self._num_bytes = self._lent_bytes = 0

    def measure(self) -> None:
        """Look how much may be lent in the next backward."""
        now, peak = self._allocated()
        self._num_bytes = peak - now

    def borrow(self, num_bytes: int) -> bool:
        """Take so many bytes, if there is room; say whether there was."""
        now, peak = self._allocated()
        if self._lent_bytes + num_bytes > self._num_bytes or now + num_bytes > peak:
            return False
        self._lent_bytes += num_bytes
        return True

    def give_back(self, num_bytes: int) -> None:
        """Say that bytes are free again."""
        self._lent_bytes -= num_bytes


def room_of(device: torch.device) -> Room:
    """Return the room of a device, by torch's allocator; memory of a CPU has no end."""
    if device.type != "cuda":
        return Room(lambda: (0, 1 << 62))

    def allocated() -> tuple[int, int]:
        found = torch.cuda.memory_stats_as_nested_dict(device)["allocated_bytes"]["all"]
        return found["current"], found["peak"]

    return Room(allocated)
