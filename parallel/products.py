"""Products of activations with matrices, of whole batches and of parts of their sequences."""

# Shapes: B batch, t tokens, I features in, O features out.

from __future__ import annotations

import torch
from torch import Tensor


def linear(x: Tensor, matrix_IO: Tensor) -> Tensor:
    """Return x [..., I] times the matrix."""
    return torch.mm(x.reshape(-1, x.shape[-1]), matrix_IO).view(*x.shape[:-1], -1)


def outer(grad: Tensor, x: Tensor) -> Tensor:
    """Return the gradient of a matrix [O, I] from those of its products."""
    return torch.mm(grad.reshape(-1, grad.shape[-1]).t(), x.reshape(-1, x.shape[-1]))


def product_into(x_BtI: Tensor, matrix_IO: Tensor, out_BtO: Tensor) -> None:
    """Write x times the matrix into `out`; both may be parts of longer sequences."""
    if len(x_BtI) == 1:
        torch.mm(x_BtI[0], matrix_IO, out=out_BtO[0])
    elif x_BtI.is_contiguous() and out_BtO.is_contiguous():
        torch.mm(x_BtI.flatten(0, 1), matrix_IO, out=out_BtO.flatten(0, 1))
    else:
        torch.bmm(x_BtI, matrix_IO.expand(len(x_BtI), -1, -1), out=out_BtO)
