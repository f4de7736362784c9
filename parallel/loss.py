"""Cross-entropy over a vocabulary that the ranks of a group may share, without gathering its logits.

`linear_cross_entropy` is the head's product and the loss in one: logits exist for a chunk of tokens at a time, and
their gradients are formed at once, while they are there (the loss is a sum, so a later factor is a factor of the
gradients). That is three products instead of the four of recomputation, and no [N, V] tensor.
"""

# Shapes: N tokens, V vocabulary rows of this rank, D features.

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import (  # type: ignore[attr-defined]
    GroupName,
    _resolve_process_group,
)

IGNORE = -100
"""Target of a token that counts nothing."""

_CHUNK_BYTES = {"cuda": 2**30, "cpu": 2**26}
"""Of one chunk's logits in the loss's precision: enough rows to fill a GPU, little enough for a CPU's cache and RAM."""


def cross_entropy(logits: Tensor, targets: Tensor, *, group: ProcessGroup | None = None, start: int = 0) -> Tensor:
    """Return the summed cross-entropy in nats, fp32 or wider; equal on all ranks.

    `logits` [..., V] are this rank's rows [start, start + V) of the vocabulary, `targets` [...] count the whole one.
    """
    rows, wanted = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
    return _CrossEntropy.apply(rows, wanted, _sharing(group), start)  # type: ignore[no-any-return, no-untyped-call]


def linear_cross_entropy(
    x: Tensor,
    weight_VD: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    group: ProcessGroup | None = None,
    start: int = 0,
    compiled: bool = False,
) -> Tensor:
    """Return the summed cross-entropy of `x @ weight.T + bias` in nats, fp32 or wider; equal on all ranks.

    `x` [..., D] and `targets` [...] are equal on all ranks of `group`, which share the vocabulary: this one has its
    rows from `start`. The gradient of `x` is this rank's term: hand `collectives.replicate(x, group)` in, or what
    sums in backward by other means. `compiled` fuses the passes over the logits by torch.compile.
    """
    rows, wanted = x.reshape(-1, x.shape[-1]), targets.reshape(-1)
    learns = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight_VD, bias))
    sharing = _sharing(group)
    name = sharing.group_name if sharing is not None else ""
    return _fused(rows, weight_VD, wanted, bias, name, start, learns, compiled)[0]  # type: ignore[no-any-return]


