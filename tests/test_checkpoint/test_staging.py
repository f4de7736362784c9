"""Lazy copies: nothing on the caller, everything before the fence returns, in as little memory as one likes."""

from __future__ import annotations

import logging
import threading
import uuid
from pathlib import Path

import pytest
import torch

from checkpoint import CheckpointConfig, Checkpointer, InvalidState, StorageError
from checkpoint.arena import SLOT_BYTES, Arena
from checkpoint.copies import Streams
from checkpoint.errors import SaveFailed, SaveSkipped
from checkpoint.format import CHUNK_BYTES
from checkpoint.planning import Planner
from checkpoint.spans import Trace
from checkpoint.staging import Snapshot
from tests.test_checkpoint.stalls import stalled
from tests.test_checkpoint.test_checkpointer import broken_root
from tests.test_checkpoint.worlds import ranks, same, wait_until


def state_of(value: float = 1.0) -> dict[str, torch.Tensor]:
    """Return tensors of all kinds of layouts, of several slots together."""
    big = torch.arange(CHUNK_BYTES // 4 * 5 // 2, dtype=torch.float32) * value
    return {
        "big": big,
        "half": torch.full((700, 3001), value, dtype=torch.bfloat16),
        "transposed": torch.arange(2_000_000.0).reshape(1000, 2000).T * value,
        "strided": (torch.arange(3_000_000, dtype=torch.int64) * int(value)).reshape(3000, 1000)[::2, 3:900:3],
        "expanded": torch.arange(1000.0).expand(2000, 1000),
        "scalar": torch.tensor(value, dtype=torch.float64),
        "empty": torch.empty(3, 0),
        "flags": torch.arange(1001) % 3 == 0,
        "complex": torch.full((7,), 1 + 2j, dtype=torch.complex64),
    }


def blank(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return destinations that hold something else."""
    return {name: torch.zeros(t.shape, dtype=t.dtype) for name, t in state.items()}


def overwrite(state: dict[str, torch.Tensor]) -> None:
    """Change everything in place."""
    for name, tensor in state.items():
        if name != "expanded":
            tensor.fill_(0 if tensor.dtype is torch.bool else -7)


@pytest.mark.parametrize("num_slots", [1, 2, 50])
@pytest.mark.parametrize("writer", ["thread", "process"])
def test_the_load_gives_the_values_at_the_call_however_small_the_arena(tmp_path: Path, num_slots: int, writer: str):
    state = state_of()
    expected = {name: t.clone() for name, t in state.items()}
    found = blank(state)
    config = CheckpointConfig(staging_bytes=num_slots * SLOT_BYTES, writer=writer)  # type: ignore[arg-type]
    with Checkpointer(tmp_path, config=config) as ck:
        handle = ck.save(1, state)
        ck.fence()
        overwrite(state)
        ck.load(handle.result(60), found)
        assert ck._saver._arena.touched_bytes <= num_slots * SLOT_BYTES
    assert same(found, expected)


def test_an_ordered_store_takes_what_an_arena_of_one_slot_gives():
    state = state_of()
    expected = {name: t.clone() for name, t in state.items()}
    found = blank(state)
    config = CheckpointConfig(staging_bytes=SLOT_BYTES, writer_threads=4)
    with Checkpointer(f"memory://{uuid.uuid4().hex}/run", config=config) as ck:
        handle = ck.save(1, state, update_order=[["scalar"], ["flags", "big"], ["half"]])
        ck.fence()
        overwrite(state)
        ck.load(handle.result(60), found)
    assert same(found, expected)


def test_save_copies_nothing_itself_and_the_fence_waits_for_the_copies(tmp_path: Path):
    state = {"w": torch.zeros(1000)}
    with Checkpointer(tmp_path) as ck:
        ck.prepare(state)
        with stalled(ck) as release:
            handle = ck.save(1, state)
            assert not handle.staged()
            with pytest.raises(TimeoutError, match=r"the state of step 1 is not copied after 0\.01 s; it goes on"):
                handle.wait_staged(0.01)
            assert handle.progress().staged_bytes == 0
            thread = threading.Thread(target=ck.fence)
            thread.start()
            assert thread.is_alive()
            release()
            thread.join(20)
            handle.wait_staged(20)
        assert handle.staged()
        handle.result(20)
        progress = handle.progress()
        assert progress.total_bytes == progress.staged_bytes == progress.written_bytes == 4000
        stats = handle.stats()
        assert stats.fence_s > 0
        assert stats.pressure_s > 0


def test_back_pressure_is_measured_and_none_is_told_where_there_is_room(tmp_path: Path):
    state = {"w": torch.zeros(CHUNK_BYTES)}
    for num_slots, pressed in ((1, True), (4, False)):
        config = CheckpointConfig(staging_bytes=num_slots * SLOT_BYTES)
        with Checkpointer(tmp_path / str(num_slots), config=config) as ck:
            assert (ck.save(1, state).stats(60).pressure_s > 0) == pressed


def test_a_fence_without_a_save_returns(tmp_path: Path):
    with Checkpointer(tmp_path) as ck:
        ck.fence()
        ck.fence(3)
        ck.save(1, {}).result(20)
        ck.fence()


def test_the_same_structure_is_planned_once_and_another_one_anew(tmp_path: Path):
    with Checkpointer(tmp_path, config=CheckpointConfig(keep_last=9)) as ck:
        plans = []
        for shape in ((3,), (3,), (4,)):
            ck.save(len(plans), {"w": torch.zeros(shape)}).result(20)
            plans.append(ck._planner._blueprint)
        assert plans[0] is plans[1]
        assert plans[1] is not plans[2]


def test_ties_that_come_and_go_are_followed(tmp_path: Path):
    left, right = torch.ones(1000), torch.full((1000,), 2.0)
    with Checkpointer(tmp_path) as ck:
        for tied in (False, True, False):
            state = {"left": left, "right": left if tied else right}
            handle = ck.save(1, state)
            found = blank(state)
            ck.load(handle.result(20), found)
            assert same(found, state)
            assert handle.stats().written_bytes == (4000 if tied else 8000)


def test_an_update_order_names_tensors_once_and_only_those_there_are(tmp_path: Path):
    state = {"a": torch.zeros(1), "b": torch.zeros(1)}
    with Checkpointer(tmp_path) as ck, pytest.raises(InvalidState) as caught:
        ck.save(1, state, update_order=[["a", "c"], ["a"]])
    assert str(caught.value) == "update_order: 'a' is listed twice; 'c' is not one of the tensors"


# More saves than the disk bears


def test_saves_commit_in_order_while_the_next_one_is_copied(tmp_path: Path):
    weight = torch.zeros(CHUNK_BYTES)
    with Checkpointer(tmp_path, config=CheckpointConfig(keep_last=20)) as ck:
        for step in range(6):
            ck.fence()
            weight.fill_(step)
            ck.save(step, {"w": weight})
        ck.close()
        infos = ck.list()
        assert [info.step for info in infos] == list(range(6))
        for info in infos:
            found = torch.zeros_like(weight)
            ck.load(info, {"w": found})
            assert (found == info.step).all()


def test_under_pressure_a_save_is_skipped_where_that_is_wished_and_counted(tmp_path: Path):
    state = {"w": torch.zeros(1000)}
    with Checkpointer(tmp_path, config=CheckpointConfig(on_pressure="skip", keep_last=9)) as ck:
        ck.prepare(state)
        with stalled(ck):
            handles = [ck.save(step, state) for step in range(3)]
            assert handles[2].done()
        assert [handle.skipped for handle in handles] == [False, False, True]
        assert handles[2].staged()
        with pytest.raises(SaveSkipped, match="step 2 is not saved: rank 0 still writes 2 saves before it"):
            handles[2].result()
        wait_until(handles[1].done)
        ck.poll()
        ck.save(3, state)
        ck.close()
        assert [info.step for info in ck.list()] == [0, 1, 3]


def test_a_save_that_names_its_tiers_waits_where_others_are_skipped(tmp_path: Path):
    state = state_of()
    with Checkpointer(tmp_path, config=CheckpointConfig(on_pressure="skip", keep_last=9)) as ck:
        ck.prepare(state)
        with stalled(ck) as release:
            for step in range(2):
                ck.save(step, state)
            threading.Thread(target=release).start()
            assert ck.save(2, state, tiers=("local",)).result(20).step == 2
        ck.close()
        assert [info.step for info in ck.list()] == [0, 1, 2]


def test_a_save_that_one_rank_skips_is_skipped_by_all(tmp_path: Path):
    def save(rank: int) -> list[bool]:
        config = CheckpointConfig(on_pressure="skip", commit_timeout_s=20, keep_last=9)
        state = {"w": torch.zeros(1000)}
        with Checkpointer(tmp_path, config=config, rank=rank, world_size=2, run_id="run") as ck:
            ck.prepare(state)
            if rank == 0:
                with stalled(ck):
                    handles = [ck.save(step, state) for step in range(3)]
            else:
                handles = []
                for step in range(3):
                    wait_until(lambda: sum(not h.done() for h in handles) < 2 or bool(list(tmp_path.glob("*2.a0*"))))
                    handles.append(ck.save(step, state))
            ck.close()
            assert ck.num_skipped == 1
            return [handle.skipped for handle in handles]

    assert ranks(2, save) == [[False, False, True]] * 2
    assert [info.step for info in Checkpointer(tmp_path).list()] == [0, 1]


# Errors


def test_errors_go_to_a_function_of_the_users(tmp_path: Path):
    told: list[BaseException] = []
    with Checkpointer(broken_root(tmp_path), on_error=told.append) as ck:
        wait_until(ck.save(1, {"w": torch.zeros(1)}).done)
        ck.poll()
        assert [type(error) for error in told] == [StorageError]
        wait_until(ck.save(2, {"w": torch.zeros(1)}).done)
    assert len(told) == 2


def test_a_failed_save_lets_the_fence_through(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    state = {"w": torch.zeros(4 * CHUNK_BYTES, dtype=torch.uint8)}
    config = CheckpointConfig(staging_bytes=SLOT_BYTES, on_error="warn")
    with caplog.at_level(logging.WARNING), Checkpointer(broken_root(tmp_path), config=config) as ck:
        for step in range(3):
            handle = ck.save(step, state)
            ck.fence()
            assert handle.staged()
            wait_until(handle.done)
        wait_until(lambda: ck._saver._arena.num_free == 1)
    assert "the save of step 2 failed" in caplog.text


def test_an_urgent_save_whose_time_is_over_before_its_copies_begin_ends(tmp_path: Path):
    config = CheckpointConfig(staging_bytes=SLOT_BYTES, urgent_deadline_s=0.2, on_error="warn")
    state = {"w": torch.zeros(1000)}
    with Checkpointer(tmp_path, config=config) as ck:
        ck.prepare(state)
        with stalled(ck):
            ck.save(1, state)
            late = ck.save(2, state, urgent=True)
            assert isinstance(late.exception(20), SaveFailed)
        ck.close(timeout_s=20)
        assert [info.step for info in ck.list()] == [1]


def test_a_copy_whose_save_fails_before_it_begins_keeps_no_fence_waiting():
    draft = Planner(0, 1).draft({"w": torch.zeros(10)}, ())
    with Arena(1) as arena:
        snapshot = Snapshot(draft, (), arena, Trace())
        snapshot.begin(draft, lambda: draft.blueprint.shard, Streams())
        parcel, slot = snapshot.claim(), arena.try_take()
        assert parcel is not None
        assert slot is not None
        snapshot.fail(SaveFailed("the disk is full"))
        with pytest.raises(SaveFailed, match="the disk is full"):
            snapshot.fill([(parcel, slot)])
        fence = threading.Thread(target=snapshot.await_group, args=(0, 600, lambda: False), daemon=True)
        fence.start()
        fence.join(20)
        assert not fence.is_alive()
