"""Whoever starts a collective: it is recorded, once, with its end."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import faulttol
from faulttol import ring
from faulttol.operations import OPERATORS
from tests.ranks import run_ranks
from tests.test_faulttol import callers


def _count(rank: int, world_size: int, folder: str, names: list[str]) -> dict[str, Counter[str]]:
    """By caller: how often each operator of c10d was called, as torch's profiler counts them."""
    recorder = faulttol.install(folder)
    counts = {}
    for step, name in enumerate(names):
        faulttol.mark_step(step, phase=name)
        with torch.autograd.profiler.profile() as profile:
            (callers.QUICK | callers.HEAVY)[name](rank, world_size)
        counts[name] = Counter(event.name for event in profile.function_events if event.name.startswith("c10d::"))
    faulttol.mark_phase("over")
    dist.barrier()
    deadline = time.monotonic() + 10
    while recorder.num_pending and time.monotonic() < deadline:
        time.sleep(0.001)
    faulttol.uninstall()
    return counts


def _check(folder: Path, counts: list[dict[str, Counter[str]]]) -> None:
    kinds = {f"c10d::{operation.name}": operation.kind for operation in OPERATORS}
    for rank, of_callers in enumerate(counts):
        record = ring.read(ring.ring_path(folder, rank))
        assert record.num_lost == 0
        for name, calls in of_callers.items():
            events = [event for event in record.events if event.phase == name]
            assert [event for event in events if event.state != "ended"] == [], (rank, name)
            called = Counter({kinds[operator]: number for operator, number in calls.items()})
            if name == callers.BARE:  # no operators: counted by hand
                called = Counter({"recv" if rank == 0 else "send": 2, "all_reduce": 1})
            assert Counter(event.kind for event in events) == called, (rank, name)
            assert called, (rank, name)


def test_every_collective_of_every_caller_is_recorded_once_with_its_end(tmp_path: Path) -> None:
    _check(tmp_path, run_ranks(_count, 2, str(tmp_path), list(callers.QUICK)))


@pytest.mark.slow
def test_collectives_of_deepspeed_and_of_inductor_are_recorded_too(tmp_path: Path) -> None:
    _check(tmp_path, run_ranks(_count, 2, str(tmp_path), list(callers.HEAVY), timeout_s=180))
