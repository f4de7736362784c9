"""Pipelines between GPUs compute what one process computes, also in the step in which kernels are made."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from parallel.pipeline import Kind, build
from parallel.pipeline.runtime import Inputs, Pipeline
from tests.gpu.devices import needs_gpus
from tests.ranks import run_ranks
from tests.test_parallel.pipelines import ROWS, TOKENS, WIDTH, Case, Stage, batches, fill, weights_of, whole

TIMEOUT_S = 240.0
KINDS: tuple[Kind, ...] = ("1f1b", "interleaved", "zbv")


def new_x(inputs: Inputs) -> Tensor:
    return torch.empty(ROWS, TOKENS, WIDTH, dtype=torch.float64, device="cuda")


def on_gpu(micro_batches: list[Inputs]) -> list[Inputs]:
    return [{name: None if x is None else x.cuda() for name, x in batch.items()} for batch in micro_batches]


def losses_of_one(case: Case) -> Tensor:
    model = whole(case)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for step in range(case.steps):
        micro_batches = batches(case, step)
        weight, aux_weight = weights_of(micro_batches)
        sums = torch.zeros(2, dtype=torch.float64)
        for batch in micro_batches:
            loss, aux = model(batch["tokens_BT"], None, **{k: x for k, x in batch.items() if k != "tokens_BT"})
            (loss * weight + aux * aux_weight).backward()
            sums += torch.stack((loss, aux)).detach()
        losses.append(sums)
        optimizer.step()
        optimizer.zero_grad()
    return torch.stack(losses)


def pipeline_rank(rank: int, world_size: int, case: Case) -> list[Tensor]:
    torch.cuda.set_device(rank)
    assert dist.group.WORLD is not None
    found = []
    for kind in KINDS:
        schedule = build(kind, world_size, case.num_micro_batches)
        each = case.num_layers // schedule.num_stages
        stages = []
        for stage in schedule.stages_of(rank):
            module = Stage(stage * each, (stage + 1) * each, case.num_layers).double()
            fill(module)
            stages.append(module.cuda())
            module.compile()
        optimizer = torch.optim.SGD([p for module in stages for p in module.parameters()], lr=0.1)
        device, losses = torch.device("cuda", rank), []
        with Pipeline(stages, schedule, dist.group.WORLD, new_x=new_x, device=device, timeout_s=60.0) as pipeline:
            for step in range(case.steps):
                micro_batches = batches(case, step)
                seeds = weights_of(micro_batches)
                losses.append(torch.stack(pipeline.step(on_gpu(micro_batches), lambda i, seeds=seeds: seeds)))  # type: ignore[misc]
                optimizer.step()
                optimizer.zero_grad()
        found.append(torch.stack(losses).cpu())
    return found


@pytest.mark.parametrize("size", [pytest.param(2, id="2 GPUs", marks=needs_gpus(2))])
def test_compiled_stages_take_the_steps_of_one_process(size: int) -> None:
    case = Case(num_layers=4, num_micro_batches=6, steps=3)
    expected = losses_of_one(case)
    for found in run_ranks(pipeline_rank, size, case, backend="nccl", timeout_s=TIMEOUT_S):
        for losses in found:
            torch.testing.assert_close(losses, expected, rtol=1e-9, atol=1e-12)
