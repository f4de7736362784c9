"""Products with shared matrices and the collectives around them, one after the other or at once.

`column` multiplies with a matrix whose rows the ranks share, `row` with one whose columns they share. Between a column
and a row product lie the ranks' own features; outside lies either what is equal on all ranks, or (`sequence`) each
rank's part of the tokens:

    product             before it            after it      backward, before      backward, after
    column              nothing              nothing       nothing               sums dx
    column, sequence    gathers tokens       nothing       gathers tokens of x   sums dx, takes a part
    row                 nothing              sums          nothing               nothing
    row, sequence       nothing              sums, part    gathers tokens of dy  nothing

With `overlap` a rank begins with the tokens it has, or with those that others wait for, while the rest is on its
way: parts travel round the ring of ranks, one hop a product, or are pushed by the GPUs' copy engines
(`parallel.pushed`). Nothing waits on the host. Without, the collective and the product follow each other. Results
are the same but for the order of sums: for two ranks and products whose library computes a row alike whatever the
number of rows they are equal to the bit; with more ranks the ring sums in an order of its own.

The operators are opaque to torch.compile and to selective recomputation, which see one call each.
"""

# Shapes: B batch, T tokens, t this rank's part of the tokens, I features in, O features out (this rank's).

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import (  # type: ignore[attr-defined]
    GroupName,
    _resolve_process_group,
)

from parallel import pushed, symmetric
from parallel.products import linear, outer, product_into

_SMALL_BYTES = 2**20
"""Sequences of fewer bytes than this are transposed to send the batch in one collective; larger ones go one by one,
which copies nothing."""


def column(x: Tensor, weight_OI: Tensor, group: str, *, sequence: bool, overlap: bool) -> Tensor:
    """Return this rank's features [B, T, O] of x [B, T, I], equal on all ranks, or [B, t, I] with `sequence`.

    `group` is the name of a process group of several ranks.
    """
    return _column(x, weight_OI, group, sequence, overlap)  # type: ignore[no-any-return]


def row(x_BTI: Tensor, weight_OI: Tensor, group: str, *, sequence: bool, overlap: bool) -> Tensor:
    """Return the sum over ranks of their products [B, T, O], or this rank's part [B, t, O] with `sequence`.

    `group` is the name of a process group of several ranks.
    Raises: ValueError if the ranks cannot share the tokens evenly.
    """
    return _row(x_BTI, weight_OI, group, sequence, overlap)  # type: ignore[no-any-return]


def _ranks(group: str) -> ProcessGroup:
    return _resolve_process_group(GroupName(group))


def check_tokens(num_tokens: int, group: ProcessGroup) -> None:
    """Raise ValueError unless the ranks can share a sequence evenly."""
    if num_tokens % group.size():
        raise ValueError(
            f"parallel: sequence: {group.size()} tensor ranks cannot share {num_tokens} tokens evenly; "
            f"allowed: a multiple of {group.size()} tokens, or parallel.sequence = false"
        )


@torch.library.custom_op("parallel::column", mutates_args=())
def _column(x: Tensor, weight: Tensor, group: str, sequence: bool, overlap: bool) -> Tensor:
    if not sequence:
        return linear(x, weight.t())
    ranks = _ranks(group)
    if overlap and symmetric.available(ranks, x):
        return pushed.column(x, weight.t(), symmetric.buffers(ranks, x.device))
    return _gather_product(x, weight.t(), ranks, overlap)[0]


@_column.register_fake
def _(x: Tensor, weight: Tensor, group: str, sequence: bool, overlap: bool) -> Tensor:
    size = _ranks(group).size() if sequence else 1
    return x.new_empty(*x.shape[:-2], x.shape[-2] * size, weight.shape[0])


@torch.library.custom_op("parallel::column_backward", mutates_args=())
def _column_backward(
    grad: Tensor, x: Tensor, weight: Tensor, group: str, sequence: bool, overlap: bool
) -> tuple[Tensor, Tensor]:
    ranks = _ranks(group)
    grad = grad.contiguous()
    if not sequence:
        grad_x = linear(grad, weight)
        work = dist.all_reduce(grad_x, group=ranks, async_op=overlap)
        grad_weight = outer(grad, x)
        if work is not None:
            work.wait()
        return grad_x, grad_weight
    if not overlap:
        gathered = gather_tokens(x, ranks)
        return scatter_tokens(linear(grad, weight), ranks), outer(grad, gathered)
    if symmetric.available(ranks, x):
        return pushed.column_backward(grad, x, weight, symmetric.buffers(ranks, x.device))
    gathering = _start_gather(x, ranks)
    finish = _start_product_scatter(grad, weight, ranks)
    grad_weight = outer(grad, gathering())
    return finish(), grad_weight


@_column_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, group: str, sequence: bool, overlap: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(weight)


