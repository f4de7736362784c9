"""What both recorders make of odd marks, of groups that take each other's place, and of threads that meet a group."""

from __future__ import annotations

import gc
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import faulttol
from tests.ranks import run_ranks


@pytest.mark.parametrize("native", [False, True], ids=["Python", "C++"])
def test_edges(tmp_path: Path, native: bool) -> None:
    """One process for all of them is cheaper than many."""
    run_ranks(_all, 1, str(tmp_path), native, timeout_s=120)


def _all(rank: int, world_size: int, folder: str, native: bool) -> None:
    for check in (_odd_marks, _groups_in_the_place_of_others, _threads_meet_a_group):
        try:
            check(Path(folder, check.__name__), native)
        finally:
            faulttol.uninstall()


def _odd_marks(folder: Path, native: bool) -> None:
    """What no record has room for is lost; collectives are in the step of the last mark that was written."""
    faulttol.install(folder, native=native)
    x = torch.ones(1)
    tokens: tuple[Any, ...] = (7, -1, -7, 3.7, torch.ones((), device="meta", dtype=torch.int64), torch.tensor(9))
    for step, value in enumerate(tokens, 1):
        faulttol.mark_step(step, tokens=value)
        dist.all_reduce(x)
    faulttol.mark_step(2**31)
    dist.all_reduce(x)
    record = faulttol.read_ring(faulttol.ring_path(folder, 0))
    begun = [(mark.step, mark.tokens) for mark in record.marks if mark.kind == "step_begin"]
    assert begun == [(1, 7), (6, 9)]
    assert [event.step for event in record.events] == [1, 1, 2, 3, 4, 6, 6], (
        "the end of a step was written, if not lost"
    )
    assert record.num_lost == 5


def _groups_in_the_place_of_others(folder: Path, native: bool) -> None:
    """A group is not taken for one that was at its address before, though another had taken that one's name."""
    faulttol.install(folder, native=native)
    x = torch.ones(1)
    old = dist.group.WORLD
    for _ in range(3):
        dist.all_reduce(x)
    dist.destroy_process_group()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    dist.all_reduce(x)
    del old
    gc.collect()
    groups: list[Any] = [dist.new_group([0]) for _ in range(60)]
    for group in groups:
        dist.all_reduce(x, group=group)
    events = faulttol.read_ring(faulttol.ring_path(folder, 0)).events[4:]
    assert [(event.group, event.seq) for event in events] == [(group.group_name, 1) for group in groups]


def _threads_meet_a_group(folder: Path, native: bool) -> None:
    """Threads whose first collectives of a group begin at once count together."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for generation in range(30):
            faulttol.install(folder, native=native, generation=generation, capacity=64)
            group, start = dist.new_group([0]), threading.Barrier(3)

            def reduce(group: Any = group, start: threading.Barrier = start) -> None:
                x = torch.ones(1)
                start.wait()
                dist.all_reduce(x, group=group)

            threads = [threading.Thread(target=reduce) for _ in range(3)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            events = faulttol.read_ring(faulttol.ring_path(folder, 0, generation)).events
            assert {event.group for event in events} == {group.group_name}
            assert sorted(event.seq for event in events) == [1, 2, 3]
            faulttol.uninstall()
    finally:
        sys.setswitchinterval(interval)
