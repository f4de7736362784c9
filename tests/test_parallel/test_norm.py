"""A gradient that is spread over ranks has the norm of the whole one."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from parallel.norm import Held, clip_factor, sum_of_squares
from parallel.shards import DimShard, Run, Shard, even_dim, fused_dim, whole, whole_dim

WHOLE = torch.randn(12, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def grouped(rank: int, num_ranks: int) -> Shard:
    """8 rows of queries over the ranks, 2 x 2 of keys and values, each on half of the ranks."""
    share, copies = 8 // num_ranks, num_ranks // 2
    kv = rank // copies
    runs = (
        Run(0, rank * share, share),
        Run(share, 8 + kv, 1, rank % copies, copies),
        Run(share + 1, 10 + kv, 1, rank % copies, copies),
    )
    return Shard((DimShard(12, share + 2, runs), whole_dim(6)), ("tensor",))


LAYOUTS: dict[str, list[Shard]] = {
    "whole": [whole((12, 6))],
    "rows": [Shard((even_dim(12, rank, 4), whole_dim(6))) for rank in range(4)],
    "padded rows": [Shard((even_dim(12, rank, 5), whole_dim(6))) for rank in range(5)],
    "padded columns": [Shard((whole_dim(12), even_dim(6, rank, 4))) for rank in range(4)],
    "fused": [Shard((fused_dim((4, 8), rank, 2), whole_dim(6))) for rank in range(2)],
    "copied heads": [grouped(rank, 4) for rank in range(4)],
}


def local(shard: Shard) -> Tensor:
    """The rank's gradient, with rubbish in the padding."""
    tensor = torch.full(shard.local_shape, 1e3, dtype=WHOLE.dtype)
    for mine, theirs, _, _ in shard.blocks():
        tensor[mine] = WHOLE[theirs]
    return tensor


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("parts", [1, 2, 5])
def test_every_element_counts_once(layout: str, parts: int) -> None:
    """`parts` ZeRO ranks share each tensor rank's elements; 1 keeps them together, on two data ranks."""
    expected = float(WHOLE.square().sum())
    total = 0.0
    for shard in LAYOUTS[layout]:
        gradient = local(shard)
        if parts == 1:
            total += 2 * float(sum_of_squares([Held(gradient, shard, num_holders=2)]))
            continue
        size = math.ceil(gradient.numel() / parts)
        for start in range(0, gradient.numel(), size):
            piece = gradient.view(-1)[start : start + size]
            total += float(sum_of_squares([Held(piece, shard, start=start)]))
    assert total == pytest.approx(expected, rel=1e-14)


def test_several_parameters_of_several_dtypes_add_up_and_those_held_elsewhere_do_not_count() -> None:
    held = [
        Held(torch.full((3,), 2.0), whole((3,))),
        Held(torch.full((4,), 0.5, dtype=torch.bfloat16), whole((4,)), num_holders=2),
        Held(torch.ones(5), whole((5,)), num_holders=0),
        Held(torch.ones(0), whole((7,)), start=0),
    ]
    assert float(sum_of_squares(held)) == pytest.approx(12.5, rel=1e-6)  # roots in fp32
    assert float(sum_of_squares([])) == 0.0


def test_clipping_leaves_short_gradients_alone_and_shortens_long_ones() -> None:
    assert clip_factor(0.5, 1.0) == 1.0
    assert clip_factor(4.0, 1.0) == pytest.approx(0.25, rel=1e-6)
    assert clip_factor(4.0, 0.0) == 1.0
