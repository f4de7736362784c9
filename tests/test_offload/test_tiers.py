"""Each tier keeps the contract; the file tier also meets real disk faults, and a spec refuses nonsense."""

from __future__ import annotations

import errno
import os
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offload import (
    CpuTier,
    CxlTier,
    GpuTier,
    NvmeTier,
    SpecError,
    StripedTier,
    TierError,
    TierFull,
    TierSpec,
    building,
    movers,
)
from offload.movers import IoName
from offload.nvme import Extent, Extents
from tests.contracts.tier import CAPACITY_BYTES, TierContract, spec
from tests.ranks import RankFailed, run_ranks


class TestCpuTier(TierContract):
    def make(self, folder: Path) -> CpuTier:
        return CpuTier(spec())


class TestNvmeTierByThreads(TierContract):
    def make(self, folder: Path) -> NvmeTier:
        return NvmeTier(spec(), folder, num_threads=2, io="threads")


@pytest.mark.skipif(bool(movers.refusal("io_uring")), reason="this kernel allows no io_uring")
class TestNvmeTierByIoUring(TierContract):
    def make(self, folder: Path) -> NvmeTier:
        return NvmeTier(spec(), folder, num_threads=2, io="io_uring")


class TestNvmeTierByDeepSpeedsHandle(TierContract):
    def make(self, folder: Path) -> NvmeTier:
        if problem := movers.refusal("aio"):  # asked here: it imports DeepSpeed
            pytest.skip(problem)
        return NvmeTier(spec(), folder, num_threads=2, io="aio")


class TestNvmeTierWithSmallChunksAndFsync(TierContract):
    def make(self, folder: Path) -> NvmeTier:
        return NvmeTier(spec(), folder, num_threads=3, chunk_bytes=5000, fsync=True)


class TestCpuTierWithDigests(TierContract):
    def make(self, folder: Path) -> CpuTier:
        return CpuTier(spec(), digests=True)


class TestGpuTierOnTheCpu(TierContract):
    def make(self, folder: Path) -> GpuTier:
        return GpuTier(spec(), torch.device("cpu"))


class TestCxlTierOnANode(TierContract):
    """Node 0 is there on every machine; what makes another one CXL is not the kernel calls."""

    def make(self, folder: Path) -> CxlTier:
        return CxlTier(spec(), node=0)


class TestEmulatedCxlTier(TierContract):
    label = "t (emulated)"

    def make(self, folder: Path) -> CxlTier:
        return CxlTier(spec(rate=1e10, emulated=True))


class TestStripedTier(TierContract):
    def make(self, folder: Path) -> StripedTier:
        half = CAPACITY_BYTES // 2
        return StripedTier("t", [CpuTier(spec(half, name=f"t{index}")) for index in range(2)])


class TestStripedTierOfUnequalParts(TierContract):
    label = "t (emulated)"

    def make(self, folder: Path) -> StripedTier:
        quarter = CAPACITY_BYTES // 4
        fast = CxlTier(spec(3 * quarter, name="t0", rate=3e10, emulated=True))
        return StripedTier("t", [fast, NvmeTier(spec(quarter, name="t1", rate=1e10), folder, num_threads=2)])


class TestNvmeTierThroughThePageCache(TierContract):
    def make(self, folder: Path) -> NvmeTier:
        return NvmeTier(spec(), folder, num_threads=2, direct=False)


def _file_of(tier: NvmeTier, folder: Path) -> Path:
    """Return a way to the tier's unnamed file: it stays under /proc while it is open."""
    paths = [Path("/proc/self/fd", str(number)) for number in range(256)]
    (path,) = (path for path in paths if path.is_symlink() and str(folder) in os.readlink(path))
    return path


IOS: list[IoName] = [io for io in ("threads", "io_uring") if not movers.refusal(io)]


@pytest.mark.parametrize("io", IOS)
def test_a_file_that_lost_its_end_is_an_error_not_a_wrong_number(io: IoName, tmp_path: Path) -> None:
    with NvmeTier(spec(), tmp_path, io=io) as tier:
        block = tier.allocate(100_000)
        tier.write(block, torch.ones(100_000, dtype=torch.uint8)).result(60)
        os.truncate(_file_of(tier, tmp_path), 50_000)
        with pytest.raises(TierError, match="tier t: reading a block of 100000 bytes failed: the file ended"):
            tier.read(block, torch.zeros(100_000, dtype=torch.uint8)).result(60)


