"""What a state may hold beyond plain tensors: tied names and complex numbers in double precision."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import checkpoint
from checkpoint import CheckpointConfig, Checkpointer
from checkpoint.coverage import coverage_problem
from checkpoint.region import Region
from checkpoint.state import BoxSlice, pieces_of, written_by
from tests.test_checkpoint.worlds import ranks


@pytest.mark.parametrize("strided", [False, True])
def test_complex_numbers_in_double_precision_come_back(tmp_path: Path, strided: bool):
    values = torch.complex(torch.randn(30, 7, dtype=torch.float64), torch.full((30, 7), -0.0, dtype=torch.float64))
    values[3, 3] = complex(float("nan"), float("-inf"))
    saved = values.T if strided else values
    with Checkpointer(tmp_path) as ck:
        info = ck.save(1, {"w": saved, "odd": torch.ones(3, dtype=torch.uint8)}).result(20)
    found = checkpoint.read(info, "w")["w"]
    assert found.dtype == torch.complex128
    assert torch.equal(found.contiguous().view(torch.int64), saved.contiguous().view(torch.int64))
    box = torch.zeros(3, 2, dtype=torch.complex128)
    ck.load(info, {"w": BoxSlice(box, tuple(saved.shape), (4, 5))}, strict=False)
    assert torch.equal(box, saved[4:7, 5:7])


def test_other_tools_see_complex_numbers_as_pairs(tmp_path: Path):
    values = torch.randn(3, 2, dtype=torch.complex128)
    with Checkpointer(tmp_path) as ck:
        info = ck.save(1, {"w": values}).result(20)
    found = load_file(Path(info.path, "r00000.safetensors"))
    assert torch.equal(torch.view_as_complex(found["w"]), values)


def test_tied_tensors_take_room_once_and_fill_both_names(tmp_path: Path):
    embedding = torch.randn(100, 100)
    with Checkpointer(tmp_path) as ck:
        info = ck.save(1, {"embed": embedding, "head": embedding.detach()}).result(20)
    assert info.nbytes < 1.5 * embedding.nbytes
    assert checkpoint.verify(info).ok
    tied = torch.zeros(100, 100)
    ck.load(info, {"embed": tied, "head": tied})
    assert torch.equal(tied, embedding)
    apart = {"embed": torch.zeros(100, 100), "head": torch.zeros(100, 100)}
    ck.load(info, apart)
    assert torch.equal(apart["embed"], embedding)
    assert torch.equal(apart["head"], embedding)


def test_tensors_that_are_tied_only_now_are_saved_as_they_are(tmp_path: Path):
    embedding, head = torch.randn(10), torch.randn(10)
    with Checkpointer(tmp_path) as ck:
        ck.save(1, {"embed": embedding, "head": head}).result(20)
        ck.save(2, {"embed": embedding, "head": embedding}).result(20)
        info = ck.save(3, {"embed": embedding, "head": head}).result(20)
    assert torch.equal(checkpoint.read(info)["head"], head)
    assert torch.equal(checkpoint.read(ck.list()[0])["head"], embedding)


def test_a_replicated_tensor_that_outweighs_the_others_is_divided_among_the_ranks():
    state = {"embedding": torch.empty(64 << 20, dtype=torch.uint8)} | {f"w{i}": torch.empty(1000) for i in range(9)}
    written = [written_by(rank, 3, pieces_of(state)) for rank in range(3)]
    for name, tensor in state.items():
        regions: list[Region] = [p.region for part in written for p in part if p.name == name]
        assert len(regions) == (3 if name == "embedding" else 1)
        assert coverage_problem(tuple(tensor.shape), regions) is None
    loads = [sum(p.nbytes for p in part) for part in written]
    assert max(loads) - min(loads) <= 8 << 20


def test_a_divided_tensor_is_read_whole(tmp_path: Path):
    state = {"embedding": torch.randn(5_000_000), "bias": torch.randn(3)}

    def save(rank: int) -> int:
        config = CheckpointConfig(commit_timeout_s=20)
        with Checkpointer(tmp_path, config=config, rank=rank, world_size=2, run_id="run") as ck:
            return ck.save(1, state).stats(20).written_bytes

    assert min(ranks(2, save)) > 3 << 20  # one of three chunks of 8 MiB
    assert all(torch.equal(found, state[name]) for name, found in checkpoint.read(tmp_path).items())
