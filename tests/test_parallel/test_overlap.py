"""Products that overlap with their collectives against those that follow them, and against one process."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from parallel import overlap
from parallel.overlap import column, gather_tokens, row, scatter_tokens
from tests.ranks import run_ranks

BATCH, TOKENS, WIDE, NARROW = 3, 8, 12, 20
Results = dict[tuple[bool, bool], list[Tensor]]


def wholes(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [B, T, WIDE], up [NARROW, WIDE], down [WIDE, NARROW], and the output's gradient."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((BATCH, TOKENS, WIDE), (NARROW, WIDE), (WIDE, NARROW), (BATCH, TOKENS, WIDE))
    x, up, down, grad = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    return x, up, down, grad


def _layer(x: Tensor, up: Tensor, down: Tensor, first: Callable[..., Tensor], second: Callable[..., Tensor]) -> Tensor:
    return second(torch.tanh(first(x, up)), down)


def _results(rank: int, world_size: int, dtype: torch.dtype) -> Results:
    """[output, gradients of x, up and down] of this rank, by (sequence, overlap)."""
    group = dist.group.WORLD
    assert group is not None
    x, up, down, grad = wholes(dtype)
    found: Results = {}
    for sequence in (False, True):
        for overlapped in (False, True):
            part = (lambda t: t.chunk(world_size, 1)[rank]) if sequence else (lambda t: t)
            leaves = [part(x), up.chunk(world_size)[rank], down.chunk(world_size, 1)[rank]]
            leaves = [leaf.clone().requires_grad_() for leaf in leaves]

            def first(x: Tensor, w: Tensor, s: bool = sequence, o: bool = overlapped) -> Tensor:
                return column(x, w, group.group_name, sequence=s, overlap=o)

            def second(x: Tensor, w: Tensor, s: bool = sequence, o: bool = overlapped) -> Tensor:
                return row(x, w, group.group_name, sequence=s, overlap=o)

            out = _layer(*leaves, first, second)
            out.backward(part(grad))  # type: ignore[no-untyped-call]
            found[sequence, overlapped] = [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]
    assert torch.equal(scatter_tokens(gather_tokens(x, group), group), x * world_size)
    return found


def _whole(ranks: list[Results], how: tuple[bool, bool]) -> list[Tensor]:
    sequence, _ = how
    out, grad_x, grad_up, grad_down = zip(*(rank[how] for rank in ranks), strict=True)
    if not sequence:
        assert all(torch.equal(t, out[0]) for t in out)
        assert all(torch.equal(t, grad_x[0]) for t in grad_x)
    join = (lambda parts: torch.cat(parts, 1)) if sequence else (lambda parts: parts[0])
    return [join(out), join(grad_x), torch.cat(grad_up), torch.cat(grad_down, 1)]


def _check(world_size: int) -> None:
    x, up, down, grad = wholes(torch.float64)
    leaves = [t.requires_grad_() for t in (x, up, down)]
    out = _layer(*leaves, torch.nn.functional.linear, torch.nn.functional.linear)
    wanted = [out.detach(), *torch.autograd.grad(out, leaves, grad)]
    ranks = run_ranks(_results, world_size, torch.float64)
    for sequence in (False, True):
        for overlapped in (False, True):
            for got, exact in zip(_whole(ranks, (sequence, overlapped)), wanted, strict=True):
                torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-12)


def test_overlapped_products_of_two_ranks_are_those_of_one_process() -> None:
    _check(2)


def test_overlapped_products_go_round_a_ring_of_four_ranks() -> None:
    _check(4)


def test_in_bf16_overlap_changes_no_more_than_the_order_of_sums() -> None:
    ranks = run_ranks(_results, 2, torch.bfloat16)
    for sequence in (False, True):
        plain, overlapped = (_whole(ranks, (sequence, o)) for o in (False, True))
        for one, other in zip(plain, overlapped, strict=True):
            # Each element is a sum of two terms that were rounded to bf16; a product may round a term the other way.
            assert (one - other).abs().max() <= 2 * torch.finfo(torch.bfloat16).eps * one.abs().max()


def _called(rank: int, world_size: int) -> None:
    group = dist.group.WORLD
    assert group is not None
    x, up, _, _ = wholes(torch.float32)
    for operator, weight in ((overlap._column, up.chunk(2)[rank]), (overlap._row, up)):
        for sequence in (False, True):
            given = (x.requires_grad_(), weight.clone().requires_grad_(), group.group_name, sequence, True)
            torch.library.opcheck(operator, given, test_utils=("test_schema", "test_faketensor"))


def test_the_operators_tell_the_compiler_their_shapes() -> None:
    run_ranks(_called, 2)
