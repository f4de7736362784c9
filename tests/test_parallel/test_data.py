"""Data parallelism by torch alone against one process: gradients, updates, and what ranks keep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor, nn
from torch.nn import functional

from parallel.config import ParallelConfig
from parallel.data import DataParallel, Replicated
from parallel.groups import MeshGroups
from parallel.mesh import Mesh
from parallel.shards import Shard, even_dim, tag, whole_dim
from parallel.zero import FullySharded
from tests.ranks import RankFailed, run_ranks

WIDTH, STEPS, MICROS, CLASSES = 7, 10, 2, 5  # odd sizes, which no number of ranks divides
IGNORE = -100


class Net(nn.Module):
    """Blocks of odd sizes, a tied matrix at both ends, and a parameter of one element."""

    def __init__(self, num_experts: int = 0) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.embedding = nn.Embedding(CLASSES, WIDTH)
        self.blocks = nn.ModuleList(Block(num_experts) for _ in range(3))
        self.scale = nn.Parameter(torch.ones(1))
        self.head = nn.Linear(WIDTH, CLASSES, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x * self.scale)  # type: ignore[no-any-return]


class Block(nn.Module):
    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 11)
        self.experts = Experts(num_experts) if num_experts else None
        self.down = nn.Linear(11, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.up(x))
        if self.experts is not None:
            hidden = hidden + self.experts(hidden)
        return x + self.down(hidden)  # type: ignore[no-any-return]


class Experts(nn.Module):
    """A matrix each; the expert of a token is told by the signs of its hidden values."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.first = 0
        self.group: dist.ProcessGroup | None = None
        self.weight = nn.Parameter(torch.randn(num_experts, 11, 11) / 4)

    def spread(self, groups: MeshGroups) -> None:
        """Keep this rank's experts; the tokens of all ranks of the expert group visit them."""
        self.group = groups.get("expert")
        dim = even_dim(self.num_experts, self.group.rank(), self.group.size())
        shard = Shard((dim, whole_dim(11), whole_dim(11)), ("expert",))
        self.first = dim.runs[0].start
        self.weight = tag(nn.Parameter(shard.take(self.weight.detach())), shard)

    def forward(self, x: Tensor) -> Tensor:
        everybody = x if self.group is None else funcol.all_gather_tensor_autograd(x, 0, self.group)
        expert = (everybody.detach() > 0).sum(-1) % self.num_experts
        parts = [
            (expert == self.first + index)[..., None] * (everybody @ weight)
            for index, weight in enumerate(self.weight.unbind())
        ]
        mixed = torch.stack(parts).sum(0)
        return mixed if self.group is None else funcol.reduce_scatter_tensor_autograd(mixed, "sum", 0, self.group)


def batch(step: int, num_experts: int) -> tuple[Tensor, Tensor]:
    """Tokens and targets of everybody; rows have different numbers of targets, and ranks of rows if no experts."""
    rows = 16 if num_experts else 12
    random = torch.Generator().manual_seed(step)
    tokens, targets = torch.randint(CLASSES, (2, rows, 9), generator=random)
    for row in range(rows):
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
    num_experts: int = 0
    is_compiled: bool = False


@dataclass
class Run:
    """What a job did."""

    losses: list[float]
    gradients: dict[str, Tensor]
    """Of the last step."""
    weights: dict[str, Tensor]
    """After all steps."""


def alone(num_experts: int) -> Run:
    """One process, whole batches."""
    model = Net(num_experts).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-6)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        tokens, targets = batch(step, num_experts)
        loss = loss_of(model, tokens, targets, int((targets != IGNORE).sum()))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return Run(losses, gradients, {name: p.detach() for name, p in model.named_parameters()})


