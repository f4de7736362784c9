"""A pipeline computes what one process computes, whatever its schedule."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.errors import PipelineError
from parallel.pipeline import Action, Kind, build, num_stages
from parallel.pipeline.runtime import Inputs, Pipeline
from parallel.pipeline.tied import Tied
from tests.ranks import RankFailed, run_ranks
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
    how: Any = {"new_x": _new_x, "device": torch.device("cpu"), "tied": tied, "overlap": case.overlap}
    with Pipeline(stages, schedule, group, **how) as pipeline:
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


def _train_all(rank: int, world_size: int, runs: list[tuple[Kind, Case]]) -> list[Result]:
    return [_train(rank, world_size, kind, case) for kind, case in runs]


def _compare(world_size: int, runs: list[tuple[Kind, Case]]) -> None:
    by_rank = run_ranks(_train_all, world_size, runs)
    for index, (kind, case) in enumerate(runs):
        results = [results[index] for results in by_rank]
        for result in results[1:]:
            assert torch.equal(torch.stack(result["losses"]), torch.stack(results[0]["losses"])), kind
        _assert_equal(results, _reference(case), case)


KINDS: tuple[Kind, ...] = get_args(Kind)


def test_messages_that_arrive_early_or_late_make_no_difference_to_the_bit() -> None:
    """Nor does one process, where no sum is taken in another order: all but weight gradients that are put off."""
    cases = [Case(num_layers=4, steps=2, overlap=overlap) for overlap in (True, False)]
    alone = _reference(cases[0])
    for results in run_ranks(_train_all, 2, [(kind, case) for kind in KINDS for case in cases]):
        for kind, one, other in zip(KINDS, results[::2], results[1::2], strict=True):
            torch.testing.assert_close(other, one, rtol=0, atol=0)
            if kind in ("gpipe", "1f1b", "interleaved"):
                torch.testing.assert_close(one["losses"], alone["losses"], rtol=0, atol=0)
                for key in ("gradients", "weights"):
                    torch.testing.assert_close(one[key], {n: alone[key][n] for n in one[key]}, rtol=0, atol=0)


def test_ten_steps_on_two_ranks_equal_one_process_with_every_schedule() -> None:
    _compare(2, [(kind, Case(steps=10)) for kind in KINDS])


def test_tied_weights_uneven_layers_and_recomputation_equal_one_process_with_every_schedule() -> None:
    uneven = {2: (5, 2), 4: (3, 1, 1, 2)}
    runs = []
    for kind in KINDS:
        sizes = uneven[num_stages(kind, 2)]
        runs.append((kind, Case(num_layers=7, sizes=sizes, tied=True, recompute=True, num_micro_batches=6)))
    _compare(2, runs)


def test_four_ranks_equal_one_process() -> None:
    _compare(
        4,
        [
            ("1f1b", Case(num_layers=5, sizes=(1, 2, 1, 1), tied=True, num_micro_batches=3)),
            ("interleaved", Case(num_layers=8)),
            ("zb-h1", Case(num_micro_batches=5)),
            ("zbv", Case(num_layers=8, num_micro_batches=9, tied=True)),
            ("zbv", Case(num_layers=8, num_micro_batches=3)),
            ("dualpipev", Case(num_layers=8)),
        ],
    )


def test_a_pipeline_of_one_rank_equals_one_process() -> None:
    _compare(1, [(kind, Case(num_micro_batches=3, tied=True)) for kind in KINDS])


def _tied_copies(rank: int, world_size: int) -> Tensor:
    result = _train(rank, world_size, "zb-h1", Case(tied=True, steps=5))
    weight: Tensor = result["weights"]["embedding.weight" if rank == 0 else "head.weight"]
    return weight


def test_tied_copies_stay_bit_equal() -> None:
    first, last = run_ranks(_tied_copies, 2)
    assert torch.equal(first, last)


class _Recorder:
    """Hooks that write down what they are told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, int, bool]] = []

    def before(self, action: Action, *, last: bool) -> None:
        self.told.append((action.work, action.stage, last))

    def finished(self, stage: int) -> None:
        self.told.append(("finished", stage, True))


