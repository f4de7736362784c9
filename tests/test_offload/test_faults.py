"""What a device gets wrong is told, with the tensor and the tier, before a wrong number is used."""

from __future__ import annotations

import dataclasses
import os
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offload import Corrupted, CpuTier, CxlTier, NvmeTier, SpecError, StripedTier, TierError, TierFull, building
from offload.digest import digest, native
from offload.medium import Medium
from offload.pages import allocate_pages, nodes_of
from offload.throttle import Throttled
from tests.contracts.tier import spec


def open_file(folder: Path) -> Path:
    """Return a way to a tier's unnamed file: it stays under /proc while it is open."""
    paths = [Path("/proc/self/fd", str(number)) for number in range(256)]
    (path,) = (path for path in paths if path.is_symlink() and str(folder) in os.readlink(path))
    return path


def test_a_corrupted_block_is_told_with_its_tensor_and_its_tier(tmp_path: Path) -> None:
    data = torch.randn(30_000)
    with NvmeTier(spec(name="disk"), tmp_path) as tier:
        block, other = tier.allocate(data.nbytes, "exp_avg of layers.3"), tier.allocate(data.nbytes)
        tier.write(block, data).result(60)
        tier.write(other, data).result(60)
        with open(open_file(tmp_path), "r+b") as file:  # through the page cache: direct reads flush it
            file.seek(50_001)
            (byte,) = file.read(1)
            file.seek(50_001)
            file.write(bytes([byte ^ 4]))
        with pytest.raises(
            Corrupted, match=r"tier disk: a block of 120000 bytes of exp_avg of layers\.3 came back different"
        ):
            tier.read(block, torch.empty_like(data)).result(60)
        back = torch.empty_like(data)
        tier.read(other, back).result(60)
        assert torch.equal(back, data)
        tier.write(block, data).result(60)  # a new write heals it
        tier.read(block, back).result(60)
    with NvmeTier(spec(name="disk"), tmp_path, digests=False) as tier:
        block = tier.allocate(data.nbytes)
        tier.write(block, data).result(60)
        with open(open_file(tmp_path), "r+b") as file:
            file.write(b"\x01\x02\x03")
        tier.read(block, back).result(60)  # asked for none
        assert not torch.equal(back, data)


def test_a_file_that_is_gone_is_told_with_its_tensor_and_its_tier(tmp_path: Path) -> None:
    with NvmeTier(spec(name="disk"), tmp_path) as tier:
        block = tier.allocate(4096, "master of head")
        tier.write(block, torch.ones(4096, dtype=torch.uint8)).result(60)
        os.truncate(open_file(tmp_path), 0)
        with pytest.raises(TierError, match=r"tier disk: reading a block of 4096 bytes of master of head failed: .*"):
            tier.read(block, torch.empty(4096, dtype=torch.uint8)).result(60)


def test_a_full_part_of_a_striped_tier_leaves_nothing_behind(tmp_path: Path) -> None:
    parts = [CpuTier(spec(1 << 20, name="a")), CpuTier(spec(1 << 20, name="b"))]
    with StripedTier("t", parts) as tier:
        taken = parts[1].allocate(1 << 20)  # somebody else's
        with pytest.raises(TierFull, match=r"tier t: no room for 65536 bytes: .*; tier b: no room for 32768 bytes of"):
            tier.allocate(65536, "w")
        assert parts[0].used_bytes == 0
        parts[1].free(taken)
        tier.allocate(65536, "w")
        assert [part.used_bytes for part in parts] == [32768, 32768]


def test_an_error_of_one_part_is_the_error_of_the_striped_transfer(tmp_path: Path) -> None:
    with StripedTier("t", [CpuTier(spec(name="a")), NvmeTier(spec(name="b"), tmp_path)]) as tier:
        block = tier.allocate(1 << 16, "w")
        tier.write(block, torch.ones(1 << 16, dtype=torch.uint8)).result(60)
        os.truncate(open_file(tmp_path), 0)
        with pytest.raises(TierError, match="tier b: reading a block of 32768 bytes of w failed"):
            tier.read(block, torch.empty(1 << 16, dtype=torch.uint8)).result(60)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 200_000), st.integers(0, 15), st.randoms(use_true_random=False))
