"""Device memory that a step leaves free between its backward and the end of the next forward."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch

_SPARED = 4
"""One part of so many of what a step needs above its level is never lent: looks do not see all that operations need."""


class Room:
    """Lends memory that does not raise the peak: what backward has given back, and the next forward will not need.

    Everything lent is to be back when `measure` is called, at the end of a forward, before its largest tensors. The
    peak and the level of then bound what is lent until the next time, for the next forward comes to that level again
    before all is back. Within backward `look` is called with every gradient, and what the backward before needed from
    there to its end is left free. A quarter of what the peak is above the level is never lent, and if the peak rises
    all the same, so much less is.

    A step's own peak is what torch counted less what was lent, or lent memory would make room for more of it step by
    step. Before the second measure there is no room. Steps that need more than the ones before find less room, as with
    any cache.
    """

    def __init__(self, allocated: Callable[[], tuple[int, int]] | None) -> None:
        """`allocated` returns the bytes that are allocated now, and the most that were; None: there is no end of it."""
        self._allocated = allocated
        self._level = self._own_peak = self._counted_peak = self._overshot = 0
        self._lent_bytes = self._most_lent_bytes = 0
        self._looks: list[int] = []
        self._ahead: list[int] = []

    def measure(self) -> None:
        """Look how much may be lent in the next backward."""
        if self._allocated is None:
            return
        self._level, peak = self._allocated()
        own = peak - self._most_lent_bytes
        if peak > self._counted_peak:
            if self._most_lent_bytes and own <= self._own_peak:
                self._overshot += peak - self._counted_peak
            self._own_peak = max(self._own_peak, own)
        elif peak < self._counted_peak:  # somebody began to count anew
            self._own_peak = own
        self._counted_peak = peak
        self._most_lent_bytes = self._lent_bytes
        self._ahead = list(itertools.accumulate(reversed(self._looks), max))[::-1]
        self._looks = []

    def look(self) -> None:
        """Note what is allocated in backward."""
        if self._allocated is not None:
            self._looks.append(self._allocated()[0] - self._lent_bytes)

    def borrow(self, num_bytes: int) -> bool:
        """Take so many bytes, if there is room; say whether there was. After a `look`."""
        if self._allocated is not None:
            place = len(self._looks) - 1
            if not self._ahead:
                return False
            needed = max(self._level, self._looks[place], self._ahead[min(place, len(self._ahead) - 1)])
            spared = (self._own_peak - self._level) // _SPARED + self._overshot
            if needed + spared + self._lent_bytes + num_bytes > self._own_peak:
                return False
        self._lent_bytes += num_bytes
        self._most_lent_bytes = max(self._most_lent_bytes, self._lent_bytes)
        return True

    def give_back(self, num_bytes: int) -> None:
        """Say that bytes are free again."""
        self._lent_bytes -= num_bytes


def room_of(device: torch.device) -> Room:
    """Return the room of a device, by torch's allocator; memory of a CPU has no end."""
    if device.type != "cuda":
        return Room(None)

    def allocated() -> tuple[int, int]:
        found = torch.cuda.memory_stats_as_nested_dict(device)["allocated_bytes"]["all"]
        return found["current"], found["peak"]

    return Room(allocated)
