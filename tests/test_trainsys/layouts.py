"""Training steps in any layout and their reference: one process that takes whole micro-batches, on the same text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist

from parallel import Mesh, MeshGroups, hybrid
from parallel.config import ParallelConfig
from parallel.randomness import seeded_like
from trainsys import meter, models, recipe, schedule
from trainsys.check import accumulation_steps, data_ranks
from trainsys.config import RunConfig
from trainsys.data import MicroBatch, StepBatch
from trainsys.data.batch import Window, micro_batch
from trainsys.engines import Engine, open_engine
from trainsys.optim import build_optimizer, plan_of
from trainsys.step import agree, train_step

GLOBAL, MICROS, VOCAB, LENGTH = 8, 2, 60, 24

SETTINGS = (
    "--steps=10",
    "--optim.kind=adamw",
    "--schedule.warmup_steps=4",
    "--model.num_layers=4",
    "--model.dim=32",
    "--model.num_heads=4",
    "--model.num_kv_heads=2",
    "--model.ffn_dim=48",
    "--model.vocab_size=60",
    f"--data.sequence_length={LENGTH}",
    f"--batch.global_sequences={GLOBAL}",
    "--engine.zero_stage=0",
    "--engine.precision=fp32",
    "--engine.device=cpu",
    "--engine.gradient_clip_norm=0.5",
    "--optim.lr=1e-2",
    # Adam divides by the root of the second moment: with a smaller eps, elements whose gradient is rounding noise
    # would move by a full learning rate in a direction of chance.
    "--optim.eps=1e-6",
)


@dataclass(frozen=True)
class Layout:
    """How one run is spread over ranks, and what else is set."""

    degrees: ParallelConfig
    settings: tuple[str, ...] = ()
    dtype: torch.dtype = torch.float64

    @property
    def world_size(self) -> int:
        d = self.degrees
        return d.pipeline * d.replicate * d.shard * d.context * d.tensor

    @property
    def config(self) -> RunConfig:
        """The whole configuration: two micro-batches a rank, however many ranks there are."""
        d = self.degrees
        axes = ("pipeline", "replicate", "shard", "context", "tensor", "expert", "node_size")
        chosen = [f"--parallel.{axis}={getattr(d, axis)}" for axis in axes]
        chosen += [f"--parallel.sequence={str(d.sequence).lower()}", f"--parallel.attention={d.attention}"]
        chosen += [f"--parallel.stages.schedule={d.stages.schedule}"]
        chosen += [f"--batch.micro_sequences={GLOBAL // (MICROS * d.replicate * d.shard)}"]
        keys = {setting.partition("=")[0] for setting in self.settings}
        kept = [setting for setting in (*SETTINGS, *chosen) if setting.partition("=")[0] not in keys]
        return recipe.load(["tiny"], [*kept, *self.settings]).config


@dataclass
class Report:
    """What a rank tells of its run."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]
    shards: dict[str, Any]


def windows(step: int) -> list[Window]:
    """The same packed sequences for everyone; documents end at different places, so targets are uneven."""
    random = np.random.default_rng(step)
    found = []
    for _ in range(GLOBAL):
        tokens = random.integers(0, VOCAB, LENGTH + 1)
        cut = int(random.integers(1, LENGTH + 1))
        found.append((tokens, (np.arange(LENGTH + 1) >= cut).astype(np.int32)))
    return found


def build(config: RunConfig) -> torch.nn.Module:
    return models.build(
        config.model,
        vocab_size=VOCAB,
        max_positions=LENGTH,
        recompute=config.engine.recompute,
        seed=3,
    )


def reference(layout: Layout, steps: range = range(1, 11)) -> Report:
    """An ordinary loop over whole micro-batches: what all ranks of the layout see at once."""
    config = layout.config
    model = build(config).to(layout.dtype)
    optimizer = build_optimizer(model, config.optim)
    losses, norms = [], []
    torch.manual_seed(0)
    for step in steps:
        everyone = [_windows(config, step, rank) for rank in range(data_ranks(config.parallel))]
        micros = [
            micro_batch([window for mine in everyone for window in mine[index]], document_mask=True)
            for index in range(accumulation_steps(config))
        ]
        total = sum(micro.num_targets for micro in micros)
        loss_sum = 0.0
        optimizer.zero_grad()
        for micro in micros:
            loss, auxiliary = model(
                micro.tokens,
                positions_BT=micro.positions,
                document_ids_BT=micro.document_ids,
                targets_BT=micro.targets,
            )
            (loss / total + auxiliary / accumulation_steps(config)).backward()
            loss_sum += loss.item()
        limit = config.engine.gradient_clip_norm or float("inf")
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), limit)))
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * schedule.factor(config.schedule, step, config.steps)
        optimizer.step()
        losses.append(loss_sum / total)
    return Report(losses, norms, {name: value.detach() for name, value in model.named_parameters()}, {})


