"""Shards: parts of parameters and back to the whole."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from parallel import shards


@given(size=st.integers(1, 40), num_ranks=st.integers(1, 9))
def test_even_parts_cover_a_dimension_once(size: int, num_ranks: int) -> None:
    seen = [
        index
        for rank in range(num_ranks)
        for run in shards.even_dim(size, rank, num_ranks).runs
        for index in range(run.start, run.start + run.length)
    ]
    assert sorted(seen) == list(range(size))


@given(shares=st.lists(st.integers(1, 5), min_size=1, max_size=4), num_ranks=st.integers(1, 5))
def test_parts_of_stacked_matrices_make_up_the_whole(shares: list[int], num_ranks: int) -> None:
    sizes = [share * num_ranks for share in shares]
    x = torch.arange(sum(sizes) * 3).view(-1, 3)
    parts = []
    for rank in range(num_ranks):
        shard = shards.Shard((shards.fused_dim(sizes, rank, num_ranks), shards.whole_dim(3)), ("tensor",))
        local = shard.take(x)
        expected = torch.cat([m.chunk(num_ranks)[rank] for m in x.split(sizes)])
        assert torch.equal(local, expected)
        parts.append(({"w": shard}, {"w": local}))
    assert torch.equal(shards.gather_state(parts)["w"], x)


def test_padding_is_zero_and_never_written_back() -> None:
    x = torch.arange(1, 6)
    last = shards.Shard((shards.even_dim(5, 1, 2),), ("tensor",))
    assert last.take(x).tolist() == [4, 5, 0]
    back = torch.zeros(5, dtype=torch.int64)
    last.put(torch.tensor([7, 8, 9]), back)
    assert back.tolist() == [0, 0, 0, 7, 8]


def test_a_matrix_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="3 ranks cannot share 4 evenly"):
        shards.fused_dim([6, 4], 0, 3)


def test_a_parameter_without_a_tag_is_whole() -> None:
    layer = nn.Linear(3, 2)
    part = shards.Shard((shards.even_dim(4, 0, 2), shards.whole_dim(3)), ("tensor",))
    shards.tag(layer.weight, part)
    assert shards.shards_of(layer) == {"weight": part, "bias": shards.whole((2,))}
    assert part.global_shape == (4, 3)


def test_parts_of_a_parameter_that_requires_gradients_are_plain_tensors_and_can_be_put_back() -> None:
    parameter = nn.Parameter(torch.arange(6.0).reshape(3, 2))
    shard = shards.Shard((shards.even_dim(3, 1, 2), shards.whole_dim(2)), ("tensor",))
    part = shard.take(parameter)
    assert not part.requires_grad
    assert part.tolist() == [[4.0, 5.0], [0.0, 0.0]]  # padded
    shard.put(part + 1, parameter)
    assert parameter.tolist() == [[0.0, 1.0], [2.0, 3.0], [5.0, 6.0]]


def test_a_tag_survives_a_move_of_the_module() -> None:
    layer = nn.Linear(2, 2)
    shard = shards.Shard((shards.even_dim(4, 0, 2), shards.whole_dim(2)), ("tensor",))
    shards.tag(layer.weight, shard)
    assert shards.shard_of(layer.to(torch.bfloat16).weight) is shard
