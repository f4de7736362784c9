"""Saving in the middle of a step: what is armed, when it may be saved, and what the ranks agree on."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest
import torch

from checkpoint import CheckpointConfig, Checkpointer, InvalidState, SaveAborted, SaveFailed, StorageError
from checkpoint.config import MemoryConfig, RemoteConfig
from checkpoint.storage import open_storage
from tests.test_checkpoint.stalls import stalled
from tests.test_checkpoint.worlds import ranks, wait_until


def loaded(ck: Checkpointer) -> tuple[int, float]:
    """Return the step and the value of the newest checkpoint."""
    info, found = ck.latest(), torch.zeros(1000)
    assert info is not None
    ck.load(info, {"w": found})
    assert (found == found[0]).all()
    return info.step, found[0].item()


def test_the_armed_state_is_saved_in_the_middle_of_a_step(tmp_path: Path):
    weight = torch.full((1000,), 4.0)
    with Checkpointer(tmp_path) as ck:
        ck.arm(4, {"w": weight}, {"lr": 0.1}, shared={"tokens": 9})
        assert ck.preempted is None
        ck.preempt()
        wait_until(lambda: ck.preempted is not None)
        ck.fence()
        weight.fill_(5.0)
        assert ck.preempted.result(20).shared == {"tokens": 9}
        assert loaded(ck) == (4, 4.0)


def test_a_wish_during_an_update_waits_for_its_end(tmp_path: Path):
    weight = torch.full((1000,), 4.0)
    with Checkpointer(tmp_path) as ck:
        ck.arm(4, {"w": weight})
        ck.fence()
        weight.fill_(4.5)
        ck.preempt()
        weight.fill_(5.0)
        ck.arm(5, {"w": weight})
        wait_until(lambda: ck.preempted is not None)
        assert ck.preempted.result(20).step == 5
        assert loaded(ck) == (5, 5.0)


def test_a_wish_before_anything_is_armed_is_granted_then(tmp_path: Path):
    with Checkpointer(tmp_path) as ck:
        ck.preempt()
        ck.arm(1, {"w": torch.full((1000,), 1.0)})
        assert ck.preempted is not None
        ck.preempted.result(20)
        assert loaded(ck) == (1, 1.0)


def test_one_wish_is_one_save_and_what_is_being_saved_already_is_not_saved_again(tmp_path: Path):
    weights = {"w": torch.zeros(1000)}
    with Checkpointer(tmp_path, config=CheckpointConfig(keep_last=9)) as ck:
        ck.arm(1, weights)
        handle = ck.save(1, weights)
        ck.preempt()
        wait_until(lambda: ck.preempted is not None)
        assert ck.preempted is handle
        ck.preempt()
        ck.arm(2, weights)
        ck.close()
        assert [info.step for info in ck.list()] == [1]


def test_a_step_that_was_saved_for_a_wish_is_not_saved_again_by_the_loop(tmp_path: Path):
    weights = {"w": torch.zeros(1000)}
    with Checkpointer(tmp_path, config=CheckpointConfig(keep_last=9)) as ck:
        ck.arm(1, weights)
        ck.preempt()
        wait_until(lambda: ck.preempted is not None)
        assert ck.save(1, weights) is ck.preempted
        ck.close()
        assert len(ck.list()) == 1


def test_what_is_armed_last_counts_even_for_the_same_step(tmp_path: Path):
    with Checkpointer(tmp_path) as ck:
        for value in (1.0, 2.0):
            ck.arm(1, {"w": torch.full((1000,), value)})
        ck.preempt()
        wait_until(lambda: ck.preempted is not None)
        ck.preempted.result(20)
        assert loaded(ck) == (1, 2.0)


def test_a_signal_handler_may_ask(tmp_path: Path):
    with Checkpointer(tmp_path) as ck:
        before = signal.signal(signal.SIGUSR1, lambda *_: ck.preempt())
        try:
            ck.arm(3, {"w": torch.full((1000,), 3.0)})
            os.kill(os.getpid(), signal.SIGUSR1)
            wait_until(lambda: ck.preempted is not None)
        finally:
            signal.signal(signal.SIGUSR1, before)
        ck.preempted.result(20)
        assert loaded(ck) == (3, 3.0)


def test_ranks_a_step_apart_save_the_step_that_both_reach(tmp_path: Path):
    def train(rank: int) -> int:
        config = CheckpointConfig(urgent_deadline_s=4)
        with Checkpointer(tmp_path, config=config, rank=rank, world_size=2, run_id="run") as ck:
            for step in (7, 8) if rank == 0 else (8,):
                ck.arm(step, {"w": torch.full((1000,), float(step))})
                if ck.preempted is None:
                    ck.preempt()
                    wait_until(lambda: ck.preempted is not None)
                ck.fence()
            return ck.preempted.result(20).step

    # Rank 0's save of step 7 finds nobody else, and fails for itself alone: nobody asked for that very step.
    assert ranks(2, train) == [8, 8]
    assert loaded(Checkpointer(tmp_path)) == (8, 8.0)


def test_a_save_that_the_loop_asked_for_is_not_given_up_for_a_wish(tmp_path: Path):
    weights = {"w": torch.zeros(1000)}

    def train(rank: int) -> list[int]:
        config = CheckpointConfig(keep_last=9)
        with Checkpointer(tmp_path, config=config, rank=rank, world_size=2, run_id="run") as ck:
            if rank == 0:
                ck.arm(1, weights)
                slow = ck.save(1, weights)
                ck.preempt()
                wait_until(lambda: ck.preempted is slow)
                ck.arm(2, weights)
                assert ck.preempted is not slow
            wait_until(lambda: len(list(tmp_path.glob("step-*2.*/r00000.safetensors"))) == 1)
            return [(slow if rank == 0 and step == 1 else ck.save(step, weights)).result(20).step for step in (1, 2)]

    assert ranks(2, train) == [[1, 2], [1, 2]]


def test_a_wish_is_not_granted_by_a_save_into_memory_alone(tmp_path: Path):
    config = CheckpointConfig(memory=MemoryConfig(every=1))
    with Checkpointer(tmp_path / "disk", config=config, memory=open_storage(tmp_path / "memory")) as ck:
        weights = {"w": torch.full((1000,), 3.0)}
        ck.arm(3, weights)
        assert [outcome.tier for outcome in ck.save(3, weights).outcomes] == ["memory"]
        ck.preempt()
        wait_until(lambda: ck.preempted is not None)
        assert [outcome.tier for outcome in ck.preempted.outcomes] == ["local"]
        ck.preempted.result(20)
    assert loaded(Checkpointer(tmp_path / "disk")) == (3, 3.0)


def test_what_cannot_be_saved_is_refused_when_it_is_armed(tmp_path: Path):
    with Checkpointer(tmp_path) as ck, pytest.raises(InvalidState, match="'w': is a int"):
        ck.arm(1, {"w": 3})  # type: ignore[dict-item]


def test_an_urgent_save_fails_when_its_time_is_over(tmp_path: Path):
    config = CheckpointConfig(urgent_deadline_s=0.2)
    ck = Checkpointer(tmp_path, config=config, rank=0, world_size=2, run_id="run")
    handle = ck.save(1, {"w": torch.zeros(10)}, urgent=True)  # the other rank never comes
    with pytest.raises(SaveFailed, match=r"step 1: the urgent save was not committed within its 0\.2 s"):
        handle.result(20)
    assert handle.staged()
    ck.close()
    assert ck.latest() is None


def test_an_urgent_save_whose_copies_stand_still_fails_in_time_and_lets_the_fence_through(tmp_path: Path):
    with Checkpointer(tmp_path, config=CheckpointConfig(urgent_deadline_s=0.2), on_error="warn") as ck:
        ck.prepare({"w": torch.zeros(10)})
        with stalled(ck):
            handle = ck.save(1, {"w": torch.zeros(10)}, urgent=True)
            ck.fence()
            assert handle.staged()
            assert isinstance(handle.exception(20), SaveFailed)


def test_what_was_armed_before_an_update_is_not_saved_after_it(tmp_path: Path):
    weights = {"w": torch.full((1000,), 1.0)}
    with Checkpointer(tmp_path) as ck:
        ck.arm(1, weights)
        ck.fence()
        weights["w"].fill_(2.0)
        ck.save(1, weights).result(20)
        assert loaded(ck) == (1, 2.0)


def test_a_wish_leaves_the_error_of_the_loops_save_to_be_told(tmp_path: Path):
    weights = {"w": torch.zeros(1000)}
    config = CheckpointConfig(memory=MemoryConfig(every=1))
    (tmp_path / "memory").write_text("no folder")
    told: list[BaseException] = []
    memory = open_storage(tmp_path / "memory")
    with Checkpointer(tmp_path / "disk", config=config, memory=memory, on_error=told.append) as ck:
        ck.arm(1, weights)
        wait_until(ck.save(1, weights).done)
        ck.preempt()
        wait_until(lambda: ck.preempted is not None)
        ck.poll()
        assert [type(error) for error in told] == [StorageError]


def test_what_rank_0_copies_on_is_copied_by_ranks_that_saved_it_for_a_wish(tmp_path: Path):
    weights = {"w": torch.full((1000,), 1.0)}
    config = CheckpointConfig(commit_timeout_s=20, remote=RemoteConfig(url=str(tmp_path / "remote")))

    def train(rank: int) -> str:
        with Checkpointer(tmp_path / "disk", config=config, rank=rank, world_size=2, run_id="run") as ck:
            if rank == 1:
                ck.arm(1, weights)
                ck.preempt()
                wait_until(lambda: ck.preempted is not None)
            handle = ck.save(1, weights, tiers=("local", "remote"))
            handle.result(20)
            return handle.at("remote").result(20).tier

    assert ranks(2, train) == ["remote", "remote"]
    assert loaded(Checkpointer(tmp_path / "remote")) == (1, 1.0)


def test_an_urgent_save_that_failed_on_one_rank_is_joined_by_all_and_then_tried_again(tmp_path: Path):
    """Attempts are counted alike, though one rank knows of the failure before its loop asks and the other does not."""
    weights = {"w": torch.full((1000,), 1.0)}
    failed, tried = threading.Event(), threading.Barrier(2)

    def train(rank: int) -> tuple[bool, str]:
        config = CheckpointConfig(commit_timeout_s=20, urgent_deadline_s=20)
        with Checkpointer(tmp_path, config=config, rank=rank, world_size=2, run_id="run", on_error="warn") as ck:
            ck.arm(1, weights)
            if rank == 0:
                ck.preempt()  # finds nobody else
                wait_until(lambda: ck.preempted is not None)
                ck.cancel(SaveFailed("injected"))
                wait_until(lambda: ck.preempted.done())
                failed.set()
            assert failed.wait(20)
            is_failed = isinstance(ck.save(1, weights).exception(20), SaveFailed | SaveAborted)
            tried.wait(20)
            return is_failed, ck.save(1, weights).result(20).folder.split(".")[1]

    assert ranks(2, train) == [(True, "a1")] * 2
    assert loaded(Checkpointer(tmp_path)) == (1, 1.0)


def test_an_urgent_save_of_one_rank_extends_the_attempt_that_the_other_has_in_both_tiers(tmp_path: Path):
    """The loop saves in memory; the wish adds the disk: before the loop's call on one rank, after it on the other."""
    weights = {"w": torch.full((1000,), 1.0)}
    asked = threading.Event()

    def train(rank: int) -> str:
        config = CheckpointConfig(commit_timeout_s=20, urgent_deadline_s=20, memory=MemoryConfig(every=1))
        memory, disk = open_storage(tmp_path / "memory"), tmp_path / "disk"
        with Checkpointer(disk, config=config, rank=rank, world_size=2, run_id="run", memory=memory) as ck:
            ck.arm(1, weights)
            if rank == 0:
                ck.save(1, weights)
                asked.set()
            assert asked.wait(20)
            ck.preempt()
            wait_until(lambda: ck.preempted is not None)
            if rank == 1:
                ck.save(1, weights)
            return ck.preempted.at("local").result(20).folder.split(".")[1]

    assert ranks(2, train) == ["a0", "a0"]
    assert loaded(Checkpointer(tmp_path / "disk")) == (1, 1.0)
