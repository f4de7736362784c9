"""A decoder of blocks for benchmarks: large products and attention, random weights, nothing else."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


class Block(nn.Module):
    """Attention and a feed-forward of four times the width, behind norms; 12 dim^2 parameters."""

    def __init__(self, dim: int, head_dim: int, *, recompute: bool) -> None:
        super().__init__()
        self.head_dim, self.recompute = head_dim, recompute
        self.norm_a, self.norm_b = nn.LayerNorm(dim, bias=False), nn.LayerNorm(dim, bias=False)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.up = nn.Linear(dim, 4 * dim, bias=False)
        self.down = nn.Linear(4 * dim, dim, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return the residual stream behind the block."""
        if self.recompute and torch.is_grad_enabled():
            computed: Tensor = checkpoint(self._run, x_BTD, use_reentrant=False)
            return computed
        return self._run(x_BTD)

    def _run(self, x_BTD: Tensor) -> Tensor:
        batch, length, dim = x_BTD.shape
        qkv = self.qkv(self.norm_a(x_BTD)).view(batch, length, 3, dim // self.head_dim, self.head_dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x_BTD = x_BTD + self.out(attended.transpose(1, 2).reshape(batch, length, dim))
        hidden: Tensor = self.down(F.gelu(self.up(self.norm_b(x_BTD)), approximate="tanh"))
        return x_BTD + hidden


class Decoder(nn.Module):
    """Blocks between an embedding and a head; forward returns the mean loss, or the last hidden states."""

    def __init__(self, *, num_layers: int, dim: int, head_dim: int, vocab: int, recompute: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, dim)
        self.blocks = nn.ModuleList(Block(dim, head_dim, recompute=recompute) for _ in range(num_layers))
        self.norm = nn.LayerNorm(dim, bias=False)
        self.head = nn.Linear(dim, vocab, bias=False)

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor | None = None) -> Tensor:
        """Return the mean loss with targets, else the hidden states."""
        x_BTD = self.embedding(tokens_BT)
        for block in self.blocks:
            x_BTD = block(x_BTD)
        x_BTD = self.norm(x_BTD)
        if targets_BT is None:
            return x_BTD  # type: ignore[no-any-return]
        return F.cross_entropy(self.head(x_BTD).flatten(0, 1).float(), targets_BT.flatten())


def build(
    *, num_layers: int, dim: int, vocab: int, device: torch.device, recompute: bool = True, head_dim: int = 128
) -> Decoder:
    """Return a decoder in bf16 on the CPU with weights drawn on `device`, a block at a time."""
    with torch.device("meta"):
        model = Decoder(num_layers=num_layers, dim=dim, head_dim=head_dim, vocab=vocab, recompute=recompute)
    model = model.bfloat16()
    torch.manual_seed(0)
    for module in [*model.blocks, model.embedding, model.norm, model.head]:
        module.to_empty(device=device)
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.ndim == 1:
                    parameter.fill_(1.0)
                else:
                    parameter.normal_(std=1 / math.sqrt(parameter.shape[-1]) / 4)
        module.to("cpu")
    return model


def batch(*, rows: int, length: int, vocab: int, device: torch.device, seed: int) -> tuple[Tensor, Tensor]:
    """Return random tokens and targets."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocab, (rows, length + 1), generator=generator).to(device)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
