"""A device that this machine lacks, in place of a faster one: transfers take as long as its figures say."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

import torch

from offload.medium import Medium
from offload.tier import TierSpec

P = TypeVar("P")


class Throttled(Medium[P]):
    """A medium slowed to the rates and the latency of a spec; both directions at once, as over a link.

    Transfers of one direction share its rate: each takes its turn on the link, behind those that came before.
    """

    def __init__(
        self,
        inner: Medium[P],
        spec: TierSpec,
        *,
        now_s: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._inner = inner
        self._writes = _Link(spec.write_bytes_per_s, spec.latency_s, now_s, sleep)
        self._reads = _Link(spec.read_bytes_per_s, spec.latency_s, now_s, sleep)
        self.granularity_bytes = inner.granularity_bytes

    def reserve(self, num_bytes: int) -> P:
        """Reserve a place of the inner medium."""
        return self._inner.reserve(num_bytes)

    def release(self, place: P) -> None:
        """Give it back."""
        self._inner.release(place)

    def store(self, place: P, data: torch.Tensor) -> None:
        """Copy, and return no earlier than the slower device would."""
        end_s = self._writes.turn_s(data.numel())
        self._inner.store(place, data)
        self._writes.wait_until(end_s)

    def load(self, place: P, into: torch.Tensor) -> None:
        """Copy, and return no earlier than the slower device would."""
        end_s = self._reads.turn_s(into.numel())
        self._inner.load(place, into)
        self._reads.wait_until(end_s)

    def view(self, place: P, num_bytes: int) -> torch.Tensor | None:
        """Return None: what the CPU addresses by itself cannot be slowed."""
        return None

    def close(self) -> None:
        """Close the inner medium."""
        self._inner.close()


class _Link:
    """One direction: transfers one after the other at a rate, each a latency late."""

    def __init__(
        self,
        bytes_per_s: float,
        latency_s: float,
        now_s: Callable[[], float],
        sleep: Callable[[float], None],
    ) -> None:
        self._bytes_per_s, self._latency_s = bytes_per_s, latency_s
        self._now_s, self._sleep = now_s, sleep
        self._lock = threading.Lock()
        self._busy_until_s = 0.0

    def turn_s(self, num_bytes: int) -> float:
        """Return when so many bytes, sent now, have arrived."""
        with self._lock:
            self._busy_until_s = max(self._now_s(), self._busy_until_s) + num_bytes / self._bytes_per_s
            return self._busy_until_s + self._latency_s

    def wait_until(self, end_s: float) -> None:
        """Return at that time, or at once if it has passed."""
        left_s = end_s - self._now_s()
        if left_s > 0:
            self._sleep(left_s)
