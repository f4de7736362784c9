"""Several ranks: one checkpoint or none, whatever the others do, and any world can load it."""

from __future__ import annotations

import os
import re
import threading
import uuid
from pathlib import Path
from typing import Any

import pytest
import torch

import checkpoint
from checkpoint import (
    BoxSlice,
    CheckpointConfig,
    Checkpointer,
    CommitTimeout,
    CoverageError,
    FlatSlice,
    InvalidState,
    RankLocal,
    SaveAborted,
    SaveFailed,
    StorageError,
)
from checkpoint.names import AttemptName
from checkpoint.state import owners, pieces_of
from tests.ranks import run_ranks
from tests.test_checkpoint.worlds import (
    SHAPE,
    blank,
    bounds,
    ranks,
    same,
    saved_by,
    state,
    tensor_of,
    values,
    wait_until,
)


def checkpointer(
    root: Path | str, rank: int, world_size: int, *, timeout_s: float = 20, **options: Any
) -> Checkpointer:
    """One rank of a launch called "run"."""
    config = CheckpointConfig(commit_timeout_s=timeout_s, **options)
    return Checkpointer(root, config=config, rank=rank, world_size=world_size, run_id="run")


# Resharding


@pytest.mark.parametrize("new_size", [1, 2, 3, 4])
@pytest.mark.parametrize("old_size", [1, 2, 3, 4])
def test_any_world_loads_what_any_world_saved(tmp_path: Path, old_size: int, new_size: int):
    saved_by(tmp_path, old_size, seed=5)
    expected = values(5)
    for rank in range(new_size):
        ck = Checkpointer(tmp_path, rank=rank, world_size=new_size, run_id="new")
        info = ck.latest("deep")
        assert info is not None
        found = blank(rank, new_size)
        loaded = ck.load(info, found)
        wanted = state(expected, rank, new_size)
        if rank < old_size:
            assert same(found, wanted)
            assert loaded.objects == {"rank": rank}
        else:
            assert loaded.missing_local == ("rng",)
            assert (found.pop("rng").tensor == rank).all()  # its fresh value
            del wanted["rng"]
            assert same(found, wanted)
            assert loaded.objects == {}


def test_flat_slices_load_as_boxes_and_whole_and_back(tmp_path: Path):
    whole = values(1)["flat"]
    saved_by(tmp_path / "flat", 3, seed=1)
    ck = Checkpointer(tmp_path / "flat")
    box, entire = torch.zeros(10, 3), torch.zeros(SHAPE)
    ck.load(ck.list()[0], {"flat": BoxSlice(box, SHAPE, (20, 2))}, strict=False)
    ck.load(ck.list()[0], {"flat": entire}, strict=False)
    assert torch.equal(box, whole[20:30, 2:5])
    assert torch.equal(entire, whole)

    def save_boxes(rank: int) -> None:
        first, last = bounds(SHAPE[0], rank, 2)
        with checkpointer(tmp_path / "box", rank, 2) as ck:
            ck.save(1, {"flat": BoxSlice(whole[first:last], SHAPE, (first, 0))})

    ranks(2, save_boxes)
    flat = torch.zeros(100)
    ck = Checkpointer(tmp_path / "box")
    ck.load(ck.list()[0], {"flat": FlatSlice(flat, SHAPE, 150)})
    assert torch.equal(flat, whole.flatten()[150:250])


def test_slices_of_one_tensor_may_differ_in_kind(tmp_path: Path):
    whole = values(2)["flat"]
    parts: list[Any] = [
        BoxSlice(whole[:20, :3], SHAPE, (0, 0)),
        BoxSlice(whole[:20, 3:], SHAPE, (0, 3)),
        FlatSlice(whole.flatten()[140:300], SHAPE, 140),
        FlatSlice(whole.flatten()[300:], SHAPE, 300),
    ]

    def save(rank: int) -> None:
        with checkpointer(tmp_path, rank, 4) as ck:
            ck.save(1, {"w": parts[rank]})

    ranks(4, save)
    assert torch.equal(checkpoint.read(tmp_path)["w"], whole)


def test_real_processes_meet_in_the_storage_alone(tmp_path: Path):
    run_ranks(_save_twice, 3, str(tmp_path))
    assert [info.step for info in Checkpointer(tmp_path).list()] == [1, 2]
    assert same(checkpoint.read(tmp_path, ["flat", "box"]), {n: values(2)[n] for n in ("flat", "box")})
    assert checkpoint.verify(tmp_path).ok


def _save_twice(rank: int, world_size: int, root: str) -> None:
    with checkpointer(root, rank, world_size) as ck:
        for step in (1, 2):
            ck.save(step, state(values(step), rank, world_size))


