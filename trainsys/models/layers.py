"""The layers a block is made of, except attention and experts."""

# Shapes: B batch, T tokens, D model width, F feed-forward width.

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Linear(nn.Linear):
    """A product with one matrix, or with several stacked by rows, without bias.

    `row_splits` are the heights of the logical matrices (the query, key and value projections, say): one
    product is faster than three, and an optimizer that looks at whole matrices still tells them apart.
    The weights are unset until `initialise` fills them.
    """

    def __init__(self, in_features: int, *row_splits: int) -> None:
        super().__init__(in_features, sum(row_splits), bias=False)
        self.row_splits = row_splits

    def reset_parameters(self) -> None:
        """Leaves the weight unset."""


class Embedding(nn.Embedding):
    """Rows of vectors, unset until `initialise` fills them."""

    def reset_parameters(self) -> None:
        """Leaves the rows unset."""


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with a gain, computed in at least fp32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Normalises the last dimension."""
        return functional.rms_norm(x_BTD, self.weight.shape, self.weight, self.eps)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), gate and up in one product."""

    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.gate_up = Linear(dim, ffn_dim, ffn_dim)
        self.down = Linear(ffn_dim, dim)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Maps each token by itself."""
        gate_BTF, up_BTF = self.gate_up(x_BTD).chunk(2, dim=-1)
        return self.down(functional.silu(gate_BTF) * up_BTF)  # type: ignore[no-any-return]
