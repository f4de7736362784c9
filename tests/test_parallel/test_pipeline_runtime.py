"""A pipeline computes what one process computes, whatever its schedule."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.pipeline import Kind, build
from parallel.pipeline.runtime import Inputs, Pipeline
from parallel.pipeline.tied import Tied
from tests.ranks import run_ranks
from tests.test_parallel.pipelines import ROWS, TOKENS, WIDTH, Case, Stage, batches, fill, weights_of, whole

Result = dict[str, Any]


def _reference(case: Case) -> Result:
    model = whole(case)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    gradients: dict[str, Tensor] = {}
    for step in range(case.steps):
        micro_batches = batches(case, step)
        weight, aux_weight = weights_of(micro_batches)
        sums = torch.zeros(2, dtype=torch.float64)
        for batch in micro_batches:
            named: dict[str, Any] = {name: x for name, x in batch.items() if name != "tokens_BT"}
            loss, aux = model(batch["tokens_BT"], None, **named)
            (loss * weight + aux * aux_weight).backward()
            sums += torch.stack((loss, aux)).detach()
        losses.append(sums)
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        outputs = [model(b["tokens_BT"], None, positions_BT=b["positions_BT"]) for b in batches(case, 99)]
    return {
        "losses": losses,
        "gradients": gradients,
        "weights": {name: p.detach() for name, p in model.named_parameters()},
        "outputs": outputs,
    }


def _new_x(inputs: Inputs) -> Tensor:
    return torch.empty(ROWS, TOKENS, WIDTH, dtype=torch.float64)


def _stages(case: Case, sizes: tuple[int, ...], own: tuple[int, ...]) -> list[Stage]:
    ends = [sum(sizes[: stage + 1]) for stage in range(len(sizes))]
    stages = []
    for stage in own:
        module = Stage(ends[stage] - sizes[stage], ends[stage], case.num_layers, recompute=case.recompute).double()
        fill(module)
        stages.append(module)
    return stages


def _train(rank: int, world_size: int, kind: Kind, case: Case) -> Result:
    schedule = build(kind, world_size, case.num_micro_batches)
    sizes = case.sizes or (case.num_layers // schedule.num_stages,) * schedule.num_stages
    stages = _stages(case, sizes, schedule.stages_of(rank))
    group = dist.group.WORLD
    assert group is not None
    tied: list[Tied] = []
    first, last = schedule.rank_of[0], schedule.rank_of[-1]
    if case.tied and first == last == rank:
        assert stages[-1].head is not None
        assert stages[0].embedding is not None
        stages[-1].head.weight = stages[0].embedding.weight
    elif case.tied and first != last:
        pair = dist.new_group([first, last])
        for stage, module in zip(schedule.stages_of(rank), stages, strict=True):
            owner: nn.Module | None = {0: module.embedding, schedule.num_stages - 1: module.head}.get(stage)
            if owner is not None:
                assert isinstance(owner.weight, nn.Parameter)
                tied.append(Tied(owner.weight, stage, pair))
    parameters = {name: p for module in stages for name, p in module.named_parameters()}
    optimizer = torch.optim.AdamW(list({id(p): p for p in parameters.values()}.values()), lr=0.01)
    result: Result = {"losses": []}
    with Pipeline(stages, schedule, group, new_x=_new_x, device=torch.device("cpu"), tied=tied) as pipeline:
        for step in range(case.steps):
            micro_batches = batches(case, step)
            seeds = weights_of(micro_batches)
            result["losses"].append(torch.stack(pipeline.step(micro_batches, lambda i, seeds=seeds: seeds)))  # type: ignore[misc]
            result["gradients"] = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
            optimizer.step()
            optimizer.zero_grad()
        evaluation = batches(case, 99)
        result["evaluated"] = torch.stack(pipeline.evaluate(evaluation))
        result["outputs"] = pipeline.forward([b | {"targets_BT": None} for b in evaluation])
    result["weights"] = {name: p.detach() for name, p in parameters.items()}
    return result


def _assert_equal(results: list[Result], reference: Result, case: Case) -> None:
    for result in results:
        _close(result["losses"], reference["losses"])
        for key in ("gradients", "weights"):
            for name, found in result[key].items():
                same = name.replace("head", "embedding") if case.tied else name
                _close(found, reference[key][same])
    names = {name for result in results for name in result["weights"]}
    assert names - ({"head.weight"} if case.tied else set()) == set(reference["weights"])
    (outputs,) = [result["outputs"] for result in results if result["outputs"]]
    _close(outputs, reference["outputs"])


def _close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


CASES = [
    Case(steps=10),
    Case(num_layers=8, sizes=(), tied=True, num_micro_batches=4),
]


@pytest.mark.parametrize("kind", get_args(Kind))
def test_two_stages_equal_one_process(kind: Kind) -> None:
    for case in CASES:
        _assert_equal(run_ranks(_train, 2, kind, case), _reference(case), case)
