"""Whoever starts a collective: it is recorded, once, with its end."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import pytest
import torch.distributed as dist

import faulttol
from faulttol.bench.callers import count
from tests.ranks import run_ranks
from tests.test_faulttol import callers


def _count(rank: int, world_size: int, folder: str, names: list[str]) -> dict[str, Counter[str]]:
    """By caller: how often what was called, as torch's profiler counts it."""
    recorder = faulttol.install(folder)
    every = callers.QUICK | callers.HEAVY
    counts = count(rank, world_size, "cpu", {name: every[name] for name in names})
    dist.barrier()
    deadline = time.monotonic() + 10
    while recorder.num_pending and time.monotonic() < deadline:
        time.sleep(0.001)
    faulttol.uninstall()
    return counts


def _check(folder: Path, counts: list[dict[str, Counter[str]]]) -> None:
    for rank, of_callers in enumerate(counts):
        record = faulttol.read_ring(faulttol.ring_path(folder, rank))
        assert record.num_lost == 0
        for name, called in of_callers.items():
            events = [event for event in record.events if event.phase == name]
            assert [event for event in events if event.state != "ended"] == [], (rank, name)
            assert Counter(event.kind for event in events) == called, (rank, name)
            assert called, (rank, name)


def test_every_collective_of_every_caller_is_recorded_once_with_its_end(tmp_path: Path) -> None:
    _check(tmp_path, run_ranks(_count, 2, str(tmp_path), list(callers.QUICK)))


@pytest.mark.slow
def test_collectives_of_deepspeed_and_of_inductor_are_recorded_too(tmp_path: Path) -> None:
    _check(tmp_path, run_ranks(_count, 2, str(tmp_path), list(callers.HEAVY), timeout_s=180))
