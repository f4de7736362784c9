"""Data parallelism by torch alone against one process: gradients, updates, and what ranks keep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from parallel.config import ParallelConfig
from parallel.data import DataParallel, Replicated
from parallel.groups import MeshGroups
from parallel.mesh import Mesh
from parallel.zero import FullySharded
from tests.ranks import run_ranks

WIDTH, ROWS, STEPS, MICROS, CLASSES = 7, 12, 10, 2, 5  # odd sizes, which no number of ranks divides
IGNORE = -100


class Net(nn.Module):
    """Blocks of odd sizes, a tied matrix at both ends, and a parameter of one element."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.embedding = nn.Embedding(CLASSES, WIDTH, dtype=dtype)
        self.blocks = nn.ModuleList(Block(dtype) for _ in range(3))
        self.scale = nn.Parameter(torch.ones(1, dtype=dtype))
        self.head = nn.Linear(WIDTH, CLASSES, bias=False, dtype=dtype)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x * self.scale)  # type: ignore[no-any-return]


class Block(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 11, dtype=dtype)
        self.down = nn.Linear(11, WIDTH, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))  # type: ignore[no-any-return]


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Tokens and targets of everybody; rows have different numbers of targets."""
    random = torch.Generator().manual_seed(step)
    tokens, targets = torch.randint(CLASSES, (2, ROWS, 9), generator=random)
    for row in range(ROWS):
        targets[row, : (row * 5 + step) % 9] = IGNORE
    return tokens, targets


def loss_of(model: nn.Module, tokens: Tensor, targets: Tensor, total: int) -> Tensor:
    logits = model(tokens).flatten(0, 1)
    wide = torch.promote_types(logits.dtype, torch.float32)
    return functional.cross_entropy(logits.to(wide), targets.flatten(), ignore_index=IGNORE, reduction="sum") / total


@dataclass(frozen=True)
class Case:
    """One way to run the job."""

    kind: Literal["replicate", "shard"]
    degrees: ParallelConfig
    stage: Literal[2, 3] = 3
    overlap: bool = True
    in_pipeline: bool = False
    bucket_numel: int = 100
    compute_dtype: torch.dtype | None = None


@dataclass
class Run:
    """What a job did."""

    losses: list[float]
    gradients: dict[str, Tensor]
    """Of the last step."""
    weights: dict[str, Tensor]
    """After all steps."""


def alone(dtype: torch.dtype = torch.float64) -> Run:
    """One process, whole batches."""
    model = Net(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-6)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        tokens, targets = batch(step)
        loss = loss_of(model, tokens, targets, int((targets != IGNORE).sum()))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return Run(losses, gradients, {name: p.detach() for name, p in model.named_parameters()})


def make(case: Case, model: Net, groups: MeshGroups) -> DataParallel:
    if case.kind == "replicate":
        wide = torch.float32 if case.compute_dtype else None
        return Replicated([model], groups, master_dtype=wide, bucket_numel=case.bucket_numel, overlap=case.overlap)
    return FullySharded(
        [model],
        list(model.blocks),
        groups,
        stage=case.stage,
        compute_dtype=case.compute_dtype,
        in_pipeline=case.in_pipeline,
        overlap=case.overlap,
    )


def train(case: Case, rank: int, world_size: int) -> tuple[list[float], dict[str, tuple[int, Tensor, Tensor]]]:
    """Return the losses, and by name the place, last gradient and final value of what this rank keeps."""
    mesh = Mesh(case.degrees, world_size)
    masters_dtype = torch.float32 if case.compute_dtype else torch.float64
    model = Net(case.compute_dtype if case.kind == "replicate" and case.compute_dtype else masters_dtype)
    losses = []
    with MeshGroups(mesh) as groups:
        data = make(case, model, groups)
        optimizer = torch.optim.AdamW([master.tensor for master in data.masters], lr=1e-2, eps=1e-6)
        kept: dict[str, tuple[int, Tensor, Tensor]] = {}
        for step in range(STEPS):
            tokens, targets = batch(step)
            total = int((targets != IGNORE).sum())
            summed = torch.zeros((), dtype=torch.float64)
            data.begin(MICROS)
            for micro in range(MICROS):
                if not case.in_pipeline:
                    data.micro_batch(micro == MICROS - 1)
                at = slice(rank * MICROS + micro, None, world_size * MICROS)
                loss = loss_of(model, tokens[at], targets[at], total)
                loss.backward()  # type: ignore[no-untyped-call]
                summed += loss.detach()
            data.finish()
            dist.all_reduce(summed)
            losses.append(summed.item())
            optimizer.step()
            kept = {}
            for master in data.masters:
                assert master.tensor.grad is not None
                kept[master.name] = master.start, master.tensor.grad.clone(), master.tensor.detach().clone()
            data.refresh()
        data.close()
    return losses, kept


def runs(rank: int, world_size: int, cases: list[Case]) -> list[Any]:
    return [train(case, rank, world_size) for case in cases]


def whole(reports: list[Any], like: Run) -> Run:
    """Put the parts of all ranks together; parts of the same place must be equal to the bit."""
    gradients = {name: torch.full_like(value, torch.nan).flatten() for name, value in like.weights.items()}
    weights = {name: torch.full_like(value, torch.nan).flatten() for name, value in like.weights.items()}
    for _, kept in reports:
        assert kept.keys() == like.weights.keys()
        for name, (start, gradient, value) in kept.items():
            for into, part in ((gradients[name], gradient), (weights[name], value)):
                there = into[start : start + part.numel()]
                assert ((there == part) | there.isnan()).all(), f"{name} differs between replicas"
                there.copy_(part)
    assert all(losses == reports[0][0] for losses, _ in reports)
    shaped = [{n: v.view(like.weights[n].shape) for n, v in found.items()} for found in (gradients, weights)]
    return Run(reports[0][0], *shaped)


def assert_equal(found: Run, expected: Run, *, rtol: float = 1e-12) -> None:
    torch.testing.assert_close(found.losses, expected.losses, rtol=rtol, atol=0)
    for mine, theirs in ((found.gradients, expected.gradients), (found.weights, expected.weights)):
        for name, value in theirs.items():
            # Elements that are sums of cancelling terms carry the rounding of the largest of these.
            torch.testing.assert_close(mine[name], value, rtol=rtol, atol=rtol * float(value.abs().max()), msg=name)


def check(world_size: int, cases: list[Case]) -> list[Run]:
    expected = alone()
    reports = run_ranks(runs, world_size, cases, timeout_s=120)
    found = [whole([report[index] for report in reports], expected) for index in range(len(cases))]
    for run in found:
        assert_equal(run, expected)
    return found


TWO = ParallelConfig(replicate=2)
SHARDS = ParallelConfig(shard=2)


def test_two_ranks_take_the_steps_of_one() -> None:
    found = check(
        2,
        [
            Case("replicate", TWO),
            Case("replicate", TWO, overlap=False),
            Case("shard", SHARDS, stage=3),
            Case("shard", SHARDS, stage=2),
            Case("shard", TWO, stage=3, overlap=False),
            Case("shard", SHARDS, in_pipeline=True),
            Case("replicate", ParallelConfig(context=2), bucket_numel=1),
            Case("shard", ParallelConfig(context=2)),
        ],
    )
    for name, value in found[0].weights.items():
        assert torch.equal(value, found[1].weights[name]), "overlap changes no bit"
    assert found[0].losses == found[1].losses
