"""The layers a block is made of, except attention and experts."""

# Shapes: B batch, T tokens, D model width, F feed-forward width.

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from parallel.loss import linear_cross_entropy


class Linear(nn.Linear):
    """A product with one matrix, or with several stacked by rows, without bias.

    `row_splits` are the heights of the logical matrices (the query, key and value projections, say): one
    product is faster than three, and an optimizer that looks at whole matrices still tells them apart.
    The weights are unset until `initialise` fills them.
    """

    def __init__(self, in_features: int, *row_splits: int) -> None:
        super().__init__(in_features, sum(row_splits), bias=False)
        self.row_splits = {"weight": row_splits}

    def reset_parameters(self) -> None:
        """Leaves the weight unset."""


class Head(nn.Linear):
    """The product with the vocabulary, or the loss of its logits without keeping them."""

    compiled = False
    """Whether the passes over the logits are fused by torch.compile."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        """Leaves the weight unset."""

    def forward(self, input: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits [B, T, V]; with targets [B, T] their summed cross-entropy in nats, at least fp32."""
        if targets is None:
            return functional.linear(input, self.weight, self.bias)
        return linear_cross_entropy(input, self.weight, targets, bias=self.bias, compiled=self.compiled)


class Embedding(nn.Embedding):
    """Rows of vectors, unset until `initialise` fills them."""

    def reset_parameters(self) -> None:
        """Leaves the rows unset."""


class _NormaliseOnCPU(torch.autograd.Function):
    """x / rms(x) * gain that keeps only its input for backward.

    torch composes this of small operations on a CPU: it keeps their results, fp32 copies in bf16 among them, and
    takes more passes over them (`trainsys.bench.decoder`).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, gain)
        ctx.eps = eps
        return functional.rms_norm(x, gain.shape, gain, eps)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        x, gain = ctx.saved_tensors
        dtype = torch.promote_types(x.dtype, torch.float32)
        wide, grad = x.to(dtype), grad_outputs[0].to(dtype)
        inverse_rms = torch.linalg.vecdot(wide, wide).div_(x.shape[-1]).add_(ctx.eps).rsqrt_()[..., None]
        unit = wide * inverse_rms
        grad_gain = (grad * unit).flatten(0, -2).sum(0)
        grad = grad * gain.to(dtype)
        along = torch.linalg.vecdot(grad, unit).div_(x.shape[-1])[..., None]
        return (
            grad.addcmul_(unit, along, value=-1).mul_(inverse_rms).to(x.dtype),
            grad_gain.to(gain.dtype),
            None,
        )


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with a gain, computed in at least fp32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Normalises the last dimension."""
        if x_BTD.device.type == "cpu":
            normed_BTD: Tensor = _NormaliseOnCPU.apply(x_BTD, self.weight, self.eps)  # type: ignore[no-untyped-call]
            return normed_BTD
        return functional.rms_norm(x_BTD, self.weight.shape, self.weight, self.eps)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, the two being the halves of the last dimension."""
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), gate and up in one product."""

    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.gate_up = Linear(dim, ffn_dim, ffn_dim)
        self.down = Linear(ffn_dim, dim)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Maps each token by itself."""
        return self.down(swiglu(self.gate_up(x_BTD)))  # type: ignore[no-any-return]
