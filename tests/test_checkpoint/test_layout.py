"""Declared layouts: which runs of a local dimension are which of the whole one."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from checkpoint.coverage import coverage_problem
from checkpoint.errors import InvalidState
from checkpoint.layout import (
    DimLayout,
    Run,
    fused,
    grouped_qkv,
    of_dtensor,
    padded,
    share,
    split,
    whole,
)
from checkpoint.reshard import view
from checkpoint.state import FlatSlice, LayoutSlice, Piece, Replica, TensorLike, pieces_of, written_by
from tests.ranks import run_ranks
from tests.test_checkpoint.worlds import local_part


def indices(dim: DimLayout) -> list[int]:
    """Return the index in the whole of each local index, -1 for padding."""
    found = [-1] * dim.local_size
    for run in dim.runs:
        found[run.local : run.local + run.length] = range(run.start, run.start + run.length)
    return found


def test_a_split_is_cut_as_torch_chunks_are():
    for size, num_ranks in itertools.product(range(12), range(1, 6)):
        chunks = list(torch.arange(size).chunk(num_ranks)) if size else []
        for rank in range(num_ranks):
            expected = chunks[rank].tolist() if rank < len(chunks) else []
            assert indices(split(size, rank, num_ranks)) == expected


def test_fused_projections_are_shared_out_one_by_one():
    assert indices(fused([4, 4], 0, 2)) == [0, 1, 4, 5]
    assert indices(fused([4, 4], 1, 2)) == [2, 3, 6, 7]
    assert indices(fused([4, 2, 2], 1, 2)) == [2, 3, 5, 7]
    assert indices(fused([2, 3], 0, 1)) == [0, 1, 2, 3, 4]


def test_grouped_heads_are_a_block_of_q_of_k_and_of_v_each():
    # 4 heads of 2, two groups; q is [0, 8), k [8, 12), v [12, 16)
    assert indices(grouped_qkv(4, 2, 2, 0, 1)) == [0, 1, 2, 3, 8, 9, 12, 13, 4, 5, 6, 7, 10, 11, 14, 15]
    assert indices(grouped_qkv(4, 2, 2, 1, 2)) == [4, 5, 6, 7, 10, 11, 14, 15]


def test_ranks_that_share_a_group_hold_copies_of_its_k_and_v():
    by_rank = [grouped_qkv(4, 2, 1, rank, 4) for rank in range(4)]
    assert [indices(dim) for dim in by_rank] == [[0, 4, 6], [1, 4, 6], [2, 5, 7], [3, 5, 7]]
    assert [[run.copy for run in dim.runs] for dim in by_rank] == [[0, 0, 0], [0, 1, 1]] * 2
    assert [run.num_copies for run in by_rank[0].runs] == [1, 2, 2]


def test_padding_belongs_to_nothing():
    assert [indices(padded(5, 8, rank, 4)) for rank in range(4)] == [[0, 1], [2, 3], [4, -1], [-1, -1]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: split(4, 2, 2), "2 is not a rank of 2"),
        (lambda: fused([4, 3], 0, 2), "sizes: 3 cannot be divided by 2"),
        (lambda: grouped_qkv(6, 4, 2, 0, 2), "num_heads: 6 cannot be divided by 4"),
        (lambda: grouped_qkv(12, 2, 2, 0, 3), "num_kv_heads, num_ranks: 3 cannot be divided by 2"),
        (lambda: padded(9, 8, 0, 2), "padded_size 8 is less than the size 9"),
        (lambda: padded(7, 9, 0, 2), "padded_size: 9 cannot be divided by 2"),
        (lambda: DimLayout(4, 4, (Run(0, 0, 2), Run(1, 2, 2))), "overlaps the run before it"),
        (lambda: DimLayout(4, 4, (Run(0, 3, 2),)), "leaves its 4 local or 4 whole indices"),
        (lambda: DimLayout(4, 4, (Run(0, 0, 2, 2, 2),)), "is not one of its copies"),
    ],
)
def test_what_cannot_be_a_layout_is_refused(make, message: str):
    with pytest.raises(InvalidState, match=message):
        make()


# Layouts of tensors


def gathered(shape: Sequence[int], parts: Sequence[Sequence[Piece]]) -> torch.Tensor:
    """Return the tensor that the written pieces of all ranks make, each element of it written once."""
    pieces = [piece for part in parts for piece in part]
    assert coverage_problem(tuple(shape), [piece.region for piece in pieces]) is None
    found = torch.full(tuple(shape), -1, dtype=pieces[0].tensor.dtype)
    for piece in pieces:
        for offset, box in piece.region.boxes():
            at = tuple(slice(o, o + n) for o, n in zip(offset, box, strict=True))
            found[at] = view(piece.tensor, piece.region, offset, box)
    return found


LAYOUTS = {
    "gate-up": ((12, 3), lambda r, n: (fused([6, 6], r, n), whole(3))),
    "gate-up, transposed": ((3, 12), lambda r, n: (whole(3), fused([6, 6], r, n))),
    "grouped": ((16, 3), lambda r, n: (grouped_qkv(4, 2, 2, r, n) if n < 3 else grouped_qkv(6, 1, 2, r, n), whole(3))),
    "vocabulary": ((7, 3), lambda r, n: (padded(7, 12, r, n), whole(3))),
    "experts": ((5, 2, 12), lambda r, n: (split(5, r, n), whole(2), fused([6, 6], 0, 1))),
}


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("name", LAYOUTS)
def test_ranks_write_the_whole_tensor_once(name: str, num_ranks: int):
    shape, make = LAYOUTS[name]
    values = torch.arange(float(torch.Size(shape).numel())).view(shape)
    parts = []
    for rank in range(num_ranks):
        layout = make(rank, num_ranks)
        pieces = pieces_of({"w": LayoutSlice(local_part(values, layout), layout)})
        parts.append(written_by(rank, num_ranks, pieces))
    assert torch.equal(gathered(shape, parts), values)


@given(data=st.data())
def test_a_flat_partition_of_any_layout_is_where_it_was_in_the_whole(data: st.DataObject):
    shape, make = data.draw(st.sampled_from(list(LAYOUTS.values())))
    num_ranks = data.draw(st.integers(1, 3))
    values = torch.arange(float(torch.Size(shape).numel())).view(shape)
    parts = []
    for rank in range(num_ranks):
        layout = make(rank, num_ranks)
        flat = local_part(values, layout).flatten()
        cuts = sorted(data.draw(st.lists(st.integers(0, len(flat)), max_size=3)))
        for start, stop in itertools.pairwise([0, *cuts, len(flat)]):
            part = LayoutSlice(flat[start:stop], layout, start)
            parts.append(written_by(rank, num_ranks, pieces_of({"w": part})))
    assert torch.equal(gathered(shape, parts), values)


def test_a_shape_that_the_layout_does_not_have_is_refused():
    with pytest.raises(InvalidState, match=r"'w': has shape \[3, 2\], its layout \[4, 2\]"):
        pieces_of({"w": LayoutSlice(torch.zeros(3, 2), (whole(4), whole(2)))})
    with pytest.raises(InvalidState, match=r"range \[6, 9\) leaves its 8 elements"):
        pieces_of({"w": LayoutSlice(torch.zeros(3), (whole(4), whole(2)), 6)})


# Copies


@pytest.mark.parametrize("numel", [0, 1, 7, 8, 9, 40, 41])
@pytest.mark.parametrize("num_copies", [1, 2, 3, 7])
def test_holders_of_copies_divide_them_by_whole_chunks(numel: int, num_copies: int):
    cuts = [share(numel, 8, copy, num_copies) for copy in range(num_copies)]
    assert cuts[0][0] == 0
    assert cuts[-1][1] == numel
    for (_, stop), (start, _) in itertools.pairwise(cuts):
        assert stop == start
        assert start % 8 == 0 or start == numel


def test_each_element_of_a_replica_is_written_by_one_of_its_holders():
    big, small = torch.arange(5_000_000.0), torch.arange(6.0)
    parts: list[list[Piece]] = []
    for index in range(3):
        state: dict[str, TensorLike] = {
            "big": Replica(FlatSlice(big, (5_000_000,), 0), index, 3),
            "small": Replica(FlatSlice(small, (6,), 0), index, 3),
            "strided": Replica(LayoutSlice(torch.arange(12.0).view(3, 4).T, (whole(4), whole(3))), index, 3),
        }
        parts.append(written_by(index, 3, pieces_of(state)))
    for name, shape in (("big", (5_000_000,)), ("small", (6,)), ("strided", (4, 3))):
        pieces = [[p for p in part if p.name == name] for part in parts]
        gathered(shape, pieces)
        assert sum(map(len, pieces)) == (3 if name == "big" else 1)


def test_only_slices_have_replicas():
    with pytest.raises(InvalidState, match="'w': Replica: holds a replicated tensor; allowed are slices and DTensors"):
        pieces_of({"w": Replica(torch.zeros(3), 0, 2)})
    with pytest.raises(InvalidState, match="'w': Replica: index 2 is not one of 2 copies"):
        pieces_of({"w": Replica(FlatSlice(torch.zeros(3), (3,), 0), 2, 2)})


# Tied tensors


def test_tied_tensors_are_written_once_under_all_their_names():
    embedding = torch.zeros(4, 3)
    (piece,) = written_by(0, 1, pieces_of({"embed": embedding, "head": embedding.detach(), "none": torch.empty(0)}))[
        :-1
    ]
    assert (piece.name, piece.aliases) == ("embed", ("head",))
    part = FlatSlice(embedding.view(-1)[2:5], (12,), 2)
    (piece,) = written_by(0, 2, pieces_of({"embed": part, "head": part}))
    assert (piece.name, piece.aliases) == ("embed", ("head",))


def test_views_of_one_memory_that_differ_are_written_each():
    table = torch.zeros(4, 4)
    state: dict[str, TensorLike] = {"t": table, "transposed": table.T, "row": table[0], "bits": table.view(torch.int32)}
    assert len(written_by(0, 1, pieces_of(state))) == 4


# DTensors


def test_dtensors_of_any_placement_are_taken_as_they_lie():
    assert run_ranks(_check_dtensors, 4) == [None] * 4


def _check_dtensors(rank: int, world_size: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.placement_types import Partial, _StridedShard

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shard", "tensor"))
    shapes = [(8, 6), (7, 5), (3, 1), (1, 9), (4,), (2, 3, 5)]
    options = [Replicate(), Shard(0), Shard(1), _StridedShard(0, split_factor=2), _StridedShard(0, split_factor=3)]
    for shape, first, second in itertools.product(shapes, options, options):
        if len(shape) < 2 and Shard(1) in (first, second):
            continue
        if isinstance(second, _StridedShard) and isinstance(first, _StridedShard):
            continue
        values = torch.arange(float(torch.Size(shape).numel())).view(shape)
        found = distribute_tensor(values, mesh, [first, second], src_data_rank=None)
        layout = of_dtensor(found)
        assert layout is not None
        assert torch.equal(local_part(values, layout.layout), found.to_local())
        assert layout.num_copies == 2 ** [first, second].count(Replicate())
        regions = [[p.region for p in written_by(rank, 4, pieces_of({"w": found}))]]
        everybody: list[list[list]] = [[]] * world_size
        torch.distributed.all_gather_object(everybody, regions[0])
        assert coverage_problem(shape, [region for part in everybody for region in part]) is None
    alone = distribute_tensor(torch.zeros(4), mesh["tensor"], [Shard(0)])
    assert of_dtensor(alone) is not None
    from torch.distributed.tensor import DTensor

    partial = DTensor.from_local(torch.zeros(4), mesh, [Partial(), Replicate()])
    with pytest.raises(
        InvalidState, match=r"'w': is a DTensor placed as P.*; redistribute it to Shard or Replicate first"
    ):
        pieces_of({"w": partial})
