"""A decoder-only transformer, plain torch, every block recomputed in backward."""

# Shapes: B batch, W tokens, D width, V vocabulary.

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of the model."""

    layers: int
    width: int
    heads: int
    vocabulary: int

    @property
    def num_parameters(self) -> int:
        """About how many there are: matrices of blocks, and the embedding."""
        return 12 * self.layers * self.width**2 + self.vocabulary * self.width


class Block(nn.Module):
    """Attention and a feed-forward part, each after a norm and added to its input."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = shape.width
        self.heads = shape.heads
        self.attention_norm, self.forward_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x_BWD: Tensor) -> Tensor:
        """Return the block's output."""
        batch, length, width = x_BWD.shape
        parts = self.query_key_value(self.attention_norm(x_BWD)).view(batch, length, 3, self.heads, -1)
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind()
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x_BWD = x_BWD + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        widened: Tensor = self.down(functional.gelu(self.up(self.forward_norm(x_BWD))))
        return x_BWD + widened


class Transformer(nn.Module):
    """Returns the mean loss of predicting every next token."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.vocabulary, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)

    def forward(self, tokens_BW: Tensor) -> Tensor:
        """Return the loss."""
        x_BWD = self.embedding(tokens_BW)
        for block in self.blocks:
            x_BWD = checkpoint(block, x_BWD, use_reentrant=False)
        logits_BWV = self.head(self.norm(x_BWD))
        wide, targets = logits_BWV[:, :-1].flatten(0, 1).float(), tokens_BW[:, 1:].flatten()
        return functional.cross_entropy(wide, targets)


def build(shape: Shape, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Transformer:
    """Return the model with the same weights at every call."""
    torch.manual_seed(seed)
    with torch.device(device):
        model = Transformer(shape).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.02 if "embedding" in name else parameter.shape[1] ** -0.5)
    return model
