"""The DeepSpeed adapter on CUDA against a plain torch loop on one GPU, under every ZeRO stage."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import checkpoint as ck
from checkpoint import FlatSlice
from tests.gpu.devices import needs_gpus
from tests.ranks import run_ranks
from tests.test_trainsys.test_engine import (
    STEPS,
    assembled,
    build_engine,
    configure,
    engine_rank,
    plain_loop,
    relative,
    take_steps,
)
from trainsys.engines import Engine

pytestmark = needs_gpus(1)
TIMEOUT_S = 180
# The balancing loss looks at one micro-batch at a time, so it has no whole-batch equal.
EXPERTS = ("--model.moe.num_experts=4", "--model.moe.ffn_dim=32", "--model.moe.balance_weight=0")
WORLDS = [pytest.param(1, id="1 GPU"), pytest.param(2, id="2 GPUs", marks=needs_gpus(2))]


def gpu_rank(rank: int, world_size: int, overrides: tuple[str, ...]) -> dict[str, Any]:
    torch.cuda.set_device(rank)
    assert not torch.backends.cuda.matmul.allow_tf32
    return engine_rank(rank, world_size, ("--engine.device=cuda", *overrides))


def plain_rank(rank: int, world_size: int, overrides: tuple[str, ...]) -> tuple[list[float], list[float], Any]:
    """The plain loop, in a process of its own so that the tests' own stays without CUDA."""
    return plain_loop(configure("--engine.device=cuda", *overrides))


def plain(*overrides: str) -> tuple[list[float], list[float], dict[str, Tensor]]:
    return run_ranks(plain_rank, 1, overrides, timeout_s=TIMEOUT_S)[0]  # type: ignore[no-any-return]


def trained(world_size: int, *overrides: str) -> list[dict[str, Any]]:
    return run_ranks(gpu_rank, world_size, overrides, timeout_s=TIMEOUT_S, backend="nccl")


@pytest.fixture(scope="module")
def reference() -> tuple[list[float], list[float], dict[str, Tensor]]:
    return plain()


def worst(weights: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    return max(float((weights[name] - value).norm() / value.norm()) for name, value in expected.items())


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize(
    "overrides",
    [
        ("--engine.zero_stage=0",),
        ("--engine.zero_stage=1",),
        ("--engine.zero_stage=2",),
        ("--engine.zero_stage=3",),
        ("--engine.zero_stage=1", "--offload.optimizer=deepspeed_cpu"),
        ("--engine.zero_stage=2", "--offload.optimizer=deepspeed_cpu"),
        ("--engine.zero_stage=3", "--offload.optimizer=deepspeed_cpu"),
        ("--engine.zero_stage=2", "--engine.recompute=full"),
        ("--engine.zero_stage=3", "--engine.recompute=full"),
    ],
    ids=" ".join,
)
def test_twenty_steps_equal_a_plain_torch_loop(
    world_size: int,
    overrides: tuple[str, ...],
    reference: tuple[list[float], list[float], dict[str, Tensor]],
) -> None:
    """fp32 without TF32, within 1e-5 relative: sums are taken in another order, nothing else."""
    losses, norms, weights = reference
    reports = trained(world_size, *overrides)
    found = assembled(reports, weights)
    errors = (relative(reports[0]["losses"], losses), relative(reports[0]["norms"], norms), worst(found, weights))
    print(f"{' '.join(overrides)}, {world_size} GPU(s): loss, norm, weights differ by", *map("{:.1e}".format, errors))
    assert all(report["losses"] == reports[0]["losses"] for report in reports), "all ranks report the same loss"
    assert errors[0] < 1e-5
    assert errors[1] < 1e-4
    assert errors[2] < 1e-4, "Adam amplifies the rounding of small gradients"
    assert reports[0]["counters"]["steps_taken"] == STEPS


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_low_precision_stays_within_its_rounding_of_fp32(
    world_size: int, precision: str, stage: int, reference: tuple[list[float], list[float], dict[str, Tensor]]
) -> None:
    """A rounding is 4e-3 in bf16, 5e-4 in fp16; averaged over a batch the loss stays within 1e-2."""
    reports = trained(world_size, f"--engine.zero_stage={stage}", f"--engine.precision={precision}")
    error = relative(reports[0]["losses"], reference[0])
    print(f"{precision}, stage {stage}, {world_size} GPU(s): loss differs by {error:.1e}")
    assert error < 1e-2
    assert reports[0]["counters"]["steps_taken"] == STEPS


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_experts_take_the_steps_of_a_plain_loop(world_size: int, precision: str) -> None:
    """In bf16 all experts are one grouped product, in fp32 one product each; rounding sends tokens elsewhere."""
    losses, _, _ = plain(*EXPERTS)
    reports = trained(world_size, "--engine.zero_stage=3", f"--engine.precision={precision}", *EXPERTS)
    error = relative(reports[0]["losses"], losses)
    print(f"experts, {precision}, {world_size} GPU(s): loss differs by {error:.1e}")
    assert error < {"fp32": 1e-5, "bf16": 2e-2}[precision]


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_muon_takes_the_steps_of_a_plain_loop(world_size: int, stage: int) -> None:
    """On a GPU its iteration runs in bf16, which turns rounding of the sums into steps of 4e-3 of an element."""
    losses, _, weights = plain("--optim.kind=muon")
    reports = trained(world_size, f"--engine.zero_stage={stage}", "--optim.kind=muon")
    errors = relative(reports[0]["losses"], losses), worst(assembled(reports, weights), weights)
    print(f"muon, stage {stage}, {world_size} GPU(s): loss, weights differ by", *map("{:.1e}".format, errors))
    assert errors[0] < 1e-3
    assert errors[1] < 1e-2
    assert reports[0]["counters"]["steps_taken"] == STEPS


def state_of(engine: Engine) -> dict[str, Tensor]:
    """A copy of this rank's weights and optimizer state."""
    pieces = engine.slices().items()
    return {name: (held.tensor if isinstance(held, FlatSlice) else held).clone().cpu() for name, held in pieces}


def is_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())


