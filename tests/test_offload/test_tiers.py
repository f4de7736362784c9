"""Each tier keeps the contract; the file tier also meets real disk faults, and a spec refuses nonsense."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offload import CpuTier, CxlTier, GpuTier, NvmeTier, SpecError, StripedTier, TierError, TierSpec, building, movers
from offload.movers import IoName
from offload.nvme import Extent, Extents
from tests.contracts.tier import CAPACITY_BYTES, TierContract, spec


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
def test_a_large_block_is_moved_in_many_pieces(io: IoName, tmp_path: Path) -> None:
    """Two ends that no sector has, and more pieces than are in flight at once."""
    data = torch.randint(0, 256, (1 + (40 << 20) + 7,), dtype=torch.uint8)
    for start in (0, 1):
        part = data[start:]
        with NvmeTier(spec(64 << 20), tmp_path, num_threads=1, io=io) as tier:
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


def test_deepspeeds_handle_is_refused_with_what_to_install(tmp_path: Path) -> None:
    if not movers.refusal("aio"):
        pytest.skip("DeepSpeed's async_io builds here")
    with pytest.raises(TierError, match=r"aio: DeepSpeed.*install"):
        NvmeTier(spec(), tmp_path, io="aio")


_FAILED_WRITE = """
import resource, sys
import torch
from offload import NvmeTier, TierError, TierSpec

spec = TierSpec(name="t", capacity_bytes=1 << 20, read_bytes_per_s=1.0, write_bytes_per_s=1.0, latency_s=0.0)
data = torch.ones(1 << 19, dtype=torch.uint8)
_, most = resource.getrlimit(resource.RLIMIT_FSIZE)
for io in sys.argv[2:]:
    tier = NvmeTier(spec, sys.argv[1], io=io)
    small, large = tier.allocate(4096), tier.allocate(1 << 19, 'w')
    tier.write(large, data).result(60)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, most))  # from here on the disk takes one sector
    for attempt in (lambda: tier.write(large, data), lambda: tier.read(large, data)):
        try:
            attempt().result(60)
        except TierError as error:
            print(error)
    tier.write(small, data[:4096]).result(60)
    try:
        tier.allocate(1 << 18, 'm')
    except TierError as error:
        print(type(error).__name__, error)
    try:
        tier.close()
    except TierError as error:
        print("close:", error)
    tier.close()
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
"""


def test_a_failed_write_is_told_by_its_future_by_reads_and_by_close(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _FAILED_WRITE, str(tmp_path), *IOS], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 4 * len(IOS)
    for first in range(0, len(lines), 4):
        write, read, full, close = lines[first : first + 4]
        assert write == "tier t: writing a block of 524288 bytes of w failed: [Errno 27] File too large"
        assert read == write
        assert full == (
            f"TierFull tier t: a block of 262144 bytes of m: {tmp_path} has no room for 262144 bytes more: File too "
            "large; free some of the disk or lower the tier's capacity"
        )
        assert close == f"close: {write}"


def test_a_killed_process_leaves_no_file(tmp_path: Path) -> None:
    program = (
        "import sys, os, signal; from offload import NvmeTier, TierSpec\n"
        "rates = dict(read_bytes_per_s=1, write_bytes_per_s=1, latency_s=0)\n"
        "spec = TierSpec(name='t', capacity_bytes=1 << 20, **rates)\n"
        "tier = NvmeTier(spec, sys.argv[1]); tier.allocate(1 << 20)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert not os.listdir(tmp_path)


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
        "tier x: latency_s: -1.0; at least 0",
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