def _hooked(rank: int, world_size: int, kind: Kind) -> tuple[list[tuple[str, int, bool]], dict[str, int]]:
    case, group = Case(num_micro_batches=4), dist.group.WORLD
    assert group is not None
    schedule = build(kind, world_size, 4)
    stages = _stages(case, (case.num_layers // schedule.num_stages,) * schedule.num_stages, schedule.stages_of(rank))
    fired: dict[str, int] = {}
    for module in stages:
        for name, parameter in module.named_parameters():
            fired[name] = 0

            def count(_: Tensor, name: str = name) -> None:
                fired[name] += 1

            parameter.register_post_accumulate_grad_hook(count)  # type: ignore[no-untyped-call]
    recorder, micro_batches = _Recorder(), batches(case, 0)
    with Pipeline(stages, schedule, group, new_x=_new_x, device=torch.device("cpu")) as pipeline:
        assert pipeline.hand_over(recorder) == ()
        pipeline.step(micro_batches, lambda i: weights_of(micro_batches))
    return recorder.told, fired


@pytest.mark.parametrize("kind", ["1f1b", "zbv"])
def test_hooks_fire_once_a_micro_batch_and_hear_which_is_the_last(kind: Kind) -> None:
    for rank, (told, fired) in enumerate(run_ranks(_hooked, 2, kind)):
        assert set(fired.values()) == {4}
        for stage in build(kind, 2, 4).stages_of(rank):
            own = [(work, last) for work, s, last in told if s == stage]
            assert own[-1] == ("finished", True)
            assert own[-2][1]
            assert not any(last for _, last in own[:-2])


class _Failing(nn.Module):
    """A stage that fails in the forward, or the backward, of one micro-batch."""

    def __init__(self, stage: Stage, where: str) -> None:
        super().__init__()
        self.stage, self.where, self.calls = stage, where, 0

    def forward(self, x: Tensor, aux: Tensor | None, **inputs: Any) -> tuple[Tensor, Tensor]:
        self.calls += 1
        x, aux = self.stage(x, aux, **inputs)
        if self.calls == 3 and self.where == "forward":
            raise ArithmeticError("rank 1 fails forward")
        if self.calls == 3:
            x.register_hook(_fail)  # type: ignore[no-untyped-call]
        return x, aux


def _fail(gradient: Tensor) -> None:
    raise ArithmeticError("rank 1 fails backward")


def _failing(rank: int, world_size: int, kind: Kind, where: str) -> None:
    case, group = Case(num_layers=6, num_micro_batches=6), dist.group.WORLD
    assert group is not None
    schedule = build(kind, world_size, 6)
    sizes = (case.num_layers // schedule.num_stages,) * schedule.num_stages
    stages: list[nn.Module] = list(_stages(case, sizes, schedule.stages_of(rank)))
    if rank == 1:
        first = stages[0]
        assert isinstance(first, Stage)
        stages[0] = _Failing(first, where)
    micro_batches = batches(case, 0)
    with Pipeline(stages, schedule, group, new_x=_new_x, device=torch.device("cpu")) as pipeline:
        pipeline.step(micro_batches, lambda i: weights_of(micro_batches))


@pytest.mark.parametrize(("kind", "where"), [("1f1b", "forward"), ("zbv", "backward")])
def test_a_rank_that_fails_ends_the_job_with_its_own_error_first(kind: Kind, where: str) -> None:
    with pytest.raises(RankFailed) as failure:
        run_ranks(_failing, 3, kind, where)
    first, report = next(iter(failure.value.reports.items()))
    assert first == 1
    assert f"rank 1 fails {where}" in report


def _refused(rank: int, world_size: int) -> list[str]:
    group = dist.group.WORLD
    assert group is not None
    case, found = Case(num_layers=2), []
    module = _stages(case, (1, 1), (rank,))
    for stages, schedule in [
        ([], build("1f1b", 2, 4)),
        (module, build("1f1b", 3, 4)),
        (module, build("zbv", 2, 4)),
    ]:
        with pytest.raises(PipelineError, match="the schedule has") as error:
            Pipeline(stages, schedule, group, new_x=_new_x, device=torch.device("cpu"))
        found.append(str(error.value))
    with (
        Pipeline(module, build("1f1b", 2, 4), group, new_x=_new_x, device=torch.device("cpu")) as pipeline,
        pytest.raises(PipelineError, match="3 micro-batches for a schedule of 4") as error,
    ):
        pipeline.step(batches(case, 0)[:3], lambda i: (1.0, 1.0))
    return [*found, str(error.value)]


def test_what_does_not_fit_is_refused_on_every_rank() -> None:
    first, second = run_ranks(_refused, 2)
    assert len(first) == len(second) == 4