def test_ranks_meet_in_an_object_store(tmp_path: Path):
    root = f"memory://{uuid.uuid4()}"
    saved_by(root, 3, seed=4)
    assert torch.equal(checkpoint.read(root, "flat")["flat"], values(4)["flat"])


# Who writes what


def test_a_replicated_tensor_is_written_once(tmp_path: Path):
    saved_by(tmp_path, 4)
    (folder,) = tmp_path.iterdir()
    data = sum(path.stat().st_size - 4096 for path in folder.glob("*.safetensors"))
    assert data == sum(t.nbytes for t in values().values()) + 4 * 4


def test_replicated_tensors_are_spread_evenly_by_size():
    sizes = [1000, 900, 800, 300, 200, 100, 50, 50] * 4
    pieces = pieces_of({f"t{i}": torch.zeros(n) for i, n in enumerate(sizes)})
    owner = owners(pieces, 3)
    loads = [sum(p.nbytes for p in pieces if owner[p.name] == rank) for rank in range(3)]
    assert max(loads) - min(loads) <= 4 * 50
    assert owner == owners(reversed(pieces), 3)


# One rank fails


def test_a_rank_that_cannot_write_fails_every_rank_and_is_named(tmp_path: Path):
    saved_by(tmp_path, 3, step=1)

    def save(rank: int) -> BaseException | None:
        with checkpointer(tmp_path, rank, 3) as ck:
            handle = ck.save(2, {"w": RankLocal(torch.ones(3)), **({"bad": 1} if rank == 1 else {})})  # type: ignore[dict-item]
            return handle.exception(20)

    def save_and_catch(rank: int) -> BaseException | None:
        try:
            return save(rank)
        except InvalidState as error:
            return error

    errors = ranks(3, save_and_catch)
    assert isinstance(errors[1], InvalidState)
    for rank in (0, 2):
        assert isinstance(errors[rank], SaveAborted)
        assert errors[rank].rank == 1
        assert "rank 1 failed: InvalidState: tensors: 'bad': is a int" in str(errors[rank])
    latest = Checkpointer(tmp_path).latest("deep")
    assert latest is not None
    assert latest.step == 1


def test_the_others_are_told_whatever_the_error_says(tmp_path: Path):
    def save(rank: int) -> BaseException | None:
        with checkpointer(tmp_path, rank, 2) as ck:
            try:
                return ck.save(1, {}, {"\ud800": 1} if rank else {}).exception(20)
            except InvalidState as error:
                return error

    first, second = ranks(2, save)
    assert isinstance(second, InvalidState)
    assert isinstance(first, SaveAborted)
    assert "rank 1 failed: InvalidState: objects: cannot be kept as JSON" in str(first)


def test_the_rank_that_fails_frees_its_space_and_so_do_the_others(tmp_path: Path):
    def save(rank: int) -> None:
        with checkpointer(tmp_path, rank, 2) as ck:
            handle = ck.save(1, {"w": FlatSlice(torch.ones(100_000), (300_000,), rank * 100_000)})
            assert isinstance(handle.exception(20), SaveFailed)

    ranks(2, save)
    (folder,) = tmp_path.iterdir()
    wait_until(lambda: not list(folder.rglob("*.safetensors")))
    assert (folder / "ABORT.json").exists()


def test_the_next_save_after_a_failed_one_is_committed_and_collects_it(tmp_path: Path):
    def save(rank: int) -> str:
        with checkpointer(tmp_path, rank, 2) as ck:
            lacking = FlatSlice(torch.ones(1), (3,), rank)
            assert isinstance(ck.save(1, {"w": lacking}).exception(20), SaveFailed)
            return ck.save(1, {"w": RankLocal(torch.ones(1))}).result(20).folder

    folder, other = ranks(2, save)
    assert folder == other
    assert folder.startswith("step-00000001.a1.")
    assert [path.name for path in tmp_path.iterdir()] == [folder]


def test_a_rank_that_never_votes_is_named(tmp_path: Path):
    def save(rank: int) -> BaseException | None:
        with checkpointer(tmp_path, rank, 4, timeout_s=0.2) as ck:
            return ck.save(1, {"w": torch.ones(3)}).exception(20)

    first, second = ranks(2, save)
    assert isinstance(first, CommitTimeout)
    assert first.missing_ranks == (2, 3)
    assert "no vote from ranks 2, 3 within 0.2 s" in str(first)
    assert isinstance(second, SaveAborted)
    assert "rank 0 failed: CommitTimeout" in str(second)


def test_a_rank_0_that_never_commits_is_named(tmp_path: Path):
    with checkpointer(tmp_path, 1, 2, timeout_s=0.1) as ck:
        error = ck.save(1, {"w": torch.ones(3)}).exception(20)
    assert isinstance(error, CommitTimeout)
    assert error.missing_ranks == (0,)
    assert "rank 0 did not commit within 0.2 s; no vote from rank 0" in str(error)


