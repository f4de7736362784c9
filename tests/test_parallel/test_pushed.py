"""Products whose parts are pushed in pieces, through files in place of GPUs' memory, against those of one process."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from parallel import pushed, symmetric
from parallel.overlap import gather_tokens, scatter_tokens
from parallel.products import linear, outer
from parallel.symmetric import copy_into
from tests.ranks import run_ranks
from tests.test_parallel.slots import Buffers

ROUNDS = 3
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def pushed_rank(rank: int, world_size: int, folder: Path) -> int:
    assert dist.group.WORLD is not None
    group, buffers = dist.group.WORLD, Buffers(folder, rank, world_size)
    random = torch.Generator().manual_seed(rank)
    compared = 0

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    for batch, share, wide, narrow in ((1, 8, 12, 20), (4, 3, 6, 5), (9, 4, 8, 8), (3, 16, 4, 2)):
        for piece_bytes in (2**24, 64):
            pushed._PIECE_BYTES = piece_bytes
            for _ in range(ROUNDS):
                x, grad, weight = (
                    normal(batch, share, wide),
                    normal(batch, share * world_size, narrow),
                    normal(narrow, wide),
                )
                gathered = gather_tokens(x, group)
                pairs = [(pushed.column(x, weight.t(), buffers), linear(gathered, weight.t()))]
                found = pushed.column_backward(grad, x, weight, buffers)
                wanted = (scatter_tokens(linear(grad, weight), group), outer(grad, gathered))
                pairs += zip(found, wanted, strict=True)
                pairs.append((pushed.row(grad, weight, buffers), wanted[0]))
                found = pushed.row_backward(x, grad, weight.t(), buffers)
                pairs += zip(found, (linear(gathered, weight.t()), outer(gathered, grad)), strict=True)
                pairs.append((pushed.gather(x, buffers), gathered))
                pairs.append((pushed.scatter(grad, buffers), scatter_tokens(grad, group)))
                for mine, theirs in pairs:
                    torch.testing.assert_close(mine, theirs, **EXACT)
                    compared += 1
    assert buffers.num_open == 0
    return compared


@pytest.mark.parametrize("size", [2, 3])
def test_pushed_products_are_those_that_follow_their_collectives(size: int, tmp_path: Path) -> None:
    assert run_ranks(pushed_rank, size, tmp_path) == [4 * 2 * ROUNDS * 8] * size


def test_pieces_cover_every_token_once() -> None:
    for batch, num_tokens, num_bytes, features, count in (
        (16, 2048, 2**27, 1024, 4),
        (16, 2048, 2**27, 2048, 2),
        (16, 2048, 2**27, 8192, 1),
        (1, 100, 2**27, 512, 4),
        (3, 7, 2**26, 1024, 4),
        (5, 4, 2**25, 1, 2),
        (2, 8, 1, 1, 1),
    ):
        covered = torch.zeros(batch, num_tokens)
        cut = pushed.pieces(batch, num_tokens, num_bytes, features)
        for piece in cut:
            covered[piece] += 1
        assert (covered == 1).all()
        assert len(cut) == count


def test_wide_copies_move_every_bit() -> None:
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        for width, start in ((16, 0), (16, 16), (24, 8), (5, 0)):
            bits = torch.randint(-(2**15), 2**15, (3, 4, 256), dtype=torch.int16)
            source = bits.view(dtype)[..., start : start + width]
            place = torch.zeros(3, 8, width, dtype=dtype)
            copy_into(place[:, 2:6], source)
            assert torch.equal(place[:, 2:6].view(torch.uint8), source.contiguous().view(torch.uint8))
            assert place[:, :2].count_nonzero() == 0
            assert place[:, 6:].count_nonzero() == 0


def places_rank(rank: int, world_size: int) -> list[bool]:
    """What ranks on one host are told, and those of two, and where one rank's GPU does not reach its neighbour."""
    assert dist.group.WORLD is not None
    group, found = dist.group.WORLD, []
    for num_hosts, num_apart in ((1, 0), (2, 0), (1, 1)):
        platform.node = lambda n=num_hosts: f"host{rank % n}"  # type: ignore[misc]
        torch.cuda.device_count = lambda: 2
        torch.cuda.can_device_access_peer = lambda one, other, n=num_apart: rank >= n
        symmetric._can_reach.cache_clear()
        found.append(symmetric._can_reach(group, torch.device("cpu", 0)))
    return found


def test_all_ranks_are_told_alike_whether_their_gpus_reach_each_other() -> None:
    assert run_ranks(places_rank, 2) == [[True, False, False]] * 2
