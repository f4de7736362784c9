"""Models of odd and even sizes shared over tensor ranks, and the training that is compared with one process."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.plans import plan_for
from parallel.shards import Shard, shards_of
from parallel.tensor import parallelize

IGNORE = -100


@dataclass(frozen=True, slots=True)
class How:
    """How ranks share a model."""

    sequence: bool
    overlap: bool

    num_steps: int = 2


ALL = [How(False, False), How(False, True, 10), How(True, False), How(True, True, 10)]


@dataclass(frozen=True, slots=True)
class Trained:
    """What a rank saw, and its parts of what it holds."""

    losses: list[float]
    logits: Tensor
    shards: dict[str, Shard]
    first_gradients: dict[str, Tensor]
    weights: dict[str, Tensor]


def batch(vocab: int, *, rows: int = 2, length: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, targets with some ignored, and document ids."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, vocab, (rows, length), generator=generator)
    targets = torch.randint(0, vocab, (rows, length), generator=generator)
    targets[0, 3:5] = IGNORE
    documents = (torch.arange(length) >= length // 2).long().expand(rows, length)
    return tokens, targets, documents


def train(model: nn.Module, vocab: int, shards: dict[str, Shard], num_steps: int) -> Trained:
    """Train on one batch: AdamW; the first gradients are kept."""
    tokens, targets, documents = batch(vocab)
    num_targets = int((targets != IGNORE).sum())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, eps=1e-3)
    logits, _ = model(tokens, document_ids_BT=documents)
    losses: list[float] = []
    first: dict[str, Tensor] = {}
    for _ in range(num_steps):
        loss, auxiliary = model(tokens, document_ids_BT=documents, targets_BT=targets)
        optimizer.zero_grad()
        (loss / num_targets + auxiliary).backward()
        if not losses:
            first = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        losses.append(float(loss.detach()))
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return Trained(losses, logits.detach(), shards, first, weights)


def train_shared(model: nn.Module, vocab: int, how: How) -> Trained:
    """Share a whole model over all ranks, then train it."""
    assert dist.group.WORLD is not None
    parallelize(model, plan_for(model), dist.group.WORLD, sequence=how.sequence, overlap=how.overlap)
    return train(model, vocab, shards_of(model), how.num_steps)


def assert_equal(ranks: list[Trained], one: Trained, *, rtol: float = 1e-12) -> None:
    """Compare losses, logits, gradients and weights of all ranks with those of one process, and copies bit by bit."""
    close = {"rtol": rtol, "atol": rtol}
    for rank in ranks:
        torch.testing.assert_close(torch.tensor(rank.losses), torch.tensor(one.losses), **close)
        torch.testing.assert_close(rank.logits, one.logits, **close)
        assert rank.first_gradients.keys() == one.first_gradients.keys()
        for kind in ("first_gradients", "weights"):
            for name, wanted in getattr(one, kind).items():
                whole = torch.full_like(wanted, float("nan"))
                shard = rank.shards[name]
                shard.put(getattr(rank, kind)[name], whole)
                there = ~whole.isnan()
                torch.testing.assert_close(whole[there], wanted[there], **close, msg=lambda m, n=name: f"{n}: {m}")
    for kind in ("first_gradients", "weights"):
        for name, wanted in getattr(one, kind).items():
            covered = torch.full_like(wanted, float("nan"))
            for rank in ranks:
                theirs = covered.clone()
                rank.shards[name].put(getattr(rank, kind)[name], theirs)
                both = ~theirs.isnan() & ~covered.isnan()
                assert torch.equal(theirs[both], covered[both]), f"{kind} of {name} differ between its copies"
                covered = torch.where(theirs.isnan(), covered, theirs)
            assert not covered.isnan().any(), f"no rank has all of {name}"