def test_a_vote_is_never_taken_back(tmp_path: Path):
    with checkpointer(tmp_path, 1, 2, timeout_s=0.05) as late:
        assert isinstance(late.save(1, {"w": RankLocal(torch.ones(3))}).exception(20), CommitTimeout)
    with checkpointer(tmp_path, 0, 2) as ck:
        ck.save(1, {"w": RankLocal(torch.ones(3))}).result(20)
    assert checkpoint.verify(tmp_path).ok


# Ranks that do not fit together


def failures(tmp_path: Path, parts: list[dict[str, Any]]) -> str:
    """Save a part on each rank; return rank 0's error, having seen that all ranks fail."""

    def save(rank: int) -> BaseException | None:
        with checkpointer(tmp_path, rank, len(parts)) as ck:
            return ck.save(1, parts[rank]).exception(20)

    first, *others = ranks(len(parts), save)
    assert isinstance(first, CoverageError)
    assert all(isinstance(e, SaveAborted) and e.rank == 0 and str(first) in str(e) for e in others)
    assert Checkpointer(tmp_path).latest() is None
    return str(first)


def flat(start: int, stop: int) -> FlatSlice:
    """Elements of a tensor of ten."""
    return FlatSlice(torch.zeros(stop - start), (10,), start)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([{"w": flat(0, 4)}, {"w": flat(5, 10)}], r"'w' has elements \[4, 5\) of 10 held by no rank"),
        ([{"w": flat(0, 6)}, {"w": flat(5, 10)}], r"'w' has elements \[5, 6\) of 10 held twice"),
        (
            [
                {"w": BoxSlice(torch.zeros(2, 3), (4, 4), (0, 0))},
                {"w": BoxSlice(torch.zeros(2, 4), (4, 4), (2, 0))},
            ],
            "'w' has 2 of its 16 elements held by no rank",
        ),
        (
            [
                {"w": BoxSlice(torch.zeros(3, 4), (4, 4), (0, 0))},
                {"w": BoxSlice(torch.zeros(2, 4), (4, 4), (2, 0))},
            ],
            r"'w' is held twice where the box at \[2, 0\]",
        ),
        (
            [{"w": flat(0, 5)}, {"w": FlatSlice(torch.zeros(5, dtype=torch.float64), (10,), 5)}],
            r"'w' is F32 \[10\] in r00000.safetensors but F64 \[10\] in r00001",
        ),
        (
            [{"w": flat(0, 5)}, {"w": FlatSlice(torch.zeros(5), (2, 5), 5)}],
            r"'w' is F32 \[10\] in r00000.safetensors but F32 \[2, 5\] in r00001",
        ),
        (
            [{"w": torch.zeros(2)}, {"v": torch.zeros(2)}],
            "rank 1 has other replicated tensors",
        ),
        (
            [{"w": RankLocal(torch.zeros(2))}, {"w": flat(0, 10)}],
            "'w' is rank-local on some ranks and not on others",
        ),
    ],
    ids=["hole", "overlap", "hole-box", "overlap-box", "dtype", "shape", "replicated", "local"],
)
def test_slices_that_do_not_make_one_state_fail_by_name(tmp_path: Path, parts: list[dict[str, Any]], message: str):
    assert re.search(message, failures(tmp_path, parts))


def test_ranks_of_different_worlds_fail(tmp_path: Path):
    def save(rank: int) -> BaseException | None:
        with checkpointer(tmp_path, rank, 2 + rank) as ck:
            return ck.save(1, {}).exception(20)

    first, _ = ranks(2, save)
    assert "rank 1 takes the world for 3 ranks, rank 0 for 2" in str(first)


# Launches before this one


def test_a_killed_launch_leaves_nothing_that_is_waited_for_or_counted(tmp_path: Path):
    with checkpointer(tmp_path, 1, 2, timeout_s=0.05) as killed:  # voted; its rank 0 never came
        killed.save(7, {"w": RankLocal(torch.zeros(3))}).exception(20)
    (left_over,) = tmp_path.iterdir()
    assert (left_over / "parts" / "r00001.arrow").exists()

    def save(rank: int) -> None:
        config = CheckpointConfig(commit_timeout_s=20)
        with Checkpointer(tmp_path, config=config, rank=rank, world_size=2, run_id="next") as ck:
            ck.save(7, {"w": RankLocal(torch.ones(3))}).result(20)

    ranks(2, save)
    assert not left_over.exists()
    assert checkpoint.read(tmp_path, "w", rank=1)["w"].sum() == 3


