"""run_ranks itself: values come back, and every way to fail is told apart, named and cleaned up."""

from __future__ import annotations

import os
import signal
import threading
import time
from multiprocessing import active_children

import pytest
import torch
import torch.distributed as dist

from tests import ranks
from tests.ranks import GRACE_S, RankFailed, run_ranks


def _sum_of_ranks(rank: int, world_size: int, scale: float) -> torch.Tensor:
    x = torch.full((3,), scale * (rank + 1))
    dist.all_reduce(x)
    return x


def test_ranks_share_a_group_and_return_values_in_rank_order() -> None:
    assert [x.tolist() for x in run_ranks(_sum_of_ranks, 3, 2.0)] == [[12.0] * 3] * 3
    assert run_ranks(_identity, 3) == [(0, 3), (1, 3), (2, 3)]


def _identity(rank: int, world_size: int) -> tuple[int, int]:
    return rank, world_size


def test_arguments_are_copied_not_shared() -> None:
    x = torch.zeros(4)
    assert [y.sum().item() for y in run_ranks(_fill, 2, x)] == [4.0, 8.0]
    assert x.sum().item() == 0.0


def _fill(rank: int, world_size: int, x: torch.Tensor) -> torch.Tensor:
    return x.fill_(rank + 1)


def _raise_on_rank_1(rank: int, world_size: int) -> None:
    print(f"words of rank {rank}")
    if rank == 1:
        raise KeyError("the culprit")
    dist.barrier()


def test_a_raise_is_reported_first_with_its_traceback_and_output() -> None:
    start = time.monotonic()
    with pytest.raises(RankFailed, match="the culprit") as info:
        run_ranks(_raise_on_rank_1, 3)
    assert next(iter(info.value.reports)) == 1
    assert "_raise_on_rank_1" in info.value.reports[1]
    assert "words of rank 1" in info.value.reports[1]
    assert time.monotonic() - start < 30  # far from timeout_s: nobody waits for a rank that is gone


def _die_on_rank_1(rank: int, world_size: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def test_a_death_is_reported_with_its_signal() -> None:
    with pytest.raises(RankFailed) as info:
        run_ranks(_die_on_rank_1, 2)
    assert info.value.reports[1].startswith("died (SIGKILL)")


def _hang_on_rank_0(rank: int, world_size: int) -> None:
    if rank == 0:
        _wait_for_nothing()


def _wait_for_nothing() -> None:
    threading.Event().wait()


def test_a_hang_is_reported_with_the_stacks_of_the_rank_that_hangs() -> None:
    with pytest.raises(RankFailed) as info:
        run_ranks(_hang_on_rank_0, 2, timeout_s=2)
    assert list(info.value.reports) == [0]
    assert "did not finish in time" in info.value.reports[0]
    assert "_wait_for_nothing" in info.value.reports[0]


def _wait_in_a_collective(rank: int, world_size: int) -> None:
    if rank == 1:
        _wait_for_nothing()
    dist.barrier()


def test_a_hang_shows_who_waits_in_a_collective_and_who_does_not() -> None:
    with pytest.raises(RankFailed) as info:
        run_ranks(_wait_in_a_collective, 2, timeout_s=2)
    assert "barrier" in info.value.reports[0]
    assert "_wait_for_nothing" in info.value.reports[1]


def _freeze_on_rank_0(rank: int, world_size: int) -> None:
    if rank == 0:
        os.kill(os.getpid(), signal.SIGSTOP)


def test_a_frozen_rank_is_ended_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "_EXIT_S", 2.0)
    with pytest.raises(RankFailed, match="rank 0 did not finish in time"):
        run_ranks(_freeze_on_rank_0, 2, timeout_s=1)
    assert not active_children()


def _leave_a_thread(rank: int, world_size: int) -> None:
    if rank == 0:
        threading.Thread(target=_wait_for_nothing).start()


def test_a_rank_that_does_not_exit_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "_EXIT_S", 2.0)
    with pytest.raises(RankFailed, match="did not exit") as info:
        run_ranks(_leave_a_thread, 1)
    assert "_wait_for_nothing" in info.value.reports[0]


def _return_what_does_not_pickle(rank: int, world_size: int) -> threading.Lock:
    return threading.Lock()


def test_a_value_that_does_not_pickle_is_an_error_of_its_rank() -> None:
    with pytest.raises(RankFailed, match="cannot pickle"):
        run_ranks(_return_what_does_not_pickle, 1)


def test_nothing_is_left_open_or_alive() -> None:
    run_ranks(_identity, 2)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        run_ranks(_identity, 2)
    assert len(os.listdir("/proc/self/fd")) == before
    assert not active_children()


def test_the_grace_of_a_failed_run_is_short() -> None:
    start = time.monotonic()
    with pytest.raises(RankFailed):
        run_ranks(_raise_while_the_other_sleeps, 2)
    assert time.monotonic() - start < 4 * GRACE_S


def _raise_while_the_other_sleeps(rank: int, world_size: int) -> None:
    if rank == 0:
        raise ValueError("only I")
    _wait_for_nothing()
