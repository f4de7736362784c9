"""Pipeline schedules: how long a step takes, how much of it is bubble, and what was predicted.

Claim: a step takes what `parallel.pipeline.predict` says within 10 %, whatever the schedule; 1f1b is at least as fast
as DeepSpeed's PipelineEngine on the same layers.

Baseline: DeepSpeed's PipelineEngine (1f1b), in turn with ours in one job, after a turn that is not counted. Both end a
step with plain SGD. Layers are residual MLPs, equally many on every rank; GPUs compute fp32 products as TF32.

- `step`: seconds from a barrier to the last rank's end, all messages and the update included; the slowest rank's.
- `bubble`: 1 - (seconds that a rank's actions take alone, of the slowest rank) / step, the update taken out.
- `predicted`: the replay of the schedule with the costs of every stage, measured before in the same job with all ranks
  busy (forward, backward for inputs, for weights), and half a round trip of a message as latency.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from parallel.bench import Bound, Gate, Report, arguments, device_of, spawn
from parallel.pipeline import Costs, Kind, Schedule, build, num_stages, predict
from parallel.pipeline.runtime import Inputs, Pipeline
from parallel.pipeline.weights import Deferred, deferring
from parallel.ranks import Backend

KINDS: tuple[Kind, ...] = get_args(Kind)
LR = 1e-4


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of the model and of a step."""

    layers: int
    width: int
    rows: int
    """Of a micro-batch."""
    micro_batches: int


@dataclass(slots=True)
class Measured:
    """What one rank found."""

    steps: dict[str, list[float]]
    """By case."""
    costs: dict[str, dict[int, tuple[float, float, float]]]
    """By schedule and stage: forward, backward for inputs, backward for weights."""
    losses: dict[str, float]
    """Mean loss of the first step."""
    update_s: float
    latency_s: float