def open_layout(layout: Layout) -> tuple[Engine, hybrid.Hybrid]:
    """The engine of this rank; every rank calls it."""
    config = layout.config
    model = build(config)
    groups = MeshGroups(Mesh(config.parallel, dist.get_world_size()), timeout_s=60)
    groups.prepare(*hybrid.GROUPS)
    plan = plan_of(model, config.optim)
    part = hybrid.apply(
        model,
        groups,
        models.Anatomy(LENGTH),
        num_micro_batches=accumulation_steps(config),
        place=lambda module: module.to(layout.dtype),
        timeout_s=60,
    )
    engine = open_engine(part, config, lambda module: build_optimizer(module, config.optim, plan))
    torch.manual_seed(seeded_like(part.mesh, part.rank))  # of dropout, as the trainer does
    return engine, part


def take_steps(engine: Engine, layout: Layout, part: hybrid.Hybrid, steps: range) -> tuple[list[float], list[float]]:
    """Train this rank's share of `steps`; losses and gradient norms."""
    config = layout.config
    assert dist.group.WORLD is not None
    at = part.mesh.coordinates(part.rank)
    losses, norms = [], []
    for step in steps:
        mine = _micro_batches(config, step, part.mesh.data_rank(part.rank))
        batch = StepBatch(0, mine, sum(micro.num_targets for micro in mine))
        counts = at.pipeline == at.context == at.tensor == 0
        targets = agree(dist.group.WORLD, batch.num_targets, False, tells=counts).num_targets
        stats = train_step(
            engine,
            batch,
            total_targets=targets,
            data_ranks=data_ranks(config.parallel),
            lr=(schedule.factor(config.schedule, step, config.steps), 0.0),
            control=dist.group.WORLD,
            phases=meter.Phases(engine.device),
        )
        losses.append(stats.loss)
        norms.append(stats.gradient_norm)
    return losses, norms


def train_rank(rank: int, world_size: int, layouts: list[Layout]) -> list[Report]:
    """Train in each layout, one after the other."""
    return [_train(layout) for layout in layouts]


def _train(layout: Layout) -> Report:
    engine, part = open_layout(layout)
    losses, norms = take_steps(engine, layout, part, range(1, 11))
    weights = {name: value.detach().clone() for name, value in whole_parameters(engine).items()}
    shards = dict(part.shards)
    engine.close()
    part.close()
    part.groups.close()
    return Report(losses, norms, weights, shards)


def whole_parameters(engine: Engine) -> dict[str, Tensor]:
    """This rank's local parameters, gathered over ZeRO 3."""
    found = {}
    for name, parameter in engine.module.named_parameters():
        if hasattr(parameter, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters(parameter):
                found[name] = parameter.detach().clone()
        else:
            found[name] = parameter
    return found


def _windows(config: RunConfig, step: int, data_rank: int) -> list[list[Window]]:
    """What a data rank feeds in a step, by micro-batch."""
    share, size = GLOBAL // data_ranks(config.parallel), config.batch.micro_sequences
    mine = windows(step)[data_rank * share : (data_rank + 1) * share]
    return [mine[i : i + size] for i in range(0, share, size)]


def _positions(micro: MicroBatch) -> Tensor:
    return torch.arange(LENGTH).expand_as(micro.tokens) if micro.positions is None else micro.positions


def _document_ids(micro: MicroBatch) -> Tensor:
    """Of a micro-batch with one document a row, which has none of its own."""
    return torch.zeros_like(micro.tokens, dtype=torch.int32) if micro.document_ids is None else micro.document_ids


def _micro_batches(config: RunConfig, step: int, data_rank: int) -> list[MicroBatch]:
    return [micro_batch(each, document_mask=True) for each in _windows(config, step, data_rank)]
