"""Log-probabilities of chosen tokens from features and the head's matrix, without keeping any logits.

Plain autograd keeps three [N, V] tensors for them (logits, their softmax, its gradient). Here logits exist for a chunk
of tokens at a time, and backward computes them again: one more product with the head, and N numbers kept.
"""

# Shapes: N tokens, V vocabulary rows, D features.

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_CHUNK_BYTES = {"cuda": 2**29, "cpu": 2**25}
"""Of one chunk's logits in the precision of the loss."""


def chosen_log_probs(x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the log-probability [N] of `targets_N` under softmax(x @ weight.T / temperature), fp32 or wider.

    Differentiable in `x_ND` and `weight_VD`.
    """
    result: Tensor = _Chosen.apply(x_ND, weight_VD, targets_N, temperature)  # type: ignore[no-untyped-call]
    return result


def log_probs_of_logits(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the log-probability [...] of `targets` under softmax(logits [..., V] / temperature), fp32 or wider."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    return wide.gather(-1, targets[..., None])[..., 0] - wide.logsumexp(-1)


class _Chosen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, temperature: float) -> Tensor:
        wide = torch.promote_types(x_ND.dtype, torch.float32)
        chosen_N, normalisers_N = (x_ND.new_empty(len(x_ND), dtype=wide) for _ in range(2))
        for rows in _chunks(len(x_ND), weight_VD.shape[0] * wide.itemsize, x_ND.device.type):
            logits = _logits(x_ND[rows], weight_VD, temperature, wide)
            normalisers_N[rows] = logits.logsumexp(-1)
            chosen_N[rows] = logits.gather(1, targets_N[rows, None])[:, 0] - normalisers_N[rows]
        ctx.save_for_backward(x_ND, weight_VD, targets_N, normalisers_N)
        ctx.temperature = temperature
        return chosen_N

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x_ND, weight_VD, targets_N, normalisers_N = ctx.saved_tensors
        (grad_N,) = grad_outputs
        wide = normalisers_N.dtype
        grad_x, grad_weight = torch.empty_like(x_ND), torch.zeros_like(weight_VD, dtype=wide)
        for rows in _chunks(len(x_ND), weight_VD.shape[0] * wide.itemsize, x_ND.device.type):
            logits = _logits(x_ND[rows], weight_VD, ctx.temperature, wide)
            factor = grad_N[rows, None] / ctx.temperature
            slope = logits.sub_(normalisers_N[rows, None]).exp_().mul_(-factor)
            slope.scatter_add_(1, targets_N[rows, None], factor)
            slope = slope.to(x_ND.dtype)
            torch.mm(slope, weight_VD, out=grad_x[rows])
            grad_weight += slope.t() @ x_ND[rows]
        return grad_x, grad_weight.to(weight_VD.dtype), None, None


def _logits(x_ND: Tensor, weight_VD: Tensor, temperature: float, wide: torch.dtype) -> Tensor:
    logits = torch.mm(x_ND, weight_VD.t()).to(wide)
    return logits if temperature == 1 else logits / temperature


def _chunks(num_rows: int, row_bytes: int, device: str) -> Iterator[slice]:
    size = max(1, _CHUNK_BYTES.get(device, 2**25) // row_bytes)
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))
