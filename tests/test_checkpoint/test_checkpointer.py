"""One rank: what is saved comes back, and what cannot be is refused in words."""

from __future__ import annotations

import logging
import uuid
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed._functional_collectives import AsyncCollectiveTensor

from checkpoint import (
    BoxSlice,
    CheckpointConfig,
    Checkpointer,
    CheckpointNotFound,
    CoverageError,
    FlatSlice,
    InvalidState,
    RankLocal,
    StateMismatch,
    StorageError,
)
from checkpoint.format import CHUNK_BYTES, DTYPES
from tests.test_checkpoint.test_format import random_bytes
from tests.test_checkpoint.worlds import blank, same, saved_by, state, values, wait_until


@pytest.fixture(params=["path", "file", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A root of each kind."""
    urls = {
        "path": str(tmp_path / "ck"),
        "file": f"file://{tmp_path}/ck",
        "memory": f"memory://{uuid.uuid4()}",
    }
    return urls[request.param]


def test_a_state_comes_back_bit_for_bit(root: str):
    saved = state(values(3), 0, 1)
    with Checkpointer(root) as ck:
        handle = ck.save(7, saved, {"lr": 0.1, "betas": (0.9, 0.95)}, shared={"tokens": 5})
        info = handle.result(20)
        found = blank(0, 1)
        loaded = ck.load(info, found)
    assert same(found, saved)
    assert (loaded.step, loaded.objects, loaded.shared) == (
        7,
        {"lr": 0.1, "betas": (0.9, 0.95)},
        {"tokens": 5},
    )
    assert (loaded.missing, loaded.unexpected, loaded.missing_local) == ((), (), ())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_comes_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype):
    saved = {
        "matrix": random_bytes(dtype, 3, 5),
        "scalar": random_bytes(dtype),
        "empty": random_bytes(dtype, 2, 0),
    }
    found = {name: torch.zeros(t.shape, dtype=torch.uint8).to(dtype) for name, t in saved.items()}
    with Checkpointer(tmp_path) as ck:
        ck.load(ck.save(0, saved).result(20), found)
    for name, tensor in saved.items():
        assert found[name].dtype == dtype
        bits = [t.reshape(-1).view(torch.uint8) for t in (found[name], tensor)]
        assert torch.equal(*bits)


def test_names_are_opaque(tmp_path: Path):
    names = ["a/b", "a.b", "a|b", "../x", "a@r00000", "a", "__metadata__", "ü", " ", "*", "a\nb", "a@r00000'"]
    saved = {name: torch.full((i + 1,), float(i)) for i, name in enumerate(names)}
    saved_and_own = {**saved, "own": RankLocal(torch.ones(2)), "own@r00000": torch.zeros(1)}
    with Checkpointer(tmp_path) as ck:
        info = ck.save(0, saved_and_own).result(20)
        found = {name: torch.zeros_like(t) for name, t in saved.items()}
        ck.load(info, {**found, "own": RankLocal(torch.zeros(2)), "own@r00000": torch.ones(1)})
    assert same(found, saved)


def test_a_shard_is_a_plain_safetensors_file(tmp_path: Path):
    saved = {"w": torch.randn(3, 4), "half": torch.ones(5, dtype=torch.bfloat16), "n": torch.tensor(3)}
    with Checkpointer(tmp_path) as ck:
        info = ck.save(0, saved).result(20)
    assert same(load_file(Path(info.path, "r00000.safetensors")), saved)


def test_tensors_may_be_mutated_as_soon_as_the_fence_returns(tmp_path: Path):
    tensor = torch.arange(CHUNK_BYTES // 8 + 5)
    expected = tensor.clone()
    found = torch.zeros_like(tensor)
    with Checkpointer(tmp_path) as ck:
        handle = ck.save(1, {"t": tensor})
        ck.fence()
        assert handle.staged()
        tensor.fill_(-1)
        ck.load(handle.result(20), {"t": found})
    assert torch.equal(found, expected)


def test_staging_memory_is_reused_without_mixing_saves(tmp_path: Path):
    found = torch.zeros(1000)
    with Checkpointer(tmp_path, config=CheckpointConfig(keep_last=5)) as ck:
        for step in range(4):
            ck.save(step, {"t": torch.full((1000,), float(step))})
    for step, info in enumerate(ck.list()):
        ck.load(info, {"t": found})
        assert (found == step).all()


@pytest.mark.parametrize("numel", [CHUNK_BYTES // 4 - 1, CHUNK_BYTES // 4, CHUNK_BYTES // 2 + 3])
@pytest.mark.parametrize("buffer_bytes", [0, CHUNK_BYTES + 1000, 1 << 30])
def test_tensors_of_several_chunks_load_whatever_memory_a_load_may_use(root: str, numel: int, buffer_bytes: int):
    saved = {"big": torch.arange(numel, dtype=torch.float32), "small": torch.arange(1000)}
    found = {"big": torch.zeros(numel), "small": torch.zeros(1000, dtype=torch.int64)}
    with Checkpointer(root, config=CheckpointConfig(load_buffer_bytes=buffer_bytes)) as ck:
        ck.load(ck.save(0, saved).result(20), found)
    assert same(found, saved)


def test_strided_sources_and_destinations_keep_their_strides(tmp_path: Path):
    source = torch.arange(12.0).reshape(3, 4).T
    holder = torch.zeros(3, 8)
    with Checkpointer(tmp_path) as ck:
        ck.load(ck.save(0, {"t": source}).result(20), {"t": holder[:, ::2].T})
    assert torch.equal(holder[:, ::2].T, source)
    assert not holder[:, 1::2].any()


def test_parameters_are_loaded_in_place(tmp_path: Path):
    saved, model = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    weight = model.weight
    with Checkpointer(tmp_path) as ck:
        ck.load(ck.save(0, dict(saved.named_parameters())).result(20), dict(model.named_parameters()))
    assert model.weight is weight
    assert torch.equal(weight, saved.weight)
    assert weight.requires_grad


def test_latest_is_the_newest_commit_not_the_largest_step(tmp_path: Path):
    with Checkpointer(tmp_path, config=CheckpointConfig(keep_last=5)) as ck:
        for step in (10, 20, 15):
            ck.save(step, {"t": torch.tensor(step)})
        ck.close()
        assert [info.step for info in ck.list()] == [10, 20, 15]
        latest = ck.latest()
    assert latest is not None
    assert latest.step == 15


def test_there_is_no_latest_before_the_first_commit(root: str):
    with Checkpointer(root) as ck:
        assert ck.latest() is None
        assert ck.list() == []


def test_the_same_step_can_be_saved_again(tmp_path: Path):
    with Checkpointer(tmp_path) as ck:
        first = ck.save(5, {"t": torch.tensor(1)}).result(20)
        second = ck.save(5, {"t": torch.tensor(2)}).result(20)
        assert first.path != second.path
        found = torch.tensor(0)
        latest = ck.latest()
        assert latest == second
        ck.load(second, {"t": found})
    assert found == 2


def test_a_checkpoint_of_another_root_loads(tmp_path: Path):
    found = torch.zeros(3)
    with Checkpointer(tmp_path / "a") as a, Checkpointer(tmp_path / "b") as b:
        b.load(a.save(1, {"t": torch.ones(3)}).result(20), {"t": found})
    assert found.sum() == 3


def test_the_info_says_what_was_saved(tmp_path: Path):
    with Checkpointer(tmp_path, run_id="run-1") as ck:
        info = ck.save(42, {"t": torch.ones(1000)}, shared=("plain", {1: 2})).result(20)
    assert (info.step, info.sequence, info.run_id, info.world_size) == (42, 1, "run-1", 1)
    assert info.shared == ("plain", {1: 2})
    assert info.nbytes > 4000
    assert info.path == str(tmp_path / info.folder)
    assert info.versions["torch"] == torch.__version__


def test_stats_add_up(tmp_path: Path):
    with Checkpointer(tmp_path) as ck:
        handle = ck.save(1, {"t": torch.ones(1000)})
        stats = handle.stats(20)
    assert stats.nbytes == stats.written_bytes == 4000
    assert stats.blocked_s == handle.blocked_s == stats.call_s
    assert 0 < stats.staged_s <= stats.written_s <= stats.durable_s
    assert stats.call_s <= stats.durable_s
    assert stats.written_gib_per_s > 0


# What cannot be saved or loaded


def test_everything_wrong_with_a_state_is_said_at_once(tmp_path: Path):
    freed = torch.ones(100)[50:]
    freed.untyped_storage().resize_(0)
    wrong = {
        "number": 3,
        "sparse": torch.ones(2, 2).to_sparse(),
        "meta": torch.ones(2, device="meta"),
        "quad": torch.zeros(2, dtype=torch.float8_e8m0fnu),
        "flat": FlatSlice(torch.ones(2, 2), (4,), 0),
        "late": FlatSlice(torch.ones(3), (4,), 2),
        "box": BoxSlice(torch.ones(2, 2), (3, 3), (2, 0)),
        "": torch.ones(1),
        "half \ud800": torch.ones(1),
        "freed": freed,
        "wrapper": AsyncCollectiveTensor(torch.ones(2)),
        "nested": torch.nested.nested_tensor([torch.ones(1)], layout=torch.jagged),
        "lazy": torch.nn.LazyLinear(1).weight,
    }
    with Checkpointer(tmp_path) as ck, pytest.raises(InvalidState) as caught:
        ck.save(1, wrong)  # type: ignore[arg-type]
    message = str(caught.value)
    for part in (
        "'number': is a int; allowed are torch.Tensor, DTensor, FlatSlice, BoxSlice, LayoutSlice, Replica and",
        "'sparse': has layout torch.sparse_coo; only dense tensors are saved",
        "'meta': is on the meta device and holds no values",
        "'quad': has dtype torch.float8_e8m0fnu; allowed are bfloat16, bool,",
        "'flat': a FlatSlice holds one dimension, this one 2",
        "'late': range [2, 5) leaves its 4 elements",
        "'box': box at [2, 0] of shape [2, 2] leaves shape [3, 3]",
        "'': is not a name; names are non-empty strings",
        "is not a name; it has half of a surrogate pair",
        "'freed': is a Tensor without memory of its own (a wrapper, a fake, or its storage was freed); pass",
        "'wrapper': is a AsyncCollectiveTensor without memory of its own",
        "'nested': is a nested tensor; only dense tensors are saved",
        "'lazy': is a parameter without a shape yet; run a forward pass first",
    ):
        assert part in message
    assert Checkpointer(tmp_path).latest() is None


def test_objects_that_are_not_plain_are_refused_by_place(tmp_path: Path):
    with Checkpointer(tmp_path) as ck:
        with pytest.raises(InvalidState, match=r"objects\['rng'\]\[0\]: is a Tensor; .*tensors go into tensors"):
            ck.save(1, {}, {"rng": [torch.ones(1)]})
        with pytest.raises(InvalidState, match=r"shared\['f'\]: is a builtin_function_or_method"):
            ck.save(1, {}, shared={"f": len})


@pytest.mark.parametrize("step", [-1, 1.0, True, "1"])
def test_a_step_is_an_integer_from_zero(tmp_path: Path, step: object):
    with (
        Checkpointer(tmp_path) as ck,
        pytest.raises(InvalidState, match=r"step: .*; allowed are integers from 0"),
    ):
        ck.save(step, {})  # type: ignore[arg-type]


def test_a_hole_fails_the_save_and_names_the_tensor_and_the_elements(tmp_path: Path):
    with Checkpointer(tmp_path) as ck:
        handle = ck.save(1, {"w": FlatSlice(torch.ones(6), (10,), 2)})
        with pytest.raises(CoverageError, match=r"'w' has elements \[0, 2\) of 10 held by no rank"):
            handle.result(20)
        assert ck.latest() is None


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A root with one checkpoint of `values(0)`."""
    saved_by(tmp_path, 1)
    return tmp_path


def test_names_on_one_side_only_are_all_named(saved: Path):
    found = blank(0, 1)
    found["extra"] = found.pop("whole")
    with Checkpointer(saved) as ck, pytest.raises(StateMismatch) as caught:
        ck.load(ck.list()[-1], found)
    assert "'extra' is not in the checkpoint; 'whole' is in the checkpoint and has no destination" in str(caught.value)
    assert "strict=False" in str(caught.value)


def test_without_strict_the_common_names_are_loaded_and_the_others_listed(saved: Path):
    found = blank(0, 1)
    found["extra"] = torch.ones(2)
    del found["whole"], found["rng"]
    with Checkpointer(saved) as ck:
        loaded = ck.load(ck.list()[-1], found, strict=False)
    assert loaded.missing == ("extra",)
    assert loaded.unexpected == ("rng", "whole")
    assert torch.equal(found["box"].tensor, values(0)["box"])
    assert found["extra"].tolist() == [1, 1]


def test_shapes_dtypes_and_kinds_that_differ_are_all_named_and_nothing_is_overwritten(saved: Path):
    found = blank(0, 1)
    found["whole"] = torch.zeros(5, 4, dtype=torch.float64)
    found["scalar"] = torch.tensor(0.0)
    found["empty"] = RankLocal(torch.empty(0, 3))
    found["rng"] = torch.zeros(4, dtype=torch.uint8)
    with Checkpointer(saved) as ck, pytest.raises(StateMismatch) as caught:
        ck.load(ck.list()[-1], found)
    message = str(caught.value)
    for part in (
        "'whole' was saved with shape [5, 3], the destination has [5, 4]",
        "'scalar' was saved as int64, the destination is float32",
        "'empty' was saved shared by all ranks, the destination is not",
        "'rng' was saved rank-local, the destination is not",
    ):
        assert part in message
    assert (found["flat"].tensor == -9).all()


def test_a_removed_checkpoint_is_not_found(saved: Path):
    ck = Checkpointer(saved)
    info = ck.list()[-1]
    Path(info.path, "COMMIT.json").unlink()
    with pytest.raises(CheckpointNotFound, match=r"no COMMIT\.json: nothing was committed here"):
        ck.load(info, {})


# Errors in the background


def broken_root(tmp_path: Path) -> Path:
    """A root that cannot be written: its parent is a file."""
    (tmp_path / "file").write_text("in the way")
    return tmp_path / "file" / "root"


def test_a_failed_save_raises_once_at_the_next_call(tmp_path: Path):
    ck = Checkpointer(broken_root(tmp_path))
    wait_until(ck.save(1, {"t": torch.ones(1)}).done)
    with pytest.raises(StorageError, match="cannot create: Not a directory"):
        ck.save(2, {"t": torch.ones(1)})
    ck.poll()
    ck.close()


@pytest.mark.parametrize("call", ["poll", "close"])
def test_a_failed_save_raises_at_poll_and_close(tmp_path: Path, call: str):
    ck = Checkpointer(broken_root(tmp_path))
    handle = ck.save(1, {"t": torch.ones(1)})
    wait_until(handle.done)
    with pytest.raises(StorageError, match="Not a directory"):
        getattr(ck, call)()


def test_an_error_seen_through_the_handle_is_not_raised_again(tmp_path: Path):
    with Checkpointer(broken_root(tmp_path)) as ck:
        handle = ck.save(1, {"t": torch.ones(1)})
        assert isinstance(handle.exception(20), StorageError)
        with pytest.raises(StorageError):
            handle.result(20)


def test_a_failed_save_only_warns_when_told_so_and_the_next_one_works(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    root = broken_root(tmp_path)
    with Checkpointer(root, config=CheckpointConfig(on_error="warn")) as ck:
        wait_until(ck.save(1, {"t": torch.ones(1)}).done)
        with caplog.at_level(logging.WARNING, "checkpoint"):
            ck.poll()
        (tmp_path / "file").unlink()
        assert ck.save(2, {"t": torch.ones(1)}).result(20).step == 2
    assert "the save of step 1 failed, training goes on" in caplog.text


def test_an_error_in_the_block_is_told_before_that_of_a_save(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    def fail() -> None:
        with Checkpointer(broken_root(tmp_path)) as ck:
            ck.save(1, {"t": torch.ones(1)})
            raise KeyError("the block's own")

    with pytest.raises(KeyError):
        fail()
    assert "a save did not end well either" in caplog.text


def test_close_is_idempotent_and_final(tmp_path: Path):
    ck = Checkpointer(tmp_path)
    handle = ck.save(1, {"t": torch.ones(1)})
    ck.close()
    assert handle.result(0).step == 1
    ck.close()
    with pytest.raises(ValueError, match="closed"):
        ck.save(2, {})


# Cadence and configuration


@pytest.mark.parametrize(("every", "due"), [(0, []), (1, [1, 2, 3, 4]), (2, [2, 4])])
def test_saves_are_due_at_the_multiples_of_the_cadence(tmp_path: Path, every: int, due: list[int]):
    ck = Checkpointer(tmp_path, config=CheckpointConfig(every=every))
    assert [step for step in range(5) if ck.should_save(step)] == due


def test_everything_wrong_with_the_arguments_is_said_at_once(tmp_path: Path):
    config = CheckpointConfig(every=-1, keep_last=0, commit_timeout_s=0, on_error="ignore")  # type: ignore[arg-type]
    with pytest.raises(ValueError) as caught:
        Checkpointer(tmp_path, config=config, rank=2, world_size=2)
    for part in (
        "config.every: -1",
        "config.keep_last: 0",
        "config.commit_timeout_s: 0",
        "config.on_error: 'ignore'",
        "rank: 2 is not a rank of a world of 2",
        "run_id: needed with several ranks",
    ):
        assert part in str(caught.value)