@torch.library.custom_op("parallel::row", mutates_args=())
def _row(x: Tensor, weight: Tensor, group: str, sequence: bool, overlap: bool) -> Tensor:
    ranks = _ranks(group)
    x = x.contiguous()
    if sequence:
        check_tokens(x.shape[1], ranks)
        if overlap and symmetric.available(ranks, x):
            return pushed.row(x, weight.t(), symmetric.buffers(ranks, x.device))
        if overlap:
            return _start_product_scatter(x, weight.t(), ranks)()
        return scatter_tokens(linear(x, weight.t()), ranks)
    if overlap:
        return _product_sum(x, weight.t(), ranks)
    y = linear(x, weight.t())
    dist.all_reduce(y, group=ranks)
    return y


@_row.register_fake
def _(x: Tensor, weight: Tensor, group: str, sequence: bool, overlap: bool) -> Tensor:
    size = _ranks(group).size() if sequence else 1
    return x.new_empty(*x.shape[:-2], x.shape[-2] // size, weight.shape[0])


@torch.library.custom_op("parallel::row_backward", mutates_args=())
def _row_backward(
    grad: Tensor, x: Tensor, weight: Tensor, group: str, sequence: bool, overlap: bool
) -> tuple[Tensor, Tensor]:
    grad = grad.contiguous()
    if not sequence:
        return linear(grad, weight), outer(grad, x)
    ranks = _ranks(group)
    if overlap and symmetric.available(ranks, grad):
        return pushed.row_backward(grad, x, weight, symmetric.buffers(ranks, grad.device))
    grad_x, gathered = _gather_product(grad, weight, ranks, overlap)
    return grad_x, outer(gathered, x)


@_row_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, group: str, sequence: bool, overlap: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(weight)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, *ctx.how = inputs
    ctx.save_for_backward(x, weight)


def _backward_by(operator: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor | None, ...]]:
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_weight = operator(grad, *ctx.saved_tensors, *ctx.how)
        return grad_x, grad_weight, None, None, None

    return backward


_column.register_autograd(_backward_by(_column_backward), setup_context=_keep)
_row.register_autograd(_backward_by(_row_backward), setup_context=_keep)


def gather(x_BtI: Tensor, group: str, *, overlap: bool) -> Tensor:
    """Return the tokens of all ranks [B, T, I], contiguous, of which each goes on for itself: gradients are summed."""
    return _gather(x_BtI, group, overlap)  # type: ignore[no-any-return]


def scatter(x_BTI: Tensor, group: str, *, overlap: bool) -> Tensor:
    """Return this rank's part [B, t, I] of the sum over ranks, contiguous; gradients are gathered.

    Raises: ValueError if the ranks cannot share the tokens evenly.
    """
    return _scatter(x_BTI, group, overlap)  # type: ignore[no-any-return]


@torch.library.custom_op("parallel::gather", mutates_args=())
def _gather(x: Tensor, group: str, overlap: bool) -> Tensor:
    ranks = _ranks(group)
    if overlap and symmetric.available(ranks, x):
        return pushed.gather(x, symmetric.buffers(ranks, x.device))
    return gather_tokens(x, ranks)


@_gather.register_fake
def _(x: Tensor, group: str, overlap: bool) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1] * _ranks(group).size(), *x.shape[2:])


@torch.library.custom_op("parallel::scatter", mutates_args=())
def _scatter(x: Tensor, group: str, overlap: bool) -> Tensor:
    ranks = _ranks(group)
    check_tokens(x.shape[1], ranks)
    if overlap and symmetric.available(ranks, x):
        return pushed.scatter(x, symmetric.buffers(ranks, x.device))
    return scatter_tokens(x, ranks)


@_scatter.register_fake
def _(x: Tensor, group: str, overlap: bool) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1] // _ranks(group).size(), *x.shape[2:])