@pytest.mark.parametrize("io", IOS)
def test_a_large_block_is_moved_in_many_pieces(io: IoName, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ends that no sector has, and more pieces than are in flight at once, in the block and in each buffer."""
    monkeypatch.setattr(movers, "_PIECE_BYTES", 1 << 16)
    data = torch.randint(0, 256, (1 + (80 << 16) + 7,), dtype=torch.uint8)
    for start in (0, 1):
        part = data[start:]
        with NvmeTier(spec(8 << 20), tmp_path, num_threads=1, chunk_bytes=40 << 16, io=io) as tier:
            block, back = tier.allocate(part.numel()), torch.zeros_like(part)
            tier.write(block, part).result(60)
            tier.read(block, back).result(60)
            assert torch.equal(back, part)


def test_what_moves_the_bytes_is_told_and_what_cannot_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with NvmeTier(spec(), tmp_path) as tier:
        assert tier.io == ("threads" if movers.refusal("io_uring") else "io_uring")
    with pytest.raises(TierError, match=r"io: 'dma'; allowed: auto, threads, io_uring, aio"):
        NvmeTier(spec(), tmp_path, io="dma")  # type: ignore[arg-type]
    monkeypatch.setattr(building, "URING", building.Recipe("uring.c", ("no-such-compiler",), (), "choose io='threads'"))
    with pytest.raises(TierError, match=r"io_uring: uring\.c: none of no-such-compiler .*choose io='threads'"):
        NvmeTier(spec(), tmp_path, io="io_uring")
    with NvmeTier(spec(), tmp_path) as tier:
        assert tier.io == "threads"
    assert not os.listdir(tmp_path)


def test_auto_is_threads_where_there_is_no_room_for_all_rings(tmp_path: Path) -> None:
    if movers.refusal("io_uring"):
        pytest.skip("no io_uring here")
    least, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = os.listdir("/proc/self/fd")
    limit = max(map(int, before)) + 3  # some rings fit, so many do not
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, most))
    try:
        assert movers.chosen("auto") == "io_uring"
        with NvmeTier(spec(), tmp_path, num_threads=limit, chunk_bytes=4096) as tier:
            assert tier.io == "threads"
            block = tier.allocate(5000)
            tier.write(block, torch.ones(5000, dtype=torch.uint8)).result(60)
            back = torch.zeros(5000, dtype=torch.uint8)
            tier.read(block, back).result(60)
            assert bool(back.all())
        with pytest.raises(TierError, match=r"io_uring: Too many open files: .*ulimit -n, or choose io='threads'"):
            NvmeTier(spec(), tmp_path, num_threads=limit, io="io_uring")
        assert len(os.listdir("/proc/self/fd")) == len(before)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (least, most))


def test_what_is_always_direct_is_refused_where_direct_io_is_not_wanted(tmp_path: Path) -> None:
    with pytest.raises(TierError, match=r"direct: False; io='aio' is always direct: choose io='threads' or 'io_uring'"):
        NvmeTier(spec(), tmp_path, io="aio", direct=False)


def test_deepspeeds_handle_is_refused_with_what_to_install(tmp_path: Path) -> None:
    if not movers.refusal("aio"):
        pytest.skip("DeepSpeed's async_io builds here")
    with pytest.raises(TierError, match=r"aio: DeepSpeed.*install"):
        NvmeTier(spec(), tmp_path, io="aio")


def _failed_writes(rank: int, world_size: int, folder: Path, ios: list[IoName]) -> list[str]:
    """Return what is told, in a process whose files may not grow."""
    told = []
    data = torch.ones(1 << 19, dtype=torch.uint8)
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    for io in ios:
        tier = NvmeTier(spec(1 << 20), folder, io=io)
        small, large = tier.allocate(4096), tier.allocate(1 << 19, "w")
        tier.write(large, data).result(60)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, most))  # from here on the disk takes one sector
        for move in (tier.write, tier.read):
            with pytest.raises(TierError) as failed:
                move(large, data).result(60)
            told.append(str(failed.value))
        tier.write(small, data[:4096]).result(60)
        with pytest.raises(TierFull) as full:
            tier.allocate(1 << 18, "m")
        told.append(str(full.value))
        with pytest.raises(TierError) as closed:
            tier.close()
        told.append(str(closed.value))
        tier.close()
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    return told


def test_a_failed_write_is_told_by_its_future_by_reads_and_by_close(tmp_path: Path) -> None:
    (lines,) = run_ranks(_failed_writes, 1, tmp_path, IOS)
    assert len(lines) == 4 * len(IOS)
    for first in range(0, len(lines), 4):
        write, read, full, close = lines[first : first + 4]
        assert write == "tier t: writing a block of 524288 bytes of w failed: [Errno 27] File too large"
        assert read == write
        assert full == (
            f"tier t: a block of 262144 bytes of m: {tmp_path} has no room for 262144 bytes more: File too "
            "large; free some of the disk or lower the tier's capacity"
        )
        assert close == write


def _killed(rank: int, world_size: int, folder: Path) -> None:
    tier = NvmeTier(spec(1 << 20), folder)
    tier.allocate(1 << 20)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(RankFailed, match="SIGKILL"):
        run_ranks(_killed, 1, tmp_path)
    assert not os.listdir(tmp_path)


def test_where_no_file_is_without_a_name_it_loses_its_name_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    real = os.open

    def without_unnamed(path: Any, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        opened.append(str(path))
        return real(path, flags, mode)

    monkeypatch.setattr(os, "open", without_unnamed)
    with NvmeTier(spec(), tmp_path, io="threads") as tier:
        assert any(path.startswith(f"{tmp_path}/.tier-t-") for path in opened)
        assert not list(tmp_path.iterdir())
        data, back = torch.arange(512), torch.empty(512, dtype=torch.int64)
        block = tier.allocate(4096)
        tier.write(block, data).result(60)
        tier.read(block, back).result(60)
        assert torch.equal(back, data)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(TierError, match=r"tier t: cannot make a file in .*/nowhere: No such file"):
        NvmeTier(spec(), tmp_path / "nowhere")


def test_a_folder_that_takes_no_file_is_named() -> None:
    with pytest.raises(TierError, match="tier t: cannot make a file in /proc: "):
        NvmeTier(spec(), "/proc")


def test_a_spec_tells_all_its_problems() -> None:
    with pytest.raises(SpecError) as info:
        TierSpec(name="x", capacity_bytes=-1, read_bytes_per_s=0.0, write_bytes_per_s=float("nan"), latency_s=-1.0)
    assert str(info.value).splitlines() == [
        "tier x: capacity_bytes: -1; at least 0",
        "tier x: latency_s: -1.0; finite, at least 0",
        "tier x: read_bytes_per_s: 0.0; above 0",
        "tier x: write_bytes_per_s: nan; above 0",
    ]


@given(st.lists(st.tuples(st.integers(1, 5), st.booleans()), max_size=60), st.randoms(use_true_random=False))
def test_extents_never_overlap_and_the_freed_file_is_one_run(steps: list[tuple[int, bool]], dice: object) -> None:
    extents = Extents()
    taken: list[Extent] = []
    for num_bytes, free in steps:
        if free and taken:
            extents.give(taken.pop(dice.randrange(len(taken))))  # type: ignore[attr-defined]
        else:
            taken.append(extents.take(num_bytes) or extents.grow(num_bytes))
        cells = [cell for e in taken for cell in range(e.offset, e.offset + e.num_bytes)]
        assert len(cells) == len(set(cells))
        assert all(cell < extents.end for cell in cells)
    for extent in taken:
        extents.give(extent)
    if extents.end:
        assert extents.take(extents.end) == Extent(0, extents.end)


def test_the_smallest_run_that_fits_is_taken() -> None:
    extents = Extents()
    large, _, small, _ = (extents.grow(size) for size in (10, 1, 4, 1))
    extents.give(large)
    extents.give(small)
    assert extents.take(3) == Extent(small.offset, 3)
    assert extents.take(4) == Extent(large.offset, 4)
    assert extents.take(7) is None
