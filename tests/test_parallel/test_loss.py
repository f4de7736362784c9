"""Cross-entropy of a shared vocabulary and fused with its product, against torch's on all logits."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from parallel import loss
from parallel.loss import IGNORE, cross_entropy, linear_cross_entropy
from tests.ranks import run_ranks

VOCAB, DIM, TOKENS = 33, 8, 24
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [2, N/2, D], weight [V, D], bias [V] and targets, some ignored, one row of the vocabulary never wanted."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, TOKENS // 2, DIM, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCAB, DIM, generator=generator, dtype=torch.float64)
    bias = torch.randn(VOCAB, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, VOCAB - 1, (2, TOKENS // 2), generator=generator)
    targets[0, 2:7] = IGNORE
    return x.to(dtype), weight.to(dtype), bias.to(dtype), targets


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, factor: float) -> list[Tensor]:
    """Loss and gradients of factor x the loss."""
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias) if t is not None]
    logits = functional.linear(*leaves)
    wide = logits.to(torch.promote_types(x.dtype, torch.float32)).flatten(0, 1)
    value = functional.cross_entropy(wide, targets.flatten(), ignore_index=IGNORE, reduction="sum")
    return [value.detach(), *torch.autograd.grad(value * factor, leaves)]


def fused(x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, factor: float) -> list[Tensor]:
    """The same by `linear_cross_entropy`."""
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias) if t is not None]
    value = linear_cross_entropy(leaves[0], leaves[1], targets, bias=leaves[2] if bias is not None else None)
    return [value.detach(), *torch.autograd.grad(value * factor, leaves)]


@pytest.mark.parametrize("rows", [1, 7, TOKENS], ids=["a chunk a token", "uneven chunks", "one chunk"])
@pytest.mark.parametrize("biased", [True, False])
def test_the_fused_loss_is_that_of_all_logits(monkeypatch: pytest.MonkeyPatch, rows: int, biased: bool) -> None:
    monkeypatch.setitem(loss._CHUNK_BYTES, "cpu", rows * VOCAB * 8)
    x, weight, bias, targets = inputs()
    given = (x, weight, bias if biased else None, targets, 0.37)
    for got, wanted in zip(fused(*given), reference(*given), strict=True):
        torch.testing.assert_close(got, wanted, **EXACT)
    with torch.no_grad():
        value = linear_cross_entropy(x, weight, targets, bias=given[2])
    assert torch.equal(value, fused(*given)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_fused_loss_keeps_the_precision_of_its_inputs(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setitem(loss._CHUNK_BYTES, "cpu", 7 * VOCAB * 4)
    x, weight, _, targets = inputs(dtype)
    # Small enough that a share times it is nothing in fp16, as under a loss over many tokens.
    factor = 1.0 if dtype == torch.float16 else 1e-6
    got = fused(x, weight, None, targets, factor)
    wanted = reference(x.double(), weight.double(), None, targets, factor)
    assert [t.dtype for t in got] == [torch.float32, dtype, dtype]
    # Logits and shares are each rounded once to the dtype; logits of up to 12 are off by 12 eps.
    for mine, exact in zip(got, wanted, strict=True):
        assert (mine.double() - exact).abs().max() <= 16 * torch.finfo(dtype).eps * exact.abs().max()


def test_the_fused_loss_of_nothing_is_nothing() -> None:
    x, weight, _, targets = inputs()
    ignored = torch.full_like(targets, IGNORE)
    for value, *gradients in (fused(x, weight, None, ignored, 1.0), fused(x[:, :0], weight, None, targets[:, :0], 1.0)):
        assert float(value) == 0
        assert all(float(gradient.abs().sum()) == 0 for gradient in gradients)


def _shared(rank: int, world_size: int) -> list[list[Tensor]]:
    group = dist.group.WORLD
    assert group is not None
    x, weight, bias, targets = inputs()
    share = -(-VOCAB // world_size)
    start = rank * share
    mine = slice(start, min(start + share, VOCAB))
    leaves = [x.requires_grad_(), weight[mine].clone().requires_grad_(), bias[mine].clone().requires_grad_()]
    one = linear_cross_entropy(leaves[0], leaves[1], targets, bias=leaves[2], group=group, start=start)
    of_fused = [one.detach(), *torch.autograd.grad(one * 0.37, leaves)]
    other = cross_entropy(functional.linear(*leaves), targets, group=group, start=start)
    return [of_fused, [other.detach(), *torch.autograd.grad(other * 0.37, leaves)]]


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_that_share_a_vocabulary_have_the_loss_of_one_process(world_size: int) -> None:
    x, weight, bias, targets = inputs()
    wanted = reference(x, weight, bias, targets, 0.37)
    ranks = run_ranks(_shared, world_size)
    for kind in (0, 1):
        losses = [rank[kind][0] for rank in ranks]
        assert all(torch.equal(value, losses[0]) for value in losses)
        torch.testing.assert_close(losses[0], wanted[0], **EXACT)
        torch.testing.assert_close(torch.stack([rank[kind][1] for rank in ranks]).sum(0), wanted[1], **EXACT)
        for index in (2, 3):
            torch.testing.assert_close(torch.cat([rank[kind][index] for rank in ranks]), wanted[index], **EXACT)


def test_the_fused_loss_is_one_call_for_the_compiler() -> None:
    x, weight, bias, targets = inputs(torch.float32)
    torch.library.opcheck(loss._fused, (x[0].requires_grad_(), weight, targets[0], bias, "", 0, True, False))