def make(case: Case, model: Net, groups: MeshGroups) -> DataParallel:
    stages = [model] if case.in_pipeline else []
    if case.kind == "replicate":
        wide = torch.float32 if case.compute_dtype else None
        return Replicated(
            model, groups, stages=stages, master_dtype=wide, bucket_numel=case.bucket_numel, overlap=case.overlap
        )
    return FullySharded(
        model,
        list(model.blocks),
        groups,
        zero_stage=case.stage,
        stages=stages,
        compute_dtype=case.compute_dtype,
        overlap=case.overlap,
    )


Kept = dict[str, tuple[Shard, int, Tensor, Tensor]]
"""By name: which part of the whole the local tensor is, first element of it, gradient, value."""


def train(case: Case, rank: int, world_size: int) -> tuple[list[float], Kept]:
    """Return the losses, and what this rank keeps of the last gradient and the final weights."""
    mesh = Mesh(case.degrees, world_size)
    wide = torch.float32 if case.compute_dtype else torch.float64
    losses = []
    with MeshGroups(mesh) as groups:
        narrow = case.compute_dtype if case.kind == "replicate" else None
        model = Net(case.num_experts).to(narrow or wide)
        for experts in (module for module in model.modules() if isinstance(module, Experts)):
            experts.spread(groups)
        if case.is_compiled:
            for block in model.blocks:
                block.compile(backend="aot_eager")  # all but the generation of code
        data = make(case, model, groups)
        optimizer = torch.optim.AdamW([master.tensor for master in data.masters], lr=1e-2, eps=1e-6)
        kept: Kept = {}
        for step in range(STEPS):
            tokens, targets = batch(step, case.num_experts)
            total = int((targets != IGNORE).sum())
            summed = torch.zeros((), dtype=torch.float64)
            data.begin()
            for micro in range(MICROS):
                if not case.in_pipeline:
                    data.micro_batch(micro == MICROS - 1)
                at = slice(rank * MICROS + micro, None, world_size * MICROS)
                loss = loss_of(model, tokens[at], targets[at], total)
                loss.backward()  # type: ignore[no-untyped-call]
                summed += loss.detach()
            if case.in_pipeline:
                data.stage_finished(0)
            data.finish()
            dist.all_reduce(summed)
            losses.append(summed.item())
            optimizer.step()
            for master in data.masters:
                gradient = master.tensor.grad
                assert gradient is not None
                kept[master.name] = master.shard, master.start, gradient.clone(), master.tensor.detach().clone()
            data.refresh()
        data.close()
    return losses, kept


def runs(rank: int, world_size: int, cases: list[Case]) -> list[Any]:
    return [train(case, rank, world_size) for case in cases]


def whole_run(reports: list[tuple[list[float], Kept]], like: Run) -> Run:
    """Put the parts of all ranks together; parts of the same place must be equal to the bit."""
    gradients = {name: torch.full_like(value, torch.nan).flatten() for name, value in like.weights.items()}
    weights = {name: torch.full_like(value, torch.nan).flatten() for name, value in like.weights.items()}
    for losses, kept in reports:
        assert losses == reports[0][0]
        assert kept.keys() == like.weights.keys()
        for name, (shard, start, gradient, value) in kept.items():
            places = shard.take(torch.arange(like.weights[name].numel()).view(shard.global_shape)).flatten()
            places = places[start : start + value.numel()]
            for into, part in ((gradients[name], gradient), (weights[name], value)):
                assert ((into[places] == part) | into[places].isnan()).all(), f"{name} differs between replicas"
                into[places] = part.to(into.dtype)
    shaped = [{n: v.view(like.weights[n].shape) for n, v in found.items()} for found in (gradients, weights)]
    return Run(reports[0][0], *shaped)


def assert_equal(found: Run, expected: Run, *, rtol: float = 1e-12) -> None:
    torch.testing.assert_close(found.losses, expected.losses, rtol=rtol, atol=0)
    for mine, theirs in ((found.gradients, expected.gradients), (found.weights, expected.weights)):
        for name, value in theirs.items():
            # Elements that are sums of cancelling terms carry the rounding of the largest of these.
            torch.testing.assert_close(mine[name], value, rtol=rtol, atol=rtol * float(value.abs().max()), msg=name)


