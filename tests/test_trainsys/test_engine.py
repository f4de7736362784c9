"""The DeepSpeed adapter against a plain torch loop in one process, under every ZeRO stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F

from checkpoint import FlatSlice, hooks
from parallel import Mesh, MeshGroups, hybrid
from tests.ranks import RankFailed, run_ranks
from trainsys import meter, models, recipe, schedule, setup
from trainsys.check import data_ranks
from trainsys.config import RunConfig
from trainsys.data import IGNORE, StepBatch
from trainsys.data.batch import Window, micro_batch
from trainsys.deepspeed_setup import deepspeed_settings
from trainsys.engine import DeepSpeedEngine
from trainsys.engines import DTYPES, Engine
from trainsys.optim import build_optimizer
from trainsys.step import StepStats, agree, train_step

STEPS, GLOBAL, VOCAB, LENGTH = 20, 8, 64, 24

SMALL = (
    "--steps=20",
    "--optim.kind=adamw",
    "--schedule.warmup_steps=4",
    "--model.num_layers=2",
    "--model.dim=32",
    "--model.num_heads=4",
    "--model.num_kv_heads=2",
    "--model.ffn_dim=64",
    f"--data.sequence_length={LENGTH}",
    f"--batch.global_sequences={GLOBAL}",
    "--batch.micro_sequences=2",
    "--engine.precision=fp32",
    "--engine.device=cpu",
    "--engine.gradient_clip_norm=0.5",
    "--optim.lr=1e-2",
    # Adam divides by the root of the second moment: with a smaller eps, elements whose gradient is rounding noise
    # would move by a full learning rate in a direction of chance.
    "--optim.eps=1e-6",
)


def configure(*overrides: str) -> RunConfig:
    keys = {override.partition("=")[0] for override in overrides}
    kept = [override for override in SMALL if override.partition("=")[0] not in keys]
    return recipe.load(["tiny"], [*kept, *overrides]).config


def windows(step: int) -> list[Window]:
    """The same packed sequences for everyone; documents end at different places, so targets are uneven."""
    random = np.random.default_rng(step)
    found = []
    for _ in range(GLOBAL):
        tokens = random.integers(0, VOCAB, LENGTH + 1)
        cut = int(random.integers(1, LENGTH + 1))
        found.append((tokens, (np.arange(LENGTH + 1) >= cut).astype(np.int32)))
    return found


def build(config: RunConfig, local_rank: int = 0) -> torch.nn.Module:
    """The model in fp32 on the rank's device."""
    return models.build(
        config.model,
        vocab_size=VOCAB,
        max_positions=LENGTH,
        recompute=config.engine.recompute,
        seed=3,
    ).to(setup.device_of(config, local_rank))


def plain_loop(config: RunConfig) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """Losses, gradient norms and final weights of an ordinary loop over whole batches."""
    model = build(config)
    device = next(model.parameters()).device
    optimizer = build_optimizer(model, config.optim)
    losses, norms = [], []
    for step in range(1, STEPS + 1):
        batch = micro_batch(windows(step), document_mask=True)
        assert batch.positions is not None
        assert batch.document_ids is not None
        logits, auxiliary = model(
            batch.tokens.to(device),
            positions_BT=batch.positions.to(device),
            document_ids_BT=batch.document_ids.to(device),
        )
        loss = F.cross_entropy(logits.flatten(0, 1), batch.targets.to(device).flatten(), ignore_index=IGNORE)
        optimizer.zero_grad()
        (loss + auxiliary).backward()
        limit = config.engine.gradient_clip_norm or float("inf")
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), limit)))
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * schedule.factor(config.schedule, step, config.steps)
        optimizer.step()
        losses.append(loss.item())
    return losses, norms, {name: value.detach().cpu() for name, value in model.named_parameters()}


def build_engine(config: RunConfig, rank: int) -> Engine:
    model = build(config, rank).to(DTYPES[config.engine.precision])
    groups = MeshGroups(Mesh(config.parallel, dist.get_world_size()))
    part = hybrid.apply(model, groups, models.Anatomy(LENGTH))
    return DeepSpeedEngine(part, config, lambda module: build_optimizer(module, config.optim))


