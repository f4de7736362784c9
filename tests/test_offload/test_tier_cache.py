"""Buffers of an out-of-core tier: who updates never waits for a write that only the next read needs to have ended."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import pytest
import torch

from offload import TierError
from offload.kernels import States
from offload.states import TierCache
from offload.threaded import ThreadedTier
from offload.transfer import HostMemory
from tests.contracts.tier import spec

_COUNT = 1024


class _Gated:
    """Memory whose writes wait until they may, and fail if they are to."""

    granularity_bytes = 1

    def __init__(self) -> None:
        self.may_write = threading.Event()
        self.may_write.set()
        self.fails = False
        self.num_loads = 0

    def reserve(self, num_bytes: int) -> torch.Tensor:
        return torch.zeros(num_bytes, dtype=torch.uint8)

    def release(self, place: torch.Tensor) -> None: ...

    def store(self, place: torch.Tensor, data: torch.Tensor) -> None:
        if not self.may_write.wait(20) or self.fails:
            raise OSError(5, "the device is gone")
        place.copy_(data)

    def load(self, place: torch.Tensor, into: torch.Tensor) -> None:
        self.num_loads += 1
        into.copy_(place)

    def view(self, place: torch.Tensor, num_bytes: int) -> None: ...

    def close(self) -> None: ...


@contextlib.contextmanager
def one_buffer() -> Iterator[tuple[_Gated, ThreadedTier[torch.Tensor], TierCache]]:
    """Yield two subgroups with one buffer: the first one's changed states are on their way to the tier."""
    medium = _Gated()
    tier: ThreadedTier[torch.Tensor] = ThreadedTier(spec(name="disk"), medium, num_threads=2, digests=True)
    cache = TierCache(tier, HostMemory(pinned=False), num_slots=1)
    for index in range(2):
        cache.add(index, _COUNT, f"subgroup {index}")
        cache.put(index, States(*(torch.full((_COUNT,), float(index)) for _ in range(3))))
    cache.stage(0)
    cache.take(0).master.fill_(7.0)
    medium.may_write.clear()
    cache.give(0)
    yield medium, tier, cache


def _use(tier: ThreadedTier[torch.Tensor]) -> None:
    """Return never: until the tier has begun to close, which then waits for its write."""
    while True:
        tier.free(tier.allocate(1))


def test_a_read_begins_when_the_buffer_is_written_and_nobody_waits_for_that() -> None:
    with one_buffer() as (medium, tier, cache), tier:
        assert cache.stage(1)  # returns, though the write has not ended
        assert medium.num_loads == 1
        medium.may_write.set()
        assert bool((cache.take(1).exp_avg == 1.0).all())
        assert medium.num_loads == 2
        assert bool((cache.snapshot(0).master == 7.0).all())


def test_a_write_that_fails_is_told_with_its_own_tensor_and_the_read_behind_it_is_not_made() -> None:
    with one_buffer() as (medium, tier, cache):
        assert cache.stage(1)
        medium.fails = True
        medium.may_write.set()
        with pytest.raises(TierError, match=r"subgroup 0 in tier disk: .*writing .*the device is gone"):
            cache.take(1)
        assert medium.num_loads == 1
        medium.fails = False
        assert cache.stage(1)  # the buffer is free again
        assert bool((cache.take(1).master == 1.0).all())
        with pytest.raises(TierError, match="the device is gone"):
            tier.close()


def test_a_read_behind_a_write_tells_that_the_tier_was_closed_meanwhile() -> None:
    with one_buffer() as (medium, tier, cache):
        assert cache.stage(1)
        closer = threading.Thread(target=tier.close)
        closer.start()
        with pytest.raises(TierError, match="closed"):
            _use(tier)
        medium.may_write.set()
        closer.join(60)
        with pytest.raises(TierError, match=r"subgroup 1 in tier disk: .*closed"):
            cache.take(1)


def test_states_that_are_set_replace_changed_ones_that_a_step_kept_in_a_buffer() -> None:
    with one_buffer() as (medium, tier, cache), tier:
        medium.may_write.set()
        cache.stage(0)
        cache.take(0).master.fill_(8.0)
        cache.give(0, keep=True)
        cache.put(0, States(*(torch.full((_COUNT,), 5.0) for _ in range(3))))
        assert cache.stage(1)  # in that buffer
        assert bool((cache.take(1).master == 1.0).all())
        cache.drop(1)
        assert bool((cache.snapshot(0).master == 5.0).all())