def fp16_engine(rank: int, world_size: int, stage: int, **counters: float) -> tuple[Any, Engine]:
    """An engine whose loss scaler is where `counters` say."""
    torch.cuda.set_device(rank)
    settings = f"--parallel.replicate={world_size}", f"--engine.zero_stage={stage}"
    config = configure("--engine.device=cuda", "--engine.precision=fp16", *settings)
    engine = build_engine(config, rank)
    engine.after_load({**engine.counters(), **counters})
    return config, engine


def overflowing_rank(rank: int, world_size: int, stage: int) -> dict[str, Any]:
    config, engine = fp16_engine(rank, world_size, stage, cur_scale=2.0**28, cur_hysteresis=1)
    stats, changed, before = [], [], state_of(engine)
    for each in take_steps(engine, config, range(1, STEPS + 1)):
        stats.append((each.applied, each.loss_scale, each.gradient_norm))
        after = state_of(engine)
        changed.append(not is_equal(before, after))
        before = after
    return {"stats": stats, "changed": changed, "counters": engine.counters()}


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_overflow_of_fp16_skips_the_step_and_halves_the_scale(world_size: int, stage: int) -> None:
    for report in run_ranks(overflowing_rank, world_size, stage, timeout_s=TIMEOUT_S, backend="nccl"):
        applied, scales, norms = zip(*report["stats"], strict=True)
        skipped = applied.index(True)
        assert 0 < skipped < STEPS - 5
        assert list(scales[: skipped + 1]) == [2.0**28 / 2**step for step in range(skipped + 1)]
        assert report["changed"] == list(applied), "a skipped step changes nothing, an applied one does"
        assert [norm < float("inf") for norm in norms] == list(applied)
        assert report["counters"]["steps_taken"] == sum(applied)
        assert report["counters"]["cur_iter"] == STEPS