class Fences:
    """Counts the fences that a checkpointer would put before updates."""

    def __init__(self) -> None:
        self.count = 0

    def fence(self) -> None:
        self.count += 1

    def fence_storages(self, addresses: Callable[[], set[int]]) -> None:
        assert addresses(), "an update changes something"
        self.count += 1

    def fence_on(self, target: Any) -> hooks.Hook:
        return hooks.fence_on(target, self)


def take_steps(engine: Engine, config: RunConfig, steps: range) -> Iterator[StepStats]:
    """Train this rank's share of the batches of `steps`."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    control = dist.new_group(backend="gloo")
    phases = meter.Phases(engine.device)
    for step in steps:
        share = GLOBAL // world_size
        mine = windows(step)[rank * share : (rank + 1) * share]
        size = config.batch.micro_sequences
        micros = [micro_batch(mine[i : i + size], document_mask=True) for i in range(0, share, size)]
        batch = StepBatch(0, micros, sum(micro.num_targets for micro in micros))
        targets = agree(control, batch.num_targets, False).num_targets
        factor = schedule.factor(config.schedule, step, config.steps)
        yield train_step(
            engine,
            batch,
            total_targets=targets,
            data_ranks=data_ranks(config.parallel),
            lr=(factor, 0.0),
            control=control,
            phases=phases,
        )


def engine_rank(
    rank: int, world_size: int, overrides: tuple[str, ...], poisoned_rank: int | None = None
) -> dict[str, Any]:
    """Train this rank's share of the same batches through the adapter."""
    config = configure(f"--parallel.replicate={world_size}", *overrides)
    engine = build_engine(config, rank)
    fences = Fences()
    engine.fence_with(fences)
    if rank == poisoned_rank:
        next(engine.module.parameters()).data.fill_(float("nan"))
    stats = list(take_steps(engine, config, range(1, STEPS + 1)))
    losses, norms = [each.loss for each in stats], [each.gradient_norm for each in stats]
    weights = {}
    for name, held in engine.slices().items():
        if name.startswith("model."):
            assert isinstance(held, FlatSlice | Tensor)
            start, piece = (held.start, held.tensor) if isinstance(held, FlatSlice) else (0, held.reshape(-1))
            weights[name.removeprefix("model.")] = (start, piece.clone().cpu())
    assert fences.count >= STEPS, "no update without a fence"
    return {"losses": losses, "norms": norms, "weights": weights, "counters": engine.counters()}