def test_every_changed_bit_changes_the_digest(num_bytes: int, start: int, dice: random.Random) -> None:
    data = torch.randint(0, 256, (start + num_bytes,), dtype=torch.uint8)[start:]
    before = digest(data)
    assert digest(data.clone()) == before
    where = dice.randrange(num_bytes)
    data[where] ^= 1 << dice.randrange(8)
    assert digest(data) != before


def test_the_digest_sees_exchanged_and_missing_bytes() -> None:
    data = torch.arange(1 << 20, dtype=torch.int64).view(torch.uint8)
    rows = data.view(-1, 8 * 8192)
    assert digest(rows.roll(1, 0).reshape(-1)) != digest(data)
    assert digest(data.view(-1, 8).flip(0).reshape(-1)) != digest(data)
    zeros = torch.zeros(1 << 17, dtype=torch.uint8)
    assert len({digest(zeros[:size]) for size in (1, 8, 65536, 65544, 1 << 17)}) == 5


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 300_000), st.integers(0, 15))
def test_a_digest_is_the_same_with_a_compiler_and_without(num_bytes: int, start: int) -> None:
    data = torch.randint(0, 256, (start + num_bytes,), dtype=torch.uint8)[start:]
    assert native(building.DIGEST) is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(building, "DIGEST", building.Recipe("digest.c", ("no-such-compiler",), (), ""))
        assert native(building.DIGEST) is None
        plain = digest(data)
    assert digest(data) == plain


class _Instant:
    """A medium that takes no time."""

    granularity_bytes = 1

    def reserve(self, num_bytes: int) -> int:
        return num_bytes

    def release(self, place: int) -> None: ...

    def store(self, place: int, data: torch.Tensor) -> None: ...

    def load(self, place: int, into: torch.Tensor) -> None: ...

    def view(self, place: int, num_bytes: int) -> torch.Tensor:
        return torch.zeros(num_bytes, dtype=torch.uint8)

    def close(self) -> None: ...


def test_an_emulated_device_keeps_its_rates_and_its_latency() -> None:
    at_s = [0.0]

    def sleep(seconds: float) -> None:
        at_s[0] += seconds

    slow = spec(rate=1000.0, emulated=True)
    inner: Medium[int] = _Instant()
    medium = Throttled(inner, slow, now_s=lambda: at_s[0], sleep=sleep)
    data = torch.zeros(500, dtype=torch.uint8)
    for _ in range(4):
        medium.store(0, data)
    assert at_s[0] == pytest.approx(2.0)
    medium.load(0, data)  # the other direction is free
    assert at_s[0] == pytest.approx(2.5)
    at_s[0] = 100.0  # an idle link has no credit
    medium.store(0, data)
    assert at_s[0] == pytest.approx(100.5)
    assert medium.view(0, 8) is None
    late = Throttled(inner, dataclasses.replace(slow, latency_s=0.25), now_s=lambda: at_s[0], sleep=sleep)
    late.load(0, data[:1])
    assert at_s[0] == pytest.approx(100.751)


def test_pages_lie_on_the_node_that_was_asked_for() -> None:
    with CxlTier(spec(), node=0) as tier:
        view = tier.view(tier.allocate(40_000))
        assert view is not None
        assert nodes_of(view) == {}  # nothing touched yet
        view.fill_(1)
        assert nodes_of(view) == {0: 10}
    with pytest.raises(TierError, match="binding memory to NUMA node 900: Invalid argument"):
        allocate_pages(4096, node=900)


def test_a_cxl_tier_is_real_or_says_that_it_is_not() -> None:
    with pytest.raises(SpecError, match=r"tier t: node: None; an emulated tier has none, a real one needs the index"):
        CxlTier(spec())
    with pytest.raises(SpecError, match=r"tier t \(emulated\): node: 0"):
        CxlTier(spec(emulated=True), node=0)
    with CxlTier(spec(emulated=True)) as tier:
        assert tier.spec.label == "t (emulated)"
        assert tier.view(tier.allocate(8)) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to lock memory for")
def test_locked_memory_without_a_gpu_is_refused() -> None:
    with pytest.raises(TierError, match="pinned: memory is locked for a GPU, and there is none"):
        CpuTier(spec(), pinned=True)
