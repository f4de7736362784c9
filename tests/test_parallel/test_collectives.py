"""Collectives under autograd: forward and gradients against the same arithmetic in one process, in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from parallel import collectives, overlap
from tests.ranks import run_ranks


def _inputs(world_size: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, 2 * world_size, 3, generator=generator, dtype=torch.float64).requires_grad_()
        for _ in range(world_size)
    ]


def _weights(world_size: int, like: Tensor, equal: bool) -> list[Tensor]:
    """What each rank multiplies its output with; equal where every rank goes on alike."""
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(like.shape, generator=generator, dtype=torch.float64) for _ in range(world_size)]
    return [weights[0]] * world_size if equal else weights


def _reference(kind: str, inputs: list[Tensor]) -> list[Tensor]:
    n = len(inputs)
    match kind:
        case "replicate":
            return [inputs[0]] * n
        case "sum_ranks":
            return [sum(inputs)] * n  # type: ignore[list-item]
        case "split":
            return list(inputs[0].chunk(n, 1))
        case "gather" | "gather, summed":
            return [torch.cat(inputs, 1)] * n
        case "scatter":
            return list(sum(inputs).chunk(n, 1))  # type: ignore[union-attr]
    raise AssertionError(kind)


_EQUAL_INPUT = ("replicate", "split")
_ALIKE_AFTER = ("sum_ranks", "gather")


def _one_rank(rank: int, world_size: int, kind: str) -> tuple[Tensor, Tensor]:
    assert dist.group.WORLD is not None
    inputs = _inputs(world_size)
    x = inputs[0 if kind in _EQUAL_INPUT else rank]
    group = dist.group.WORLD
    if kind in ("gather, summed", "scatter"):
        y = getattr(overlap, kind.partition(",")[0])(x, group.group_name, overlap=False)
    else:
        y = getattr(collectives, kind)(x, *([] if kind in ("replicate", "sum_ranks") else [1]), group)
    (y * _weights(world_size, y, kind in _ALIKE_AFTER)[rank]).sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad


@pytest.mark.parametrize("kind", ["replicate", "sum_ranks", "split", "gather", "gather, summed", "scatter"])
def test_a_collective_and_its_gradient_equal_one_process(kind: str) -> None:
    world_size = 3
    inputs = _inputs(world_size)
    outputs = _reference(kind, inputs)
    weights = _weights(world_size, outputs[0], kind in _ALIKE_AFTER)
    terms = [(y * w).sum() for y, w in zip(outputs, weights, strict=True)]
    # Where every rank goes on alike, all compute the same loss: it counts once.
    loss = terms[0] if kind in _ALIKE_AFTER else torch.stack(terms).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    for rank, (y, grad) in enumerate(run_ranks(_one_rank, world_size, kind)):
        assert torch.allclose(y, outputs[rank], rtol=1e-12, atol=1e-14)
        expected = inputs[0 if kind in _EQUAL_INPUT else rank].grad
        assert expected is not None
        assert torch.allclose(grad, expected, rtol=1e-12, atol=1e-14)


def _exchange(rank: int, world_size: int) -> tuple[Tensor, Tensor]:
    assert dist.group.WORLD is not None
    send = [(rank + to) % 3 for to in range(world_size)]
    receive = [(origin + rank) % 3 for origin in range(world_size)]
    rows = [torch.full((n, 2), 10.0 * rank + to, dtype=torch.float64) for to, n in enumerate(send)]
    x = torch.cat(rows).requires_grad_()
    y = collectives.exchange(x, dist.group.WORLD, send, receive)
    (y * (rank + 1)).sum().backward()
    assert x.grad is not None
    expected = torch.cat([torch.full((n, 2), to + 1.0, dtype=torch.float64) for to, n in enumerate(send)])
    assert torch.equal(x.grad, expected)
    return y.detach(), x.grad


def test_an_exchange_of_uneven_rows_brings_rows_and_gradients_to_their_owners() -> None:
    for rank, (y, _) in enumerate(run_ranks(_exchange, 3)):
        expected = [torch.full(((origin + rank) % 3, 2), 10.0 * origin + rank) for origin in range(3)]
        assert torch.equal(y, torch.cat(expected).double())


def _odd(rank: int, world_size: int) -> None:
    assert dist.group.WORLD is not None
    with pytest.raises(ValueError, match=r"2 ranks cannot share a dimension of 3 evenly"):
        collectives.split(torch.zeros(3), 0, dist.group.WORLD)


def test_a_dimension_that_does_not_divide_is_refused_before_anything_is_sent() -> None:
    run_ranks(_odd, 2)


def _odd_exchange(rank: int, world_size: int) -> None:
    group = dist.group.WORLD
    assert group is not None
    x = torch.zeros(3, 2)
    with pytest.raises(ValueError, match="2 ranks cannot share a dimension of 3 evenly"):
        collectives.exchange(x, group)  # gloo itself would accept it
    with pytest.raises(ValueError, match="rows to send and receive for each of 2 ranks"):
        collectives.exchange(x, group, [1, 2])
    with pytest.raises(ValueError, match="rows to send and receive for each of 2 ranks"):
        collectives.exchange(x, group, [3], [3])
    with pytest.raises(ValueError, match="2 rows are to be sent of 3"):
        collectives.exchange(x, group, [1, 1], [1, 1])


def test_an_exchange_whose_rows_do_not_add_up_is_refused_before_anything_is_sent() -> None:
    run_ranks(_odd_exchange, 2)


_KINDS = ("replicate", "sum_ranks", "split", "gather")


def _call(kind: str, x: Tensor, dim: int) -> Tensor:
    group = dist.group.WORLD
    function = getattr(collectives, kind)
    y = function(x, group) if kind in ("replicate", "sum_ranks") else function(x, dim, group)
    assert isinstance(y, Tensor)
    return y


def _gradients(kind: str, x: Tensor, dim: int, weight: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    y = _call(kind, x, dim)
    (y * weight[: y.shape[0], : y.shape[1]]).sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad


def _hard_inputs(rank: int, world_size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(6, 8, generator=generator, dtype=torch.float64)
    weight = torch.randn(16, 16, generator=generator, dtype=torch.float64)
    for kind in _KINDS:
        for dim, negative in ((0, -2), (1, -1)):
            y, grad = _gradients(kind, base, dim, weight)
            # Strides of inputs and gradients, and how a dimension is counted, change nothing.
            for x, d, w in ((base.t().contiguous().t(), dim, weight.t().contiguous().t()), (base, negative, weight)):
                again, grad_again = _gradients(kind, x, d, w)
                assert torch.equal(again, y), kind
                assert torch.equal(grad_again, grad), kind
        # An input that is used twice gets the sum of both gradients.
        x = base.detach().requires_grad_()
        one, two = _call(kind, x, 0), _call(kind, x, 0)
        (one * weight[: one.shape[0], :8]).sum().backward()
        once = x.grad
        (two * weight[: two.shape[0], :8]).sum().backward()
        assert once is x.grad
        assert torch.allclose(x.grad, 2 * _gradients(kind, base, 0, weight)[1], rtol=1e-14, atol=0)
        empty = torch.zeros(0, 8).requires_grad_()
        _call(kind, empty, 0).sum().backward()
        assert empty.grad is not None
        assert empty.grad.shape == (0, 8)
        half = torch.ones(4, 4, dtype=torch.bfloat16).requires_grad_()
        result = _call(kind, half, -1)
        result.sum().backward()
        assert half.grad is not None
        assert (result.dtype, half.grad.dtype) == (torch.bfloat16, torch.bfloat16)
    for kind in ("replicate", "gather"):
        # `backend="aot_eager"` traces forward and backward as the default backend does, without its compiler.
        compiled = torch.compile(lambda t, kind=kind: _call(kind, t * 2, 0).sin(), backend="aot_eager")
        a, b = base.detach().requires_grad_(), base.detach().requires_grad_()
        compiled(a).sum().backward()
        _call(kind, b * 2, 0).sin().sum().backward()
        assert a.grad is not None
        assert b.grad is not None
        assert torch.equal(a.grad, b.grad), kind
    for kind in ("sum_ranks", "gather"):
        # What follows may work in place on the result along the first dimension.
        x = base.detach().requires_grad_()
        _call(kind, x * 1, 0).mul_(2).sum().backward()


def test_strides_empty_rows_narrow_types_double_use_and_compilation_change_nothing() -> None:
    run_ranks(_hard_inputs, 2)


def _hard_sequences(rank: int, world_size: int) -> None:
    """The same of what gathers and shares out sequences."""
    assert dist.group.WORLD is not None
    name = dist.group.WORLD.group_name
    base = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
    for call in (overlap.gather, overlap.scatter):

        def gradients(x: Tensor, call: Callable[..., Tensor] = call) -> tuple[Tensor, Tensor]:
            x = x.detach().requires_grad_()
            y = call(x * 1, name, overlap=False).mul_(2)  # what follows may work in place on the result
            y.sin().sum().backward()
            assert x.grad is not None
            return y.detach(), x.grad

        y, grad = gradients(base)
        for again in (
            gradients(base.transpose(0, 2).contiguous().transpose(0, 2)),
            torch.compile(gradients, backend="aot_eager")(base),
        ):
            assert torch.equal(again[0], y)
            assert torch.equal(again[1], grad)
        assert gradients(base.bfloat16())[1].dtype == torch.bfloat16
        assert gradients(base[:0])[1].shape == (0, 4, 5)


def test_strides_empty_batches_and_compilation_change_nothing_of_sequences() -> None:
    run_ranks(_hard_sequences, 2)


def _alone(rank: int, world_size: int) -> None:
    x = torch.ones(3, 3)
    assert all(_call(kind, x, 0) is x for kind in _KINDS)
    assert collectives.exchange(x, dist.group.WORLD, [3], [3]) is x  # type: ignore[arg-type]


def test_a_group_of_one_is_no_communication() -> None:
    run_ranks(_alone, 1)