def check(world_size: int, cases: list[Case]) -> list[Run]:
    """Run the cases on as many ranks; each must do what one process does."""
    expected = {num_experts: alone(num_experts) for num_experts in {case.num_experts for case in cases}}
    reports = run_ranks(runs, world_size, cases, timeout_s=120)
    found = []
    for index, case in enumerate(cases):
        found.append(whole_run([report[index] for report in reports], expected[case.num_experts]))
        assert_equal(found[-1], expected[case.num_experts])
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
            Case("replicate", TWO, in_pipeline=True),
            Case("replicate", ParallelConfig(context=2), bucket_numel=1),
            Case("shard", ParallelConfig(context=2)),
        ],
    )
    for name, value in found[0].weights.items():
        assert torch.equal(value, found[1].weights[name]), "overlap changes no bit"
    assert found[0].losses == found[1].losses


def test_four_ranks_take_the_steps_of_one() -> None:
    hybrid = ParallelConfig(replicate=2, shard=2)
    check(
        4,
        [
            Case("replicate", ParallelConfig(replicate=4)),
            Case("shard", ParallelConfig(shard=4)),
            Case("shard", hybrid),
            Case("shard", hybrid, stage=2),
            Case("shard", hybrid, in_pipeline=True),
            Case("shard", ParallelConfig(shard=2, context=2)),
            Case("replicate", hybrid),
        ],
    )


def test_experts_are_summed_over_the_ranks_that_hold_them() -> None:
    two = ParallelConfig(replicate=2, expert=2)
    check(2, [Case(kind, two, num_experts=4) for kind in ("replicate", "shard")])
    check(
        4,
        [
            Case("replicate", ParallelConfig(replicate=4, expert=2), num_experts=4),
            Case("shard", ParallelConfig(shard=4, expert=2), num_experts=4),
            Case("shard", ParallelConfig(replicate=2, shard=2, expert=2), num_experts=4),
            Case("shard", ParallelConfig(replicate=2, context=2, expert=2), num_experts=4, stage=2),
        ],
    )


def test_bf16_keeps_masters_and_sums_in_fp32() -> None:
    """bf16 rounds to 8 bits (4e-3); losses of 10 steps stay within 2e-2 of float64, where AdamW amplifies the rest."""
    expected = alone(0)
    cases = [
        Case("replicate", TWO, compute_dtype=torch.bfloat16),
        Case("shard", SHARDS, compute_dtype=torch.bfloat16),
        Case("shard", SHARDS, compute_dtype=torch.bfloat16, in_pipeline=True),
    ]
    reports = run_ranks(runs, 2, cases, timeout_s=120)
    for index in range(len(cases)):
        found = whole_run([report[index] for report in reports], expected)
        torch.testing.assert_close(found.losses, expected.losses, rtol=2e-2, atol=0)
        for _, _, gradient, value in reports[0][index][1].values():
            assert gradient.dtype == value.dtype == torch.float32


def test_compiled_blocks_are_sharded_and_replicated() -> None:
    check(2, [Case("shard", SHARDS, is_compiled=True), Case("replicate", TWO, is_compiled=True)])


def late_gradient(rank: int, world_size: int) -> None:
    model = Net().double()
    with MeshGroups(Mesh(TWO, world_size)) as groups:
        data = Replicated(model, groups)
        tokens, targets = batch(0, 0)
        data.begin()
        for _ in range(2):
            data.micro_batch(True)
            loss_of(model, tokens, targets, 1).backward()  # type: ignore[no-untyped-call]


def test_a_gradient_behind_the_last_one_is_an_error() -> None:
    with pytest.raises(RankFailed, match=r"parallel: \w+ received a gradient after its last one"):
        run_ranks(late_gradient, 2)
