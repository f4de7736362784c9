"""A small model of blocks, and what training and running it gives."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

VOCAB = 11


class Block(nn.Module):
    """Norm, two products, dropout and a residual; a buffer and a parameter that is never used."""

    scale: Tensor

    def __init__(self, dim: int, *, recompute: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.widen = nn.Linear(dim, 2 * dim)
        self.narrow = nn.Linear(2 * dim, dim, bias=False)
        self.unused = nn.Parameter(torch.ones(3))
        self.register_buffer("scale", torch.full((), 0.5))
        self.recompute = recompute

    def forward(self, x: Tensor, *, weight: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        out = checkpoint(self._run, x, use_reentrant=False) if self.recompute else self._run(x)
        return out * weight, {"norm": out.detach().norm()}

    def _run(self, x: Tensor) -> Tensor:
        hidden = F.dropout(F.gelu(self.widen(self.norm(x))), 0.1, self.training)
        out: Tensor = x + self.narrow(hidden) * self.scale
        return out


class Model(nn.Module):
    """Blocks between an embedding and a head that is tied to it."""

    def __init__(self, *, num_blocks: int = 5, dim: int = 16, recompute: str = "none") -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, dim)
        self.blocks = nn.ModuleList(Block(dim, recompute=recompute == "inside") for _ in range(num_blocks))
        self.recompute = recompute

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        weight = torch.ones((), dtype=x.dtype, device=x.device)
        for block in self.blocks:
            if self.recompute == "outside" and torch.is_grad_enabled():
                x, _ = checkpoint(block, x, weight=weight, use_reentrant=False)
            else:
                x, _ = block(x, weight=weight)
        return F.linear(x, self.embedding.weight)


def pair(*, dtype: torch.dtype = torch.float64, recompute: str = "none") -> tuple[Model, Model]:
    """Return a model and a copy of it."""
    torch.manual_seed(0)
    model = Model(recompute=recompute).to(dtype)
    return model, copy.deepcopy(model)


def train(model: Model, *, steps: int = 3, device: str = "cpu") -> list[float]:
    """Return the losses of steps of two micro-batches each, with clipping, and what evaluation gives between them."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2, foreach=False)
    torch.manual_seed(1)
    generator = torch.Generator().manual_seed(3)
    told = []
    for _ in range(steps):
        for _ in range(2):
            tokens = torch.randint(0, VOCAB, (4, 8), generator=generator).to(device)
            loss = F.cross_entropy(model(tokens).view(-1, VOCAB).double(), tokens.view(-1))
            loss.backward()  # type: ignore[no-untyped-call]
            told.append(loss.item())
        told.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            told.append(model(tokens).sum().item())
        model.train()
    return told


def differing(one: nn.Module, other: nn.Module) -> list[str]:
    """Return the names of tensors that are not equal to the bit."""
    theirs = other.state_dict()
    return [name for name, tensor in one.state_dict().items() if not torch.equal(tensor.cpu(), theirs[name].cpu())]