def growing_rank(rank: int, world_size: int, stage: int, cur_iter: int) -> tuple[float, float, dict[str, Tensor]]:
    config, engine = fp16_engine(rank, world_size, stage, cur_iter=cur_iter)
    (stats,) = take_steps(engine, config, range(1, 2))
    return stats.gradient_norm, engine.counters()["cur_scale"], state_of(engine)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_step_before_the_loss_scale_grows_applies_the_whole_gradient(stage: int) -> None:
    (steady,) = run_ranks(growing_rank, 1, stage, 0, timeout_s=TIMEOUT_S, backend="nccl")
    (growing,) = run_ranks(growing_rank, 1, stage, 999, timeout_s=TIMEOUT_S, backend="nccl")
    assert growing[1] == 2 * steady[1]
    assert growing[0] == pytest.approx(steady[0], rel=1e-6)
    for name, value in steady[2].items():
        torch.testing.assert_close(growing[2][name], value, rtol=1e-3, atol=1e-6)


def cpu_rank(rank: int, world_size: int) -> tuple[list[float], bool]:
    report = engine_rank(rank, world_size, ("--engine.zero_stage=2", "--offload.optimizer=deepspeed_cpu"))
    return report["losses"], torch.cuda.is_initialized()


def test_a_run_on_the_cpu_leaves_the_gpu_alone(
    reference: tuple[list[float], list[float], dict[str, Tensor]],
) -> None:
    for losses, touched in run_ranks(cpu_rank, 2, timeout_s=TIMEOUT_S):
        assert relative(losses, reference[0]) < 1e-4
        assert not touched


def run_half(rank: int, world_size: int, overrides: tuple[str, ...], folder: str, part: str) -> tuple[Any, ...]:
    """Take all steps, saving half-way (`whole`), or load into other weights and take the second half (`second`)."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # what torch asks for before it promises determinism
    torch.cuda.set_device(rank)
    torch.use_deterministic_algorithms(True)
    config = configure(f"--parallel.replicate={world_size}", "--engine.device=cuda", *overrides)
    engine = build_engine(config, rank)
    if config.engine.precision == "fp16":  # overflows on both sides of the save
        engine.after_load({**engine.counters(), "cur_scale": 2.0**30, "cur_hysteresis": 2})
    half = STEPS // 2
    with ck.Checkpointer(folder, rank=rank, world_size=world_size, run_id=part) as checkpointer:
        if part == "whole":
            list(take_steps(engine, config, range(1, half + 1)))
            checkpointer.save(half, engine.slices(), shared=engine.counters()).result()
        else:
            for held in engine.slices().values():
                (held.tensor if isinstance(held, FlatSlice) else held).fill_(7.0)
            info = checkpointer.latest(verify="deep")
            assert info is not None
            engine.after_load(checkpointer.load(info, engine.slices()).shared)
    stats = list(take_steps(engine, config, range(half + 1, STEPS + 1)))
    steps = [(each.loss, each.gradient_norm, each.loss_scale, each.applied) for each in stats]
    return steps, engine.counters(), state_of(engine)


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize(
    "overrides",
    [
        ("--engine.zero_stage=0",),
        ("--engine.zero_stage=2", "--engine.precision=fp16"),
        ("--engine.zero_stage=3", "--engine.precision=fp16"),
        ("--engine.zero_stage=3", "--engine.precision=bf16", "--offload.optimizer=deepspeed_cpu"),
        ("--engine.zero_stage=3", "--optim.kind=muon"),
        ("--engine.zero_stage=2", "--optim.kind=muon", "--engine.precision=bf16"),
    ],
    ids=" ".join,
)
def test_an_engine_loaded_half_way_takes_the_same_steps(
    world_size: int, overrides: tuple[str, ...], tmp_path: Path
) -> None:
    """Bit for bit, the loss scaler and the counts of updates included."""
    halves = [
        run_ranks(run_half, world_size, overrides, str(tmp_path), part, timeout_s=TIMEOUT_S, backend="nccl")
        for part in ("whole", "second")
    ]
    for (steps, counters, state), (steps_after, counters_after, state_after) in zip(*halves, strict=True):
        assert steps_after == steps
        assert counters_after == counters
        for name, value in state.items():
            assert torch.equal(state_after[name], value), name
    if "--engine.precision=fp16" in overrides:
        assert {applied for *_, applied in halves[0][0][0]} == {True, False}
