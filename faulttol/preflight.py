"""Checks of a machine before a rank starts on it, or comes back to it: does it compute, remember, store and connect?

Each check has a deadline of its own only where it can hang by itself; none needs a process group but that of links.
What is compared with a threshold is reported with it, so that a person sees how close it was.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

_SIZE = 192  # of the matrices: products of integers up to 8 stay below 2^24, where float32 is exact
_LARGEST = 8
_MEMORY_BYTES = 16 << 20
_DISK_BYTES = 4 << 20
_LINK_BYTES = 64 << 10


@dataclass(frozen=True, kw_only=True, slots=True)
class Need:
    """What a machine must have."""

    free_memory_bytes: int = 256 << 20
    """Memory that can be had without swapping; not above what a cgroup leaves."""
    free_disk_bytes: int = 256 << 20
    """On the disk that is written to."""
    slowest_link: float = 10.0
    """A message may take this many times the median of all."""


@dataclass(frozen=True, slots=True)
class Check:
    """What one check found."""

    name: str
    ok: bool
    detail: str
    seconds: float


def check_machine(folder: Path, *, device: str = "cpu", need: Need | None = None) -> list[Check]:
    """Return what the checks of this machine say; about 0.1 s on a CPU. `folder` is where the job will write.

    Nothing raises for a bad machine: what fails is a check that is not `ok`.
    """
    import torch  # noqa: F401  not on the first check's time

    wanted = need or Need()
    checks: Mapping[str, Callable[[], str]] = {
        "products": lambda: _products(device),
        "memory": lambda: _memory(wanted.free_memory_bytes),
        "disk": lambda: _disk(folder, wanted.free_disk_bytes),
    }
    return [_run(name, check) for name, check in checks.items()]


def check_links(group: ProcessGroup | None = None, *, device: str = "cpu", need: Need | None = None) -> Check:
    """Return whether every pair of ranks can exchange messages about equally fast; every rank of the group calls it.

    All ranks get the same verdict. A link that carries nothing ends in the group's timeout, which raises.
    """
    factor = (need or Need()).slowest_link
    return _run("links", lambda: _links(group, device, factor))


def summary(checks: Sequence[Check]) -> str:
    """Return a line for each check."""
    return "\n".join(
        f"{'ok' if check.ok else 'FAILED':6s} {check.name:9s} {check.detail} ({check.seconds:.2f} s)"
        for check in checks
    )


class _Failed(Exception):
    """A check that did not hold; its text says what was found."""


def _run(name: str, check: Callable[[], str]) -> Check:
    began_s = time.perf_counter()
    try:
        detail, is_ok = check(), True
    except (_Failed, OSError, RuntimeError, MemoryError) as error:  # a broken machine shows in many ways
        detail, is_ok = str(error) or type(error).__name__, False
    return Check(name, is_ok, detail, time.perf_counter() - began_s)


def _products(device: str) -> str:
    """Multiply matrices whose products are exact, and compare row and column sums with what they must be.

    Sum of a column of A B = (column sums of A) B: a wrong element shows in its row and in its column.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    shape = (_SIZE, _SIZE)
    left, right = (torch.randint(0, _LARGEST + 1, shape, generator=generator) for _ in range(2))
    for dtype in (torch.float32, torch.float64):
        product = (left.to(device, dtype) @ right.to(device, dtype)).cpu().to(torch.int64)
        rows = (product.sum(1) != left @ right.sum(1)).nonzero().flatten().tolist()
        columns = (product.sum(0) != left.sum(0) @ right).nonzero().flatten().tolist()
        if rows or columns:
            raise _Failed(f"{dtype} products on {device} are wrong in rows {rows[:8]} and columns {columns[:8]}")
    return f"{_SIZE} x {_SIZE} products on {device} agree with their checksums"


