"""Collectives that autograd differentiates: what a region of a model does with its ranks, and the reverse in backward.

Every pair below is exact: what one sums in forward the other leaves alone in backward. A group of one rank is no
communication at all. All ranks of the group must call, in the same order, with the same shapes unless said otherwise.

    function       forward                    backward
    replicate      nothing                    sums the gradients of all ranks
    sum_ranks      sums                       nothing
    split          takes this rank's part     gathers
    gather         gathers                    takes this rank's part (every rank goes on alike)
    exchange       all-to-all                 all-to-all back

What gathers or shares out a sequence, and what sums or gathers in backward then, is in `parallel.overlap`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

# torch 2.13 warns of the names that these have in 2.11.
all_gather_single = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
reduce_scatter_single = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def replicate(x: Tensor, group: ProcessGroup) -> Tensor:
    """Return `x`, which is equal on all ranks and used by each for a part of the work: gradients are summed."""
    return x if group.size() == 1 else _Replicate.apply(x, group)  # type: ignore[no-untyped-call]


def sum_ranks(x: Tensor, group: ProcessGroup) -> Tensor:
    """Return the sum of all ranks' `x`, which every rank uses alike."""
    return x if group.size() == 1 else _SumRanks.apply(x, group)  # type: ignore[no-untyped-call]


def split(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """Return this rank's part of `x` along `dim`, which the number of ranks must divide; `x` is equal on all ranks."""
    return x if group.size() == 1 else _Split.apply(x, dim, group)  # type: ignore[no-untyped-call]


def gather(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """Return the parts of all ranks side by side along `dim`; what follows is computed alike on every rank."""
    return x if group.size() == 1 else _Gather.apply(x, dim, group)  # type: ignore[no-untyped-call]


def exchange(
    x: Tensor, group: ProcessGroup, send: Sequence[int] | None = None, receive: Sequence[int] | None = None
) -> Tensor:
    """Return what all ranks sent to this one, by rank, along dimension 0.

    `send[r]` rows of `x` go to rank r, `receive[r]` come from it; without both the rows are shared evenly.

    Raises: ValueError if the numbers of rows do not add up on this rank; then other ranks wait for it in vain.
    """
    if send is None and receive is None:
        check_divides(x.shape[0], group)
    elif send is None or receive is None or len(send) != group.size() or len(receive) != group.size():
        raise ValueError(f"parallel: an exchange needs rows to send and receive for each of {group.size()} ranks")
    elif sum(send) != x.shape[0]:
        raise ValueError(f"parallel: {sum(send)} rows are to be sent of {x.shape[0]}")
    if group.size() == 1:
        return x
    return _Exchange.apply(x, group, send, receive)  # type: ignore[no-any-return, no-untyped-call]


def all_gather(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """Return the parts of all ranks side by side along `dim`, outside of autograd."""
    first = x.movedim(dim, 0).contiguous()
    out = first.new_empty(group.size() * first.shape[0], *first.shape[1:])
    all_gather_single(out, first, group=group)
    return out if dim in (0, -out.ndim) else out.movedim(0, dim)  # no view where none is needed


def own_part(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """Return this rank's part of `x` along `dim`, a view."""
    check_divides(x.shape[dim], group)
    size = x.shape[dim] // group.size()
    return x.narrow(dim, group.rank() * size, size)


def check_divides(size: int, group: ProcessGroup) -> None:
    """Raise ValueError unless the group's ranks can share `size` evenly."""
    if size % group.size():
        raise ValueError(f"parallel: {group.size()} ranks cannot share a dimension of {size} evenly; pad it")


class _Replicate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _summed(grads[0], ctx.group), None


class _SumRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        return _summed(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return own_part(x, dim, group).contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return all_gather(grads[0], ctx.dim, ctx.group), None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return all_gather(x, dim, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return own_part(grads[0], ctx.dim, ctx.group).contiguous(), None, None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, group: ProcessGroup, send: Sequence[int] | None, receive: Sequence[int] | None
    ) -> Tensor:
        ctx.group, ctx.send, ctx.receive = group, send, receive
        return _all_to_all(x, group, send, receive)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _all_to_all(grads[0], ctx.group, ctx.receive, ctx.send), None, None, None


def _all_to_all(x: Tensor, group: ProcessGroup, send: Sequence[int] | None, receive: Sequence[int] | None) -> Tensor:
    x = x.contiguous()
    out = x.new_empty(x.shape[0] if receive is None else sum(receive), *x.shape[1:])
    dist.all_to_all_single(
        out,
        x,
        output_split_sizes=None if receive is None else list(receive),
        input_split_sizes=None if send is None else list(send),
        group=group,
    )
    return out


def _summed(x: Tensor, group: ProcessGroup) -> Tensor:
    out = x.contiguous().clone()
    dist.all_reduce(out, group=group)
    return out