def test_what_another_launch_still_writes_is_not_collected(tmp_path: Path):
    with Checkpointer(tmp_path) as ck:
        ck.save(1, {"w": torch.ones(1)}).result(20)
        with checkpointer(tmp_path, 1, 2, timeout_s=0.05) as alive:
            alive.save(7, {"w": RankLocal(torch.zeros(3))}).exception(20)
        ck.save(2, {"w": torch.ones(1)}).result(20)
    assert len(list(tmp_path.glob("step-00000007.*/parts/*"))) == 1


def test_a_run_id_used_twice_is_refused_and_harms_nothing(tmp_path: Path):
    saved_by(tmp_path, 2, seed=1)

    def save(rank: int) -> BaseException | None:
        with checkpointer(tmp_path, rank, 3) as ck:
            return ck.save(1, state(values(2), rank, 3)).exception(20)

    for error in ranks(3, save):
        assert isinstance(error, StorageError)
        assert "run_id must be new for every launch" in str(error)
    assert checkpoint.verify(tmp_path).ok
    assert torch.equal(checkpoint.read(tmp_path, "flat")["flat"], values(1)["flat"])


def test_of_two_processes_that_take_themselves_for_one_rank_the_second_ends(tmp_path: Path):
    with Checkpointer(tmp_path, run_id="run") as first, Checkpointer(tmp_path, run_id="run") as second:
        begun = tmp_path / AttemptName.of(1, 0, "run").folder / "r00000.objects.json"
        begun.parent.mkdir()
        begun.write_text("{}")  # the first has begun, and writes its shard
        error = second.save(1, {"w": torch.ones(3)}).exception(20)
        assert isinstance(error, StorageError)
        assert "r00000.objects.json: cannot write: File exists; another process wrote it" in str(error)
        assert isinstance(first.save(1, {"w": torch.ones(3)}).exception(20), SaveAborted)  # and is told


def test_run_ids_may_hold_anything(tmp_path: Path):
    run_id = "../a b/ü\n:*" + os.sep
    with Checkpointer(tmp_path, run_id=run_id) as ck:
        assert ck.save(1, {"w": torch.ones(1)}).result(20).run_id == run_id
    assert len(list(tmp_path.iterdir())) == 1


def test_the_tensors_of_a_rank_are_read_by_its_number(tmp_path: Path):
    saved_by(tmp_path, 3)
    assert "rng" not in checkpoint.read(tmp_path)
    for rank in range(3):
        assert (checkpoint.read(tmp_path, rank=rank)["rng"] == rank).all()
    assert tensor_of(state(values(), 1, 3)["rng"]).tolist() == [1, 1, 1, 1]


def test_a_dtensor_is_saved_as_it_is_and_its_local_part_is_a_box(tmp_path: Path):
    run_ranks(_save_dtensor, 2, str(tmp_path))
    assert torch.equal(checkpoint.read(tmp_path)["w"], torch.arange(12.0).reshape(4, 3))


def _save_dtensor(rank: int, world_size: int, root: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    whole = torch.arange(12.0).reshape(4, 3)
    sharded = distribute_tensor(whole, init_device_mesh("cpu", (world_size,)), [Shard(0)])
    with checkpointer(root, rank, world_size) as ck:
        ck.save(1, {"w": sharded})
        box = torch.zeros(2, 3)
        ck.load(ck.save(2, {"w": sharded}).result(20), {"w": BoxSlice(box, (4, 3), (2 * rank, 0))})
        assert torch.equal(box, whole[2 * rank : 2 * rank + 2])
        with pytest.raises(InvalidState, match="'w': is a DTensor inside of another slice; pass it as it is"):
            ck.save(3, {"w": RankLocal(sharded)})


def test_a_rank_0_whose_job_goes_on_without_it_neither_commits_nor_removes(tmp_path: Path):
    """It is asked last, when all have voted and only the record is missing; every rank gets one clear error."""
    config = CheckpointConfig(commit_timeout_s=20, keep_last=1)
    generation, told = {"now": 1}, threading.Barrier(2)

    def train(rank: int) -> str:
        def admit() -> None:
            if generation["now"] != 1:
                raise SaveFailed(f"generation 1 of this job is over; generation {generation['now']} commits")

        with Checkpointer(tmp_path, config=config, rank=rank, world_size=2, run_id="run", on_error="warn") as ck:
            ck.admit_with(admit)
            ck.save(1, state(values(1), rank, 2)).result(20)
            told.wait(20)
            generation["now"] = 2
            told.wait(20)
            return str(ck.save(2, state(values(2), rank, 2)).exception(20))

    errors = ranks(2, train)
    assert errors[0] == "generation 1 of this job is over; generation 2 commits"
    assert "rank 0 failed: SaveFailed: generation 1 of this job is over" in errors[1]
    with Checkpointer(tmp_path) as ck:
        assert [info.step for info in ck.list()] == [1]
