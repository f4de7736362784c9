"""What the hybrid path costs a step beside DeepSpeed's engine alone.

Claim: a step through `parallel.hybrid`, the engine contract and `step.train_step` (batches fed, losses summed over
ranks, gradients normed and clipped) takes at most 1.05 of the time of a plain loop of `deepspeed.initialize`'s engine.

Baseline: the same model, optimizer and DeepSpeed settings in the loop of DeepSpeed's documentation: forward, backward
and step of each micro-batch, the loss read once a step. Two data ranks with gloo on this machine's CPU. Both are made
from the same weights, see the same batches and alternate step by step; a step takes as long as its slower rank. Losses
are compared.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import distributed as dist

from parallel import Mesh, MeshGroups, hybrid
from parallel.bench import Bound, Gate, Report, arguments, spawn
from trainsys import meter, models, recipe
from trainsys.check import accumulation_steps, data_ranks
from trainsys.config import RunConfig
from trainsys.data import MicroBatch, StepBatch
from trainsys.data.batch import micro_batch
from trainsys.deepspeed_setup import deepspeed_settings, import_deepspeed
from trainsys.engine import DeepSpeedEngine
from trainsys.optim import build_optimizer
from trainsys.step import agree, train_step

_LIMIT = 1.05
_WARM_UP = 3
_RANKS = 2
_SETTINGS = (
    f"--parallel.replicate={_RANKS}",
    "--optim.kind=adamw",
    "--engine.device=cpu",
    "--engine.precision=fp32",
    "--engine.backend=deepspeed",
    "--batch.global_sequences=8",
    "--batch.micro_sequences=2",
)


@dataclass(frozen=True)
class Case:
    """One ZeRO stage."""

    stage: int
    layers: int
    dim: int
    length: int

    @property
    def config(self) -> RunConfig:
        sizes = {
            "engine.zero_stage": self.stage,
            "model.num_layers": self.layers,
            "model.dim": self.dim,
            "data.sequence_length": self.length,
        }
        return recipe.load(["tiny"], [*_SETTINGS, *(f"--{key}={value}" for key, value in sizes.items())]).config


def measure(rank: int, world_size: int, cases: Sequence[Case], repeats: int) -> dict[int, dict[str, Any]]:
    """Return seconds of every step by stage and path, and the losses of both."""
    return {case.stage: _measure(rank, case, repeats) for case in cases}


def _measure(rank: int, case: Case, repeats: int) -> dict[str, Any]:
    config = case.config
    batches = [_batch(config, rank, step) for step in range(_WARM_UP + repeats)]
    groups = MeshGroups(Mesh(config.parallel, _RANKS))
    part = hybrid.apply(_model(config), groups, models.Anatomy(case.length))
    engine = DeepSpeedEngine(part, config, lambda module: build_optimizer(module, config.optim))
    paths = {"hybrid": _hybrid(engine, config), "plain": _plain(config)}
    times: dict[str, list[float]] = {name: [] for name in paths}
    losses: dict[str, list[float]] = {name: [] for name in paths}
    for index, batch in enumerate(batches):
        # Whoever goes second finds the caches warm.
        for name in sorted(paths, reverse=bool(index % 2)):
            dist.barrier()
            started = time.perf_counter()
            loss = paths[name](batch)
            seconds = torch.tensor(time.perf_counter() - started)
            dist.all_reduce(seconds, dist.ReduceOp.MAX)
            losses[name].append(loss)
            if index >= _WARM_UP:
                times[name].append(float(seconds))
    engine.close()
    return {"times": times, "losses": losses}


def _model(config: RunConfig) -> torch.nn.Module:
    length = config.data.sequence_length
    return models.build(config.model, vocab_size=257, max_positions=length, recompute="none", seed=0)


def _batch(config: RunConfig, rank: int, step: int) -> StepBatch:
    random, length = np.random.default_rng([rank, step]), config.data.sequence_length
    micros = []
    for _ in range(accumulation_steps(config)):
        windows = [
            (random.integers(0, 257, length + 1), np.zeros(length + 1, np.int32))
            for _ in range(config.batch.micro_sequences)
        ]
        micros.append(micro_batch(windows, document_mask=True))
    return StepBatch(0, micros, sum(micro.num_targets for micro in micros))


def _hybrid(engine: DeepSpeedEngine, config: RunConfig) -> Callable[[StepBatch], float]:
    """A step as the trainer makes it."""
    control = dist.group.WORLD
    assert control is not None
    phases = meter.Phases(engine.device)

    def step(batch: StepBatch) -> float:
        targets = agree(control, batch.num_targets, False).num_targets
        ranks = data_ranks(config.parallel)
        return train_step(
            engine, batch, total_targets=targets, data_ranks=ranks, lr=(1.0, 0.0), control=control, phases=phases
        ).loss

    return step


def _plain(config: RunConfig) -> Callable[[StepBatch], float]:
    """A step as DeepSpeed's documentation has it."""
    deepspeed, model = import_deepspeed("cpu"), _model(config)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=build_optimizer(model, config.optim),
        config={**deepspeed_settings(config), "gradient_clipping": config.engine.gradient_clip_norm},
        dist_init_required=False,
    )

    def forward(micro: MicroBatch) -> torch.Tensor:
        loss, auxiliary = engine(
            micro.tokens,
            positions_BT=micro.positions,
            document_ids_BT=micro.document_ids,
            targets_BT=micro.targets,
        )
        share: torch.Tensor = loss / micro.num_targets + auxiliary
        return share

    def step(batch: StepBatch) -> float:
        total = torch.zeros(())
        for micro in batch.micro_batches:
            share = forward(micro)
            engine.backward(share)
            engine.step()
            total += share.detach()
        dist.all_reduce(total)
        return float(total) / (len(batch.micro_batches) * _RANKS)

    return step


def main() -> int:
    """Run the benchmark; return its exit code."""
    options = arguments(__doc__).parse_args()
    sizes = (1, 12, 8) if options.smoke else (4, 240, 128)
    stages = (1,) if options.smoke else (0, 1, 2, 3)
    cases = [Case(stage, *sizes) for stage in stages]
    found = spawn(measure, _RANKS, "gloo", cases, 1 if options.smoke else options.repeats)
    if found is None:
        return 0
    report = Report("trainsys.hybrid", {"ranks": _RANKS, "layers": sizes[0], "dim": sizes[1], "length": sizes[2]})
    for stage, result in found[0].items():
        for path, seconds in result["times"].items():
            report.add(f"{path}, ZeRO {stage}", "step", "s", *seconds)
        ours, plain = result["losses"]["hybrid"], result["losses"]["plain"]
        error = max(abs(a - b) / b for a, b in zip(ours, plain, strict=True))
        report.gates.append(Gate(f"difference of losses, ZeRO {stage}", error, 1e-5, ok=error <= 1e-5))
        pairs = zip(result["times"]["hybrid"], result["times"]["plain"], strict=True)
        ratio = float(np.median([a / b for a, b in pairs]))
        report.gates.append(Gate(f"step over plain, ZeRO {stage}", ratio, _LIMIT, ok=ratio <= _LIMIT, is_speed=True))
    best = min(min(result["times"]["plain"]) for result in found[0].values())
    report.bounds.append(Bound("step", best, "s", "the fastest step of DeepSpeed's engine alone in this run"))
    return report.finish(options)


if __name__ == "__main__":
    sys.exit(main())
