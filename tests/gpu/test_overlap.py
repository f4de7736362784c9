"""Products whose parts GPUs push into each other's memory equal those that wait for a collective."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from parallel import overlap, symmetric
from tests.gpu.devices import needs_gpus
from tests.ranks import run_ranks

TIMEOUT_S = 120.0
ROUNDS = 20


def results(x: Tensor, weights: tuple[Tensor, Tensor], grad: Tensor, *, overlapped: bool) -> list[Tensor]:
    """A column and a row product as a block has them, and their gradients."""
    assert dist.group.WORLD is not None
    group = dist.group.WORLD.group_name
    leaves = [tensor.detach().requires_grad_() for tensor in (x, *weights)]
    inner = overlap.column(leaves[0], leaves[1], group, sequence=True, overlap=overlapped)
    out = overlap.row(torch.tanh(inner), leaves[2], group, sequence=True, overlap=overlapped)
    out.backward(grad)  # type: ignore[no-untyped-call]
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def overlap_rank(rank: int, world_size: int) -> int:
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    assert dist.group.WORLD is not None
    random, compared = torch.Generator(device).manual_seed(rank), 0

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device=device, dtype=torch.float64)

    for batch, share, width in ((1, 64, 32), (4, 96, 32), (3, 1024, 256)):  # the buffers grow
        weights = normal(2 * width, width), normal(width, 2 * width)
        for _ in range(ROUNDS):  # buffers of a round before must not be read by the next
            x, grad = normal(batch, share, width), normal(batch, share, width)
            assert symmetric.available(dist.group.WORLD, x)
            plain = results(x, weights, grad, overlapped=False)
            if rank == compared % world_size:
                torch.cuda._sleep(2_000_000)  # a rank that is late
            for found, expected in zip(results(x, weights, grad, overlapped=True), plain, strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-9)
            compared += 1
    return compared


@pytest.mark.parametrize("size", [pytest.param(2, id="2 GPUs", marks=needs_gpus(2))])
def test_pushed_parts_give_what_collectives_give(size: int) -> None:
    assert run_ranks(overlap_rank, size, backend="nccl", timeout_s=TIMEOUT_S) == [3 * ROUNDS] * size


def bits_rank(rank: int, world_size: int) -> int:
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    assert dist.group.WORLD is not None
    group, random, compared = dist.group.WORLD.group_name, torch.Generator(device).manual_seed(rank), 0

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device=device).bfloat16()

    for batch, share, width in ((8, 2048, 2048), (1, 8192, 1024)):  # in two pieces, by sequence and along one
        weights = normal(width, width), normal(width, width)
        for late in range(world_size + 1):
            x, grad = normal(batch, share, width), normal(batch, share, width)
            plain = results(x, weights, grad, overlapped=False)
            wholes = [overlap.gather(x, group, overlap=pushes) for pushes in (False, True)]
            parts = [overlap.scatter(wholes[0], group, overlap=pushes) for pushes in (False, True)]
            if rank == late:
                torch.cuda._sleep(20_000_000)
            pushed = results(x, weights, grad, overlapped=True)
            for found, expected in zip([*pushed, wholes[1], parts[1]], [*plain, wholes[0], parts[0]], strict=True):
                assert torch.equal(found, expected)
                compared += 1
    return compared


@pytest.mark.parametrize("size", [pytest.param(2, id="2 GPUs", marks=needs_gpus(2))])
def test_in_bf16_two_ranks_get_the_bits_of_collectives(size: int) -> None:
    assert run_ranks(bits_rank, size, backend="nccl", timeout_s=TIMEOUT_S) == [2 * 3 * 6] * size