@torch.library.custom_op("parallel::linear_cross_entropy", mutates_args=())
def _fused(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    group: str,
    start: int,
    learns: bool,
    compiled: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sharing = _resolve_process_group(GroupName(group)) if group else None
    wide = torch.promote_types(x.dtype, torch.float32)
    loss = x.new_zeros((), dtype=wide)
    grad_x = torch.empty_like(x) if learns else x.new_empty(0)
    grad_weight = weight.new_zeros(weight.shape if learns else 0, dtype=wide)
    grad_bias = weight.new_zeros(weight.shape[0] if learns and bias is not None else 0, dtype=wide)
    for rows in _chunks(len(x), weight.shape[0] * wide.itemsize, x.device.type):
        logits = torch.mm(x[rows], weight.t()) if bias is None else torch.addmm(bias, x[rows], weight.t())
        summed, gradient = _loss_and_gradient(logits, targets[rows], sharing, start, learns, compiled)
        loss += summed
        if gradient is not None:
            torch.mm(gradient, weight, out=grad_x[rows])
            _accumulate(grad_weight, gradient, x[rows])
            if bias is not None:
                grad_bias += gradient.sum(0, dtype=wide)
    return loss, grad_x, grad_weight, grad_bias


@_fused.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    group: str,
    start: int,
    learns: bool,
    compiled: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    grad_x = torch.empty_like(x) if learns else x.new_empty(0)
    grad_weight = weight.new_empty(weight.shape if learns else 0, dtype=wide)
    grad_bias = weight.new_empty(weight.shape[0] if learns and bias is not None else 0, dtype=wide)
    return x.new_empty((), dtype=wide), grad_x, grad_weight, grad_bias


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.dtype, ctx.has_bias = inputs[0].dtype, inputs[3] is not None
    ctx.save_for_backward(*output[1:])


def _scale_gradients(ctx: Any, factor: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    factor = factor / _unit(ctx.dtype)
    grad_x, grad_weight, grad_bias = ((grad.to(factor.dtype) * factor).to(ctx.dtype) for grad in ctx.saved_tensors)
    return grad_x, grad_weight, None, grad_bias if ctx.has_bias else None, None, None, None, None


_fused.register_autograd(_scale_gradients, setup_context=_keep_gradients)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, targets_N: Tensor, group: ProcessGroup | None, start: int) -> Tensor:
        loss, gradient = _loss_and_gradient(logits_NV, targets_N, group, start, ctx.needs_input_grad[0], False)
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        factor = grads[0] / _unit(gradient.dtype)
        return (gradient.to(factor.dtype) * factor).to(gradient.dtype), None, None, None


def _loss_and_gradient(
    logits_NV: Tensor, targets_N: Tensor, group: ProcessGroup | None, start: int, learns: bool, compiled: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the summed loss and its gradient in the logits' dtype; one small collective."""
    statistics, gradient = (_compiled(_statistics), _compiled(_gradient)) if compiled else (_statistics, _gradient)
    logsumexp_N, target_N = statistics(logits_NV, targets_N, start)
    if group is not None:
        mine = torch.stack((logsumexp_N, target_N))
        all_ranks = mine.new_empty(group.size(), *mine.shape)
        dist.all_gather_into_tensor(all_ranks.flatten(0, 1), mine, group=group)
        logsumexp_N, target_N = all_ranks[:, 0].logsumexp(0), all_ranks[:, 1].sum(0)
    losses_N = torch.where(targets_N == IGNORE, 0.0, logsumexp_N - target_N)
    return losses_N.sum(), gradient(logits_NV, targets_N, logsumexp_N, start) if learns else None


def _statistics(logits_NV: Tensor, targets_N: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """Return each token's log of the summed exponentials, and the logit of its target or 0 where that is not here."""
    wide = torch.promote_types(logits_NV.dtype, torch.float32)
    logsumexp_N = logits_NV.to(wide).logsumexp(-1)
    index_N1, here_N1 = _place(targets_N, start, logits_NV.shape[1])
    target_N = torch.where(here_N1, logits_NV.gather(1, index_N1).to(wide), 0.0)
    return logsumexp_N, target_N[:, 0]


def _gradient(logits_NV: Tensor, targets_N: Tensor, logsumexp_N: Tensor, start: int) -> Tensor:
    """Return softmax minus the target's one, zero for ignored tokens."""
    wide = logsumexp_N.dtype
    offset_N = torch.where(targets_N == IGNORE, float("inf"), logsumexp_N)
    share_NV = (logits_NV.to(wide) - offset_N[:, None]).exp_()
    index_N1, here_N1 = _place(targets_N, start, logits_NV.shape[1])
    share_NV = share_NV.scatter_add_(1, index_N1, -here_N1.to(wide))
    unit = _unit(logits_NV.dtype)
    return (share_NV if unit == 1 else share_NV * unit).to(logits_NV.dtype)


def _unit(dtype: torch.dtype) -> float:
    """Return what gradients of `dtype` are kept multiplied with: fp16 has no room for shares under 6e-8."""
    return 1024.0 if dtype == torch.float16 else 1.0


def _place(targets_N: Tensor, start: int, num_rows: int) -> tuple[Tensor, Tensor]:
    """Return each target's row here (any, where it is elsewhere), and whether it is here; [N, 1]."""
    index_N1 = targets_N[:, None] - start
    here_N1 = (index_N1 >= 0) & (index_N1 < num_rows) & (targets_N[:, None] != IGNORE)
    return index_N1.clamp(0, num_rows - 1), here_N1


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)


def _accumulate(total_VD: Tensor, gradient_NV: Tensor, x_ND: Tensor) -> None:
    """Add gradient.T @ x, in the total's precision."""
    if total_VD.dtype == gradient_NV.dtype:
        total_VD.addmm_(gradient_NV.t(), x_ND)
    elif total_VD.is_cuda:
        total_VD += torch.mm(gradient_NV.t(), x_ND, out_dtype=total_VD.dtype)
    else:
        total_VD += torch.mm(gradient_NV.t(), x_ND)


def _chunks(num_tokens: int, bytes_per_token: int, device_type: str) -> list[slice]:
    """Return slices of the tokens, of equal length but for the last, none over the device's share of memory."""
    most = max(1, _CHUNK_BYTES[device_type] // bytes_per_token)
    count = -(-num_tokens // most)
    length = -(-num_tokens // max(count, 1))
    return [slice(first, first + length) for first in range(0, num_tokens, length)] if num_tokens else []


def _sharing(group: ProcessGroup | None) -> ProcessGroup | None:
    return group if group is not None and group.size() > 1 else None