def assembled(reports: list[dict[str, Any]], like: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whole weights from the pieces of all ranks; NaN where nobody has one."""
    whole = {name: torch.full((value.numel(),), float("nan")) for name, value in like.items()}
    for report in reports:
        for name, (start, piece) in report["weights"].items():
            whole[name][start : start + piece.numel()] = piece.float()
    return {name: flat.view(like[name].shape) for name, flat in whole.items()}


def relative(found: list[float], expected: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    "overrides",
    [
        ("--engine.zero_stage=0",),
        ("--engine.zero_stage=1",),
        ("--engine.zero_stage=2",),
        ("--engine.zero_stage=3",),
        ("--engine.zero_stage=2", "--offload.optimizer=deepspeed_cpu"),
        ("--engine.zero_stage=3", "--offload.optimizer=deepspeed_cpu"),
        # The balancing loss looks at one micro-batch at a time, so it has no whole-batch equal.
        (
            "--engine.zero_stage=3",
            "--model.moe.num_experts=4",
            "--model.moe.ffn_dim=32",
            "--model.moe.balance_weight=0",
        ),
        ("--engine.zero_stage=2", "--engine.recompute=full"),
        ("--engine.zero_stage=2", "--engine.gradient_clip_norm=0"),
        ("--engine.zero_stage=0", "--optim.kind=muon"),
        ("--engine.zero_stage=2", "--optim.kind=muon"),
        ("--engine.zero_stage=3", "--optim.kind=muon"),
    ],
    ids=" ".join,
)
def test_twenty_steps_on_two_ranks_equal_a_plain_torch_loop(overrides: tuple[str, ...]) -> None:
    """fp32 within 1e-6 relative: sums over ranks and micro-batches are taken in another order, nothing else."""
    plain = [override for override in overrides if "recompute" not in override]
    losses, norms, weights = plain_loop(configure(*plain))
    reports = run_ranks(engine_rank, 2, overrides, timeout_s=120)
    assert reports[0]["losses"] == reports[1]["losses"], "all ranks report the same loss"
    assert relative(reports[0]["losses"], losses) < 1e-6
    assert relative(reports[0]["norms"], norms) < 1e-4
    for name, value in assembled(reports, weights).items():
        error = float((value - weights[name]).norm() / weights[name].norm())
        # Muon's iteration, a polynomial of degree 3,125, amplifies the rounding of the sums.
        assert error < (1e-4 if "--optim.kind=muon" in overrides else 1e-5), f"{name}: {error}"
    assert reports[0]["counters"]["steps_taken"] == STEPS


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_stays_within_its_rounding_of_fp32(stage: int) -> None:
    """bf16 has 8 bits of mantissa (4e-3 a rounding); averaged over a batch the loss stays within 1e-2."""
    losses, _, _ = plain_loop(configure())
    reports = run_ranks(engine_rank, 2, (f"--engine.zero_stage={stage}", "--engine.precision=bf16"), timeout_s=120)
    assert relative(reports[0]["losses"], losses) < 1e-2
    assert reports[0]["counters"]["steps_taken"] == STEPS


def test_one_rank_and_two_ranks_take_the_same_steps() -> None:
    one = run_ranks(engine_rank, 1, ("--engine.zero_stage=1",), timeout_s=120)
    two = run_ranks(engine_rank, 2, ("--engine.zero_stage=1",), timeout_s=120)
    assert relative(one[0]["losses"], two[0]["losses"]) < 1e-6


def test_the_settings_handed_to_deepspeed_hold_typed_fields_only() -> None:
    settings = deepspeed_settings(configure("--engine.zero_stage=3"))
    assert settings["gradient_clipping"] == 0.5
    assert settings["zero_optimization"]["stage"] == 3
    assert settings["train_micro_batch_size_per_gpu"] * settings["gradient_accumulation_steps"] == GLOBAL // 2
    assert not {"zenflow", "optimizer", "scheduler", "elasticity"} & settings.keys()


def test_a_loss_that_is_not_finite_on_one_rank_ends_the_run_on_every_rank() -> None:
    with pytest.raises(RankFailed) as caught:
        run_ranks(engine_rank, 2, ("--engine.zero_stage=1",), 1, timeout_s=120)
    assert sorted(caught.value.reports) == [0, 1]
    for report in caught.value.reports.values():
        assert "NumericsError: the loss is nan; lower the learning rate" in report


def infinite_gradient_rank(rank: int, world_size: int, stage: int) -> None:
    config = configure(f"--engine.zero_stage={stage}", "--parallel.replicate=1")
    engine = build_engine(config, rank)
    next(engine.module.parameters()).register_hook(lambda gradient: gradient.add(float("inf")))
    list(take_steps(engine, config, range(1, 2)))


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_gradient_that_is_not_finite_ends_the_run_under_every_stage(stage: int) -> None:
    """DeepSpeed would skip the step in silence under stages 1 to 3."""
    with pytest.raises(RankFailed, match="NumericsError: the gradient norm is"):
        run_ranks(infinite_gradient_rank, 1, stage, timeout_s=60)


def compiled_nothing(rank: int, world_size: int, folder: str) -> list[str]:
    import os
    from pathlib import Path

    os.environ["TORCH_EXTENSIONS_DIR"] = folder
    config = configure("--engine.zero_stage=2", "--parallel.replicate=1")
    build_engine(config, rank)
    return [str(path) for path in Path(folder).rglob("*")]


def test_nothing_is_compiled_when_an_engine_starts(tmp_path: Any) -> None:
    """DeepSpeed's builds need a compiler and minutes, and a killed one leaves a lock that hangs later runs."""
    assert run_ranks(compiled_nothing, 1, str(tmp_path), timeout_s=60) == [[]]