class Layer(nn.Module):
    """A residual MLP."""

    def __init__(self, width: int, index: int, device: torch.device) -> None:
        super().__init__()
        generator = torch.Generator(device).manual_seed(index)
        self.up = nn.Linear(width, 4 * width, bias=False, device=device)
        self.down = nn.Linear(4 * width, width, bias=False, device=device)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(std=parameter.shape[1] ** -0.5, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        grown: Tensor = self.down(functional.gelu(self.up(functional.rms_norm(x, x.shape[-1:]))))
        return x + grown


class Stage(nn.Module):
    """Layers as the runtime calls them; the last stage's loss is the mean square distance to the targets."""

    def __init__(self, layers: list[Layer], *, is_last: bool) -> None:
        super().__init__()
        self.layers, self.is_last = nn.ModuleList(layers), is_last

    def forward(self, x: Tensor, aux: Tensor | None, *, targets_BT: Tensor) -> tuple[Tensor, Tensor]:
        for layer in self.layers:
            x = layer(x)
        return functional.mse_loss(x, targets_BT) if self.is_last else x, x.new_zeros(()) if aux is None else aux


def main() -> int:
    """Run the command line; return its exit code."""
    parser = arguments(__doc__)
    parser.add_argument("--ranks", type=int, default=2, help="ranks, a GPU each where there are any (default: 2)")
    parser.add_argument("--no-deepspeed", action="store_true", help="leave the baseline out")
    options = parser.parse_args()
    backend: Backend = "nccl" if torch.cuda.device_count() >= options.ranks else "gloo"
    sizes = Sizes(24, 2048, 3072, 16) if backend == "nccl" else Sizes(8, 256, 512, 8)
    if options.smoke:
        sizes, options.repeats = Sizes(2 * options.ranks, 16, 4, 2 * options.ranks), 1
    found = spawn(measure, options.ranks, backend, sizes, options.repeats, not options.no_deepspeed)
    return 0 if found is None else _report(options, backend, sizes, found).finish(options)


def measure(rank: int, world_size: int, sizes: Sizes, repeats: int, against_deepspeed: bool) -> Measured:
    """Time every schedule, and the baseline, in turn."""
    device = device_of("nccl" if dist.get_backend() == "nccl" else "gloo")
    torch.set_float32_matmul_precision("high")
    group = dist.group.WORLD
    assert group is not None
    micro_batches = _micro_batches(sizes, device)
    found = Measured({}, {}, {}, 0.0, _latency(rank, world_size, sizes, device))
    cases: dict[str, Callable[[], float]] = {}
    for kind in KINDS:
        schedule = build(kind, world_size, sizes.micro_batches)
        stages = _stages(schedule, rank, sizes, device)
        found.costs[kind] = {
            stage: _stage_costs(module, micro_batches, first=stage == 0, device=device)
            for stage, module in zip(schedule.stages_of(rank), stages, strict=True)
        }
        pipeline = Pipeline(stages, schedule, group, new_x=_new_x, device=device)
        optimizer = torch.optim.SGD([p for module in stages for p in module.parameters()], lr=LR)
        cases[kind] = _ours(pipeline, optimizer, micro_batches)
    if against_deepspeed:
        cases["deepspeed"] = _deepspeed(sizes, world_size, micro_batches, device)
    for turn, (name, step) in itertools.product(range(repeats + 1), cases.items()):
        dist.barrier()
        _finish(device)
        start = time.perf_counter()
        loss = step()
        _finish(device)
        if turn:
            found.steps.setdefault(name, []).append(time.perf_counter() - start)
        else:
            found.losses[name] = loss
    found.update_s = _update_s(_stages(build("1f1b", world_size, 1), rank, sizes, device), device)
    return found


def _ours(pipeline: Pipeline, optimizer: torch.optim.Optimizer, micro_batches: list[Inputs]) -> Callable[[], float]:
    def step() -> float:
        loss, _ = pipeline.step(micro_batches, lambda i: (1 / len(micro_batches), 0.0))
        optimizer.step()
        optimizer.zero_grad()
        return float(loss) / len(micro_batches)

    return step


def _deepspeed(sizes: Sizes, world_size: int, micro_batches: list[Inputs], device: torch.device) -> Callable[[], float]:
    try:
        import deepspeed
        from deepspeed.pipe import PipelineModule
    except ImportError as error:
        raise RuntimeError("pip install 'trainsys[train]' for DeepSpeed, or pass --no-deepspeed") from error
    deepspeed.utils.logging.logger.setLevel("ERROR")
    deepspeed.init_distributed(dist_backend=dist.get_backend(), dist_init_required=False)
    layers = [Layer(sizes.width, index, device) for index in range(sizes.layers)]
    module = PipelineModule(layers, num_stages=world_size, loss_fn=functional.mse_loss, partition_method="uniform")
    config = {
        "train_micro_batch_size_per_gpu": sizes.rows,
        "gradient_accumulation_steps": sizes.micro_batches,
        "steps_per_print": 10**9,
    }
    parameters = list(module.parameters())
    engine, *_ = deepspeed.initialize(model=module, config=config, optimizer=torch.optim.SGD(parameters, lr=LR))

    def batches() -> Iterator[tuple[Any, Any]]:
        while True:
            yield from ((batch["tokens_BT"], batch["targets_BT"]) for batch in micro_batches)

    data = batches()
    return lambda: float(engine.train_batch(data))


def _micro_batches(sizes: Sizes, device: torch.device) -> list[Inputs]:
    generator = torch.Generator().manual_seed(0)
    pairs = (torch.randn(2, sizes.rows, sizes.width, generator=generator) for _ in range(sizes.micro_batches))
    return [{"tokens_BT": pair[0].to(device), "targets_BT": pair[1].to(device)} for pair in pairs]


def _new_x(inputs: Inputs) -> Tensor:
    x = inputs["tokens_BT"]
    assert x is not None
    return torch.empty_like(x)


def _stages(schedule: Schedule, rank: int, sizes: Sizes, device: torch.device) -> list[Stage]:
    each = sizes.layers // schedule.num_stages
    return [
        Stage(
            [Layer(sizes.width, index, device) for index in range(stage * each, (stage + 1) * each)],
            is_last=stage + 1 == schedule.num_stages,
        )
        for stage in schedule.stages_of(rank)
    ]


def _stage_costs(
    module: Stage, micro_batches: list[Inputs], *, first: bool, device: torch.device
) -> tuple[float, float, float]:
    """Return the median seconds of the three works of a stage, all ranks at theirs at once."""
    samples: list[tuple[float, float, float]] = []
    dist.barrier()
    for batch in micro_batches[:6]:
        x = _new_x(batch).normal_().requires_grad_(not first)
        targets = batch["targets_BT"]
        assert targets is not None
        deferred = Deferred()
        marks = [_now(device)]
        with deferring(deferred):
            out, _ = module(x, None, targets_BT=targets)
        marks.append(_now(device))
        deferred.backward([out], [torch.ones_like(out)])
        marks.append(_now(device))
        deferred.pay()
        marks.append(_now(device))
        samples.append((marks[1] - marks[0], marks[2] - marks[1], marks[3] - marks[2]))
    module.zero_grad()
    forward, inputs, weights = (statistics.median(values[1:] or values) for values in zip(*samples, strict=True))
    return forward, inputs, weights


def _latency(rank: int, world_size: int, sizes: Sizes, device: torch.device) -> float:
    """Return half the seconds of a round trip of what flows between stages; 0 for a single rank."""
    if world_size == 1:
        return 0.0
    x, times = torch.zeros(sizes.rows, sizes.width, device=device), []
    for _ in range(6):
        dist.barrier()
        start = _now(device)
        if rank == 0:
            dist.send(x, 1)
            dist.recv(x, 1)
        elif rank == 1:
            dist.recv(x, 0)
            dist.send(x, 0)
        times.append((_now(device) - start) / 2)
    return statistics.median(times[1:])


def _update_s(stages: list[Stage], device: torch.device) -> float:
    optimizer = torch.optim.SGD([p for module in stages for p in module.parameters()], lr=LR)
    for module in stages:
        for parameter in module.parameters():
            parameter.grad = torch.zeros_like(parameter)
    times = []
    for _ in range(4):
        start = _now(device)
        optimizer.step()
        times.append(_now(device) - start)
    return statistics.median(times[1:])


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _now(device: torch.device) -> float:
    _finish(device)
    return time.perf_counter()


def _report(options: argparse.Namespace, backend: str, sizes: Sizes, ranks: list[Measured]) -> Report:
    parameters = {"ranks": len(ranks), "backend": backend} | {name: getattr(sizes, name) for name in Sizes.__slots__}
    report = Report("parallel.pipeline", parameters)
    update_s, latency_s = max(rank.update_s for rank in ranks), max(rank.latency_s for rank in ranks)
    for name in ranks[0].steps:
        report.add(name, "step", "s", *map(max, zip(*(rank.steps[name] for rank in ranks), strict=True)))
    for kind in KINDS:
        by_stage = {stage: cost for rank in ranks for stage, cost in rank.costs[kind].items()}
        costs = [by_stage[stage] for stage in range(num_stages(kind, len(ranks)))]
        forward, inputs, weights = zip(*costs, strict=True)
        predicted = predict(
            build(kind, len(ranks), sizes.micro_batches),
            Costs(forward=forward, backward_input=inputs, backward_weight=weights, latency=latency_s),
        )
        report.add(kind, "predicted step", "s", predicted.makespan + update_s)
        report.add(kind, "predicted bubble", "of step", 1 - max(predicted.busy) / predicted.makespan)
        steps = report.samples[kind, "step", "s"]
        report.add(kind, "bubble", "of step", *(1 - max(predicted.busy) / (step - update_s) for step in steps))
        ratio = report.median(kind, "step") / (predicted.makespan + update_s)
        report.gates.append(Gate(f"{kind}: step over prediction", ratio, 1.1, ok=ratio <= 1.1, is_speed=True))
    if "deepspeed" in ranks[0].steps:
        ratio = report.median("deepspeed", "step") / report.median("1f1b", "step")
        report.gates.append(Gate("DeepSpeed's step over 1f1b's", ratio, 1.0, ok=ratio >= 1.0, is_speed=True))
    losses = ranks[0].losses
    spread = max(losses.values()) / min(losses.values()) - 1
    report.gates.append(Gate("spread of the first losses", spread, 1e-3, ok=spread <= 1e-3))
    report.bounds.append(Bound("latency", latency_s, "s", "half a round trip of what flows between stages"))
    report.bounds.append(Bound("update", update_s, "s", "SGD alone"))
    return report


if __name__ == "__main__":
    sys.exit(main())
