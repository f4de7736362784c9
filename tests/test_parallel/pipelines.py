"""A small model as a whole and as pipeline stages, and the reference of both: one process, float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

VOCAB, WIDTH, TOKENS, ROWS = 11, 6, 5, 2
Inputs = Mapping[str, Tensor | None]


class Block(nn.Module):
    """A gain, two products with biases, an auxiliary loss of its own."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.up(x * self.gain + shift[..., None])
        return x + self.down(torch.tanh(hidden)), (hidden**2).mean()


class Stage(nn.Module):
    """Layers `first` to `end` of the model, named as in the whole model."""

    def __init__(self, first: int, end: int, num_layers: int, *, recompute: bool = False) -> None:
        super().__init__()
        self.recompute = recompute
        self.embedding = nn.Embedding(VOCAB, WIDTH) if first == 0 else None
        self.blocks = nn.ModuleDict({str(layer): Block() for layer in range(first, end)})
        self.head = nn.Linear(WIDTH, VOCAB, bias=False) if end == num_layers else None

    def forward(
        self,
        x: Tensor,
        aux: Tensor | None,
        *,
        positions_BT: Tensor,
        targets_BT: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        if self.embedding is not None:
            x = self.embedding(x)
        if aux is None:
            aux = x.new_zeros(())
        for block in self.blocks.values():
            if self.recompute:
                x, more = checkpoint(block, x, positions_BT, use_reentrant=False)
            else:
                x, more = block(x, positions_BT)
            aux = aux + more
        if self.head is None:
            return x, aux
        logits = self.head(x)
        if targets_BT is None:
            return logits, aux
        loss = functional.cross_entropy(logits.flatten(0, 1), targets_BT.flatten(), ignore_index=-100, reduction="sum")
        return loss, aux


@dataclass(frozen=True, kw_only=True)
class Case:
    """One way to train."""

    num_layers: int = 4
    sizes: tuple[int, ...] = ()
    recompute: bool = False
    tied: bool = False
    num_micro_batches: int = 8
    steps: int = 3
    overlap: bool = True


def whole(case: Case) -> Stage:
    """The model in one process with its initial weights, float64."""
    model = Stage(0, case.num_layers, case.num_layers, recompute=case.recompute).double()
    fill(model)
    if case.tied:
        assert model.head is not None
        assert model.embedding is not None
        model.head.weight = model.embedding.weight
    return model


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Give every parameter the values that belong to its name; the head's are the embedding's."""
    for name, parameter in model.named_parameters():
        seed = sum(map(ord, name.replace("head", "embedding")))
        parameter.copy_(
            torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) / 2
        )


def batches(case: Case, step: int) -> list[dict[str, Tensor | None]]:
    """Micro-batches with different numbers of targets."""
    generator = torch.Generator().manual_seed(step)
    found: list[dict[str, Tensor | None]] = []
    for i in range(case.num_micro_batches):
        tokens = torch.randint(VOCAB, (ROWS, TOKENS), generator=generator)
        targets = torch.randint(VOCAB, (ROWS, TOKENS), generator=generator)
        targets[0, : i % TOKENS] = -100
        positions = torch.rand(ROWS, TOKENS, generator=generator, dtype=torch.float64)
        found.append({"tokens_BT": tokens, "targets_BT": targets, "positions_BT": positions})
    return found


def weights_of(micro_batches: Sequence[Inputs]) -> tuple[float, float]:
    """Factors of loss and auxiliary loss of each micro-batch."""
    targets = [batch["targets_BT"] for batch in micro_batches]
    total = sum(int((target != -100).sum()) for target in targets if target is not None)
    return 1 / total, 0.1 / len(micro_batches)
