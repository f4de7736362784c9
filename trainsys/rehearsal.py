"""One training step of a small model in a process that waits for its part: what is slow the first time is done then.

The first engine of a process takes 1.5 s on a CPU, each later one 0.02 s: optimizers and engines import what they need
when they need it. A spare that has rehearsed takes a lost rank's place in the latter time.
"""

from __future__ import annotations

import dataclasses
from datetime import timedelta

import torch
from torch import distributed as dist
from torch.distributed import HashStore  # type: ignore[attr-defined]  # public, though not in its __all__

from parallel import Mesh, MeshGroups, hybrid
from parallel.config import ParallelConfig
from trainsys import meter, models
from trainsys.check import backend_of
from trainsys.config import BatchConfig, ModelConfig, RunConfig
from trainsys.data import MicroBatch, StepBatch
from trainsys.engines import DTYPES, Shares, open_engine
from trainsys.optim import build_optimizer, plan_of
from trainsys.precision import ability_of, alone

_LENGTH, _VOCABULARY, _TIMEOUT_S = 8, 64, 60.0


def rehearse(config: RunConfig) -> None:
    """Train one step of a tiny model on the CPU with the run's engine, alone; no process group is left.

    `engine.precision = auto` is here what this CPU would choose: what the ranks choose together is not known yet.
    Every generator of the process moves on: seed it afterwards.
    """
    config = alone(config, ability_of(torch.device("cpu")))
    small = dataclasses.replace(
        config,
        model=ModelConfig(num_layers=1, dim=32, num_heads=2, ffn_dim=64),
        batch=BatchConfig(global_sequences=1, micro_sequences=1),
        parallel=ParallelConfig(),
        engine=dataclasses.replace(config.engine, backend=backend_of(config), device="cpu", compile=False),
        data=dataclasses.replace(config.data, sequence_length=_LENGTH),
    )
    meter.peak_of(torch.device("cpu"), DTYPES[config.engine.precision], config.metrics.peak_flops_per_s)
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=_TIMEOUT_S))
    try:
        with MeshGroups(Mesh(small.parallel, 1)) as groups:
            groups.prepare(*hybrid.GROUPS)
            _step(small, groups)
    finally:
        dist.destroy_process_group()


def _step(config: RunConfig, groups: MeshGroups) -> None:
    with torch.device("meta"):
        model = models.build(
            config.model,
            vocab_size=_VOCABULARY,
            max_positions=_LENGTH,
            recompute=config.engine.recompute,
            seed=config.seed,
        )
    plan = plan_of(model, config.optim)
    device, dtype = torch.device("cpu"), DTYPES[config.engine.precision]
    part = hybrid.apply(
        model,
        groups,
        models.Anatomy(_LENGTH),
        place=lambda module: models.materialise(module, device, dtype, config.seed),
    )
    engine = open_engine(part, config, lambda module: build_optimizer(module, config.optim, plan))
    try:
        tokens = torch.zeros(1, _LENGTH, dtype=torch.int64)
        micro = MicroBatch(tokens, tokens, None, None, _LENGTH)
        engine.train(StepBatch(0, [micro], _LENGTH), Shares(_LENGTH, 1), meter.Phases(device))
        engine.update(1.0)
        engine.slices()
    finally:
        engine.close()
        part.close()
