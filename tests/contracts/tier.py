"""What every tier promises. A tier's tests subclass `TierContract` and say how to make one."""

from __future__ import annotations

import os
import random
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import wait
from pathlib import Path

import pytest
import torch

from offload import Block, BlockError, Tier, TierError, TierFull, TierSpec

CAPACITY_BYTES = 1 << 20


def spec(
    capacity_bytes: int = CAPACITY_BYTES, *, name: str = "t", rate: float = 1e9, emulated: bool = False
) -> TierSpec:
    return TierSpec(
        name=name,
        capacity_bytes=capacity_bytes,
        read_bytes_per_s=rate,
        write_bytes_per_s=rate,
        latency_s=0.0,
        emulated=emulated,
    )


class TierContract(ABC):
    """One instance per test; `tier` is open and empty."""

    @abstractmethod
    def make(self, folder: Path) -> Tier:
        """Return an open tier with `spec()`, which may keep files in the folder."""

    label = "t"
    """What errors call it."""

    @pytest.fixture
    def tier(self, tmp_path: Path) -> Iterator[Tier]:
        with self.make(tmp_path) as tier:
            yield tier

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
    @pytest.mark.parametrize("shape", [(), (1,), (3, 5), (4096,), (33, 1001)])
    def test_a_tensor_comes_back_bit_for_bit(self, tier: Tier, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        source = torch.randn(shape).mul(100).to(dtype)
        block = tier.allocate(source.nbytes)
        tier.write(block, source).result(60)
        into = torch.zeros(shape, dtype=dtype)
        tier.read(block, into).result(60)
        assert torch.equal(into, source)

    def test_memory_that_starts_anywhere_comes_back(self, tier: Tier) -> None:
        for start in (0, 1, 4095, 4096):
            source = torch.randint(0, 256, (20_000,), dtype=torch.uint8)[start : start + 12_288]
            block = tier.allocate(source.nbytes)
            tier.write(block, source).result(60)
            whole = torch.zeros(20_000, dtype=torch.uint8)
            tier.read(block, whole[start : start + 12_288]).result(60)
            assert torch.equal(whole[start : start + 12_288], source)
            assert whole.sum() == source.sum()  # nothing beside it was touched

    def test_a_parameter_that_requires_grad_is_stored(self, tier: Tier) -> None:
        source = torch.nn.Parameter(torch.randn(7))
        block = tier.allocate(source.nbytes)
        tier.write(block, source).result(60)
        into = torch.zeros(7)
        tier.read(block, into).result(60)
        assert torch.equal(into, source)

    def test_transfers_of_one_block_happen_in_the_order_they_were_asked_for(self, tier: Tier) -> None:
        block = tier.allocate(80_000)
        sources = [torch.full((10_000,), float(i), dtype=torch.float64) for i in range(20)]
        targets = [torch.zeros(10_000, dtype=torch.float64) for _ in sources]
        futures = []
        for source, into in zip(sources, targets, strict=True):
            futures += [tier.write(block, source), tier.read(block, into)]
        wait(futures, 60)
        assert all(torch.equal(into, source) for into, source in zip(targets, sources, strict=True))

    def test_blocks_do_not_disturb_each_other(self, tier: Tier) -> None:
        """Random allocations, writes and frees against a dictionary of what must be there."""
        dice = random.Random(0)
        held: dict[Block, torch.Tensor] = {}
        for _ in range(200):
            if held and dice.random() < 0.4:
                block = dice.choice(list(held))
                into = torch.zeros_like(held[block])
                tier.read(block, into).result(60)
                assert torch.equal(into, held.pop(block))
                tier.free(block)
            elif len(held) < 20:
                data = torch.randint(0, 256, (dice.choice([1, 100, 4096, 10_000, 30_000]),), dtype=torch.uint8)
                new = tier.allocate(data.numel())
                tier.write(new, data)
                held[new] = data
        for block, data in held.items():
            into = torch.zeros_like(data)
            tier.read(block, into).result(60)
            assert torch.equal(into, data)

    def test_threads_may_use_it_at_once(self, tier: Tier) -> None:
        wrong: list[int] = []

        def work(seed: int) -> None:
            data = torch.full((50_000,), seed, dtype=torch.uint8)
            for _ in range(10):
                block = tier.allocate(data.numel())
                tier.write(block, data)
                into = torch.zeros_like(data)
                tier.read(block, into).result(60)
                tier.free(block)
                if not torch.equal(into, data):
                    wrong.append(seed)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(1, 5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not wrong
        assert tier.used_bytes == 0

    def test_capacity_is_kept_and_given_back(self, tier: Tier) -> None:
        blocks = [tier.allocate(CAPACITY_BYTES // 4) for _ in range(4)]
        assert tier.used_bytes == CAPACITY_BYTES
        with pytest.raises(
            TierFull, match=rf"tier {re.escape(self.label)}: no room for \d+ bytes: 0 of 1048576 are free"
        ):
            tier.allocate(1)
        tier.free(blocks[1])
        assert tier.used_bytes == CAPACITY_BYTES * 3 // 4
        tier.allocate(CAPACITY_BYTES // 4)

    def test_what_was_never_written_is_not_read(self, tier: Tier) -> None:
        with pytest.raises(BlockError, match=r"a block of 8 bytes of layer\.weight holds nothing yet; write it first"):
            tier.read(tier.allocate(8, "layer.weight"), torch.zeros(1, dtype=torch.float64)).result(60)

    def test_a_block_that_is_not_its_own_is_refused(self, tier: Tier, tmp_path: Path) -> None:
        block = tier.allocate(8)
        tier.free(block)
        data = torch.zeros(1, dtype=torch.float64)
        for use in (
            lambda: tier.write(block, data),
            lambda: tier.read(block, data),
            lambda: tier.free(block),
        ):
            with pytest.raises(BlockError, match="is not, or no longer, one of its blocks"):
                use()
        with self.make(tmp_path) as other, pytest.raises(BlockError, match="of tier t"):
            tier.free(other.allocate(8))

    def test_a_tensor_that_does_not_fit_is_refused(self, tier: Tier) -> None:
        block = tier.allocate(48)
        with pytest.raises(BlockError, match="a tensor of 56 bytes; a contiguous CPU tensor of the block's 48"):
            tier.write(block, torch.zeros(7, dtype=torch.float64))
        with pytest.raises(BlockError, match="not contiguous"):
            tier.read(block, torch.zeros(3, 2, dtype=torch.float64).T)
        with pytest.raises(BlockError, match="on meta, not on the CPU"):
            tier.write(block, torch.zeros(6, dtype=torch.float64, device="meta"))
        with pytest.raises(BlockError, match="a block of 0 bytes; at least 1"):
            tier.allocate(0)

    def test_what_is_seen_of_a_block_in_place_is_what_transfers_move(self, tier: Tier) -> None:
        block = tier.allocate(1000)
        tier.write(block, torch.full((1000,), 7, dtype=torch.uint8))
        view = tier.view(block)
        if view is None:  # it is not the CPU's to address
            return
        assert view.tolist() == [7] * 1000
        view.fill_(9)
        into = torch.zeros(1000, dtype=torch.uint8)
        tier.read(block, into).result(60)  # also where digests are taken: changed in place is not corrupted
        assert into.tolist() == [9] * 1000
        tier.write(block, torch.zeros(1000, dtype=torch.uint8)).result(60)
        assert not view.any()

    def test_a_closed_tier_says_so(self, tmp_path: Path) -> None:
        with self.make(tmp_path) as tier:
            block = tier.allocate(8)
        tier.close()
        data = torch.zeros(8, dtype=torch.uint8)
        for use in (lambda: tier.allocate(8), lambda: tier.write(block, data), lambda: tier.free(block)):
            with pytest.raises(TierError, match=rf"tier {re.escape(self.label)}: it is closed"):
                use()

    def test_closing_ends_the_transfers_and_leaves_nothing(self, tmp_path: Path) -> None:
        num_files = len(os.listdir("/proc/self/fd"))
        tier = self.make(tmp_path)
        futures = [tier.write(tier.allocate(50_000), torch.zeros(50_000, dtype=torch.uint8)) for _ in range(8)]
        tier.close()
        assert all(future.done() and future.exception() is None for future in futures)
        assert len(os.listdir("/proc/self/fd")) == num_files
        assert not os.listdir(tmp_path)
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("tier-t")]