def _memory(least_bytes: int) -> str:
    """See that there is memory, and that it keeps what is written to it."""
    import torch

    free = _free_memory_bytes()
    if free < least_bytes:
        raise _Failed(f"{free >> 20} MiB can be had; needed: {least_bytes >> 20} MiB")
    for pattern in (0x55, 0xAA):
        block = torch.full((_MEMORY_BYTES,), pattern, dtype=torch.uint8)
        wrong = int((block != pattern).sum())
        if wrong:
            raise _Failed(f"{wrong} of {_MEMORY_BYTES} bytes did not keep {pattern:#x}")
    return f"{free >> 20} MiB can be had, {_MEMORY_BYTES >> 20} MiB kept their patterns"


def _free_memory_bytes() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (text := limit.read_text().strip()) != "max":
        free = min(free, int(text) - int(used.read_text()))
    return free


def _disk(folder: Path, least_bytes: int) -> str:
    """See that there is room, and that what is written and flushed can be read back."""
    free = shutil.disk_usage(folder).free
    if free < least_bytes:
        raise _Failed(f"{folder}: {free >> 20} MiB are free; needed: {least_bytes >> 20} MiB")
    content = os.urandom(_DISK_BYTES)
    began_s = time.perf_counter()
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".preflight-") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        written_s = time.perf_counter() - began_s
        if Path(file.name).read_bytes() != content:
            raise _Failed(f"{folder}: what was read is not what was written")
    rate = _DISK_BYTES / max(written_s, 1e-9) / 1e6
    return f"{folder}: {free >> 20} MiB are free, {rate:.0f} MB/s written and flushed"


def _links(group: ProcessGroup | None, device: str, factor: float) -> str:
    """Exchange messages in rounds of disjoint pairs, both ways at once; the fastest of three each."""
    import torch
    import torch.distributed as dist

    rank, size = dist.get_rank(group), dist.get_world_size(group)
    taken = torch.zeros(size, size, dtype=torch.float64, device=device)
    for peer in _peers(rank, size):
        taken[rank, peer] = min(_exchange(rank, peer, group, device) for _ in range(3))
    dist.all_reduce(taken, group=group)
    pairs = [(float(taken[a, b]), a, b) for a in range(size) for b in range(size) if a != b]
    if not pairs:
        return "one rank has no links"
    usual = sorted(pairs)[len(pairs) // 2][0]
    slowest, sender, receiver = max(pairs)
    if math.isinf(slowest):
        raise _Failed(f"what rank {sender} got from rank {receiver} is not what was sent")
    told = f"{_LINK_BYTES >> 10} KiB both ways: usually {usual * 1e3:.1f} ms, at most {slowest * 1e3:.1f} ms"
    if slowest > factor * usual and slowest > 0.01:
        raise _Failed(f"{told}, between ranks {sender} and {receiver}; allowed: {factor:g} times the usual")
    return told


def _peers(rank: int, size: int) -> list[int]:
    """Return whom a rank meets, round by round, so that in every round all pairs are disjoint."""
    rounds = size if size % 2 else size - 1
    peers = []
    for index in range(rounds):
        if size % 2 == 0 and rank == size - 1:
            peer = next(one for one in range(rounds) if 2 * one % rounds == index)
        else:
            peer = (index - rank) % rounds
            peer = size - 1 if peer == rank and size % 2 == 0 else peer
        if peer != rank:
            peers.append(peer)
    return peers


def _exchange(rank: int, peer: int, group: ProcessGroup | None, device: str) -> float:
    """Return the seconds of one exchange; infinity where what came is not what was sent."""
    import torch
    import torch.distributed as dist

    sent, got = _message(rank, device), torch.zeros(_LINK_BYTES // 4, dtype=torch.int32, device=device)
    began_s = time.perf_counter()
    works = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, sent, group=group, group_peer=peer),
            dist.P2POp(dist.irecv, got, group=group, group_peer=peer),
        ]
    )
    for work in works:
        work.wait()
    is_whole = torch.equal(got, _message(peer, device))
    seconds = time.perf_counter() - began_s
    return seconds if is_whole else math.inf


def _message(rank: int, device: str) -> torch.Tensor:
    import torch

    return torch.arange(_LINK_BYTES // 4, dtype=torch.int32, device=device) ^ (rank + 1)