def _keep_how(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *ctx.how = inputs


def _gather_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return _scatter(grad, *ctx.how), None, None


def _scatter_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return _gather(grad, *ctx.how), None, None


_gather.register_autograd(_gather_backward, setup_context=_keep_how)
_scatter.register_autograd(_scatter_backward, setup_context=_keep_how)


def gather_tokens(x_BtI: Tensor, group: ProcessGroup) -> Tensor:
    """Return the parts of all ranks side by side along dimension 1, contiguous; outside of autograd."""
    return _start_gather(x_BtI, group, wait=True)()


def scatter_tokens(x_BTI: Tensor, group: ProcessGroup) -> Tensor:
    """Return this rank's part along dimension 1 of the sum over ranks, contiguous; outside of autograd."""
    check_tokens(x_BTI.shape[1], group)
    batch, num_tokens, *features = x_BTI.shape
    x_BTI = x_BTI.contiguous()
    out = x_BTI.new_empty(batch, num_tokens // group.size(), *features)
    if batch == 1 or x_BTI[:1].nbytes >= _SMALL_BYTES:
        for mine, whole in zip(out, x_BTI, strict=True):
            dist.reduce_scatter_tensor(mine, whole, group=group)
        return out
    first = x_BTI.transpose(0, 1).contiguous()
    part = first.new_empty(num_tokens // group.size(), batch, *features)
    dist.reduce_scatter_tensor(part, first, group=group)
    return out.copy_(part.transpose(0, 1))


def _start_gather(x_BtI: Tensor, group: ProcessGroup, *, wait: bool = False) -> Callable[[], Tensor]:
    """Begin to gather the tokens of all ranks; the result is the function that returns them once they are there."""
    x_BtI = x_BtI.contiguous()
    batch, num_tokens, *features = x_BtI.shape
    out = x_BtI.new_empty(batch, num_tokens * group.size(), *features)
    if batch == 1 or x_BtI[:1].nbytes * group.size() >= _SMALL_BYTES:
        works = [
            dist.all_gather_into_tensor(whole, mine, group=group, async_op=not wait)
            for whole, mine in zip(out, x_BtI, strict=True)
        ]
        stacked = None
    else:
        stacked = x_BtI.new_empty(group.size(), *x_BtI.shape)
        works = [dist.all_gather_into_tensor(stacked.flatten(0, 1), x_BtI, group=group, async_op=not wait)]

    def finish() -> Tensor:
        for work in works:
            if work is not None:
                work.wait()
        if stacked is not None:
            out.view(batch, group.size(), num_tokens, *features).copy_(stacked.transpose(0, 1))
        return out

    return finish


@dataclass(frozen=True, slots=True)
class _Hop:
    """A part on its way from the rank before to the rank after."""

    received: Sequence[Tensor]
    works: list[Any]

    def wait(self) -> Sequence[Tensor]:
        for work in self.works:
            work.wait()
        return self.received


class _Ring:
    """The ranks of a group in a circle, each of which sends to the next one only."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group, self.rank, self.size = group, group.rank(), group.size()
        ranks = dist.get_process_group_ranks(group)
        self._next, self._previous = ranks[(self.rank + 1) % self.size], ranks[self.rank - 1]

    def pass_on(self, parts: Sequence[Tensor], received: Sequence[Tensor]) -> _Hop:
        """Send contiguous tensors to the next rank and receive as many, which all ranks cut alike."""
        hops = [
            dist.P2POp(operation, tensor, peer, self.group)
            for operation, tensors, peer in ((dist.isend, parts, self._next), (dist.irecv, received, self._previous))
            for tensor in tensors
        ]
        return _Hop(received, dist.batch_isend_irecv(hops))


def _gather_product(x_BtI: Tensor, matrix_IO: Tensor, group: ProcessGroup, overlap: bool) -> tuple[Tensor, Tensor]:
    """Return (gathered x [B, T, I] times the matrix, gathered x)."""
    if not overlap:
        gathered = gather_tokens(x_BtI, group)
        return linear(gathered, matrix_IO), gathered
    x_BtI = x_BtI.contiguous()
    batch, share, features = x_BtI.shape
    product = x_BtI.new_empty(batch, share * group.size(), matrix_IO.shape[1])
    out = torch.split(product, share, 1)
    ring = _Ring(group)
    gathered = x_BtI.new_empty(batch, share * ring.size, features)
    whole = torch.split(gathered, share, 1)
    part = x_BtI
    for step in range(ring.size):
        owner = (ring.rank - step) % ring.size
        # Sequence by sequence: so a part is contiguous in the whole as well.
        hop = ring.pass_on(list(part), list(whole[owner - 1])) if step < ring.size - 1 else None
        product_into(part, matrix_IO, out[owner])
        if hop is None:
            break
        hop.wait()
        part = whole[owner - 1]
    whole[ring.rank].copy_(x_BtI)
    return product, gathered


def _start_product_scatter(x_BTI: Tensor, matrix_IO: Tensor, group: ProcessGroup) -> Callable[[], Tensor]:
    """Begin this rank's part [B, t, O] of the sum over ranks of x times the matrix; returns what finishes it.

    The sum for each rank comes past all others, who add their terms, and ends with that rank's own.
    """
    ring = _Ring(group)
    batch, num_tokens, _ = x_BTI.shape
    share = num_tokens // ring.size
    parts = torch.split(x_BTI, share, 1)
    hop: _Hop | None = None
    for step in range(ring.size):
        term = x_BTI.new_empty(batch, share, matrix_IO.shape[1])
        product_into(parts[(ring.rank - 1 - step) % ring.size], matrix_IO, term)
        if step == ring.size - 1:
            last, arriving = term, hop
            break
        if hop is not None:
            term += hop.wait()[0]
        hop = ring.pass_on([term], [torch.empty_like(term)])
    assert arriving is not None
    return lambda: last.add_(arriving.wait()[0])


_SUM_CHUNKS = 2
"""Products that `_product_sum` cuts its tokens into: one is summed while the next is computed."""


def _product_sum(x: Tensor, matrix_IO: Tensor, group: ProcessGroup) -> Tensor:
    """Return the sum over ranks of x times the matrix; tokens in chunks."""
    rows = x.reshape(-1, x.shape[-1])
    out = rows.new_empty(rows.shape[0], matrix_IO.shape[1])
    works = []
    for part, product in zip(rows.chunk(_SUM_CHUNKS), out.chunk(_SUM_CHUNKS), strict=True):
        torch.mm(part, matrix_IO, out=product)
        works.append(dist.all_reduce(product, group=group, async_op=True))
    for work in works:
        assert work is not None
        work.wait()
    return out.view(*x.shape[:-1], -1)
