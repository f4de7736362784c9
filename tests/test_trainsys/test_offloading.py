"""Each way of offloading trains as without it, or is refused with the reason."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import get_args, get_type_hints

import pytest
import torch
from torch import distributed as dist

from offload.activations import Activations
from offload.config import OffloadConfig
from parallel import Mesh, MeshGroups, hybrid
from tests.ranks import run_ranks
from tests.test_trainsys import runs
from tests.test_trainsys.test_engine import STEPS, Fences, build, configure, plain_loop, relative, take_steps
from trainsys import metrics, models
from trainsys.check import backend_of, check
from trainsys.config import RunConfig
from trainsys.deepspeed_setup import deepspeed_settings
from trainsys.engine import DeepSpeedEngine
from trainsys.engines import DTYPES, Engine, open_engine
from trainsys.errors import ConfigError
from trainsys.offloading import RULES, seen, swapping
from trainsys.optim import build_optimizer

LENGTH = 24
WIDE = "--model.ffn_dim=1024"
"""Makes activations large enough to be worth a swap."""


def open_small(rank: int, world_size: int, overrides: tuple[str, ...]) -> Engine:
    config = configure(f"--parallel.replicate={world_size}", *overrides)
    check(config, world_size=world_size)
    model = build(config, rank).to(DTYPES[config.engine.precision])
    part = hybrid.apply(model, MeshGroups(Mesh(config.parallel, dist.get_world_size())), models.Anatomy(LENGTH))
    return open_engine(part, config, lambda module: build_optimizer(module, config.optim))


def trained(rank: int, world_size: int, overrides: tuple[str, ...]) -> tuple[list[float], list[float], int]:
    """Losses, gradient norms and fences of the steps of test_engine."""
    torch.set_num_threads(1)
    config = configure(f"--parallel.replicate={world_size}", *overrides)
    engine, fences = open_small(rank, world_size, overrides), Fences()
    engine.fence_with(fences)
    with swapping(config, engine.module, engine.device) as swapped:
        stats = list(take_steps(engine, config, range(1, STEPS + 1)))
        if isinstance(swapped, Activations):
            assert swapped.swapped_bytes > 0
        if config.offload.optimizer == "tiered":
            record = seen(engine)
            assert record["offload/moved_bytes"] > 0
            assert record["offload/stall_s"] >= 0
    engine.close()
    return [each.loss for each in stats], [each.gradient_norm for each in stats], fences.count


@pytest.fixture(scope="module")
def plain() -> tuple[list[float], list[float]]:
    return plain_loop(configure())[:2]


@pytest.mark.parametrize(
    ("world_size", "overrides"),
    [
        (1, ("--engine.zero_stage=0", "--offload.optimizer=tiered")),
        (2, ("--engine.zero_stage=1", "--offload.optimizer=tiered")),
        (2, ("--engine.zero_stage=2", "--offload.optimizer=tiered")),
        (2, ("--engine.zero_stage=3", "--offload.optimizer=tiered")),
        (1, ("--engine.zero_stage=0", "--offload.parameters=streamed", "--offload.window_layers=1")),
        (1, ("--engine.zero_stage=0", "--offload.parameters=streamed", "--offload.activations=swap", WIDE)),
        (2, ("--engine.zero_stage=2", "--offload.activations=swap", WIDE)),
        (2, ("--engine.zero_stage=3", "--engine.backend=torch", "--offload.activations=swap", WIDE)),
        (2, ("--engine.zero_stage=1", "--offload.optimizer=tiered", "--offload.activations=auto", WIDE)),
        (
            2,
            (
                "--engine.zero_stage=3",
                "--offload.optimizer=deepspeed_cpu",
                "--offload.parameters=deepspeed_cpu",
            ),
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else str(value),
)
def test_offloaded_steps_equal_a_plain_torch_loop(
    world_size: int, overrides: tuple[str, ...], plain: tuple[list[float], list[float]]
) -> None:
    """fp32 within 1e-6 relative, one rank or two: sums are taken in another order, nothing else."""
    reports = run_ranks(trained, world_size, overrides, timeout_s=120)
    expected = plain_loop(configure(WIDE))[:2] if WIDE in overrides else plain
    assert relative(reports[0][0], expected[0]) < 1e-6
    assert relative(reports[0][1], expected[1]) < 1e-4
    assert reports[0][2] >= STEPS, "no update without a fence"


def bf16_losses(rank: int, world_size: int) -> list[list[float]]:
    """Of one rank in bf16: torch's engine as it is, with the tiered optimizer, and with streamed parameters."""
    bf16 = ("--engine.precision=bf16", "--engine.zero_stage=0", "--engine.backend=torch")
    settings = ((), ("--offload.optimizer=tiered",), ("--offload.parameters=streamed", "--offload.window_layers=1"))
    return [trained(rank, world_size, (*bf16, *offload))[0] for offload in settings]


def test_bf16_stays_within_its_rounding_of_the_resident_run() -> None:
    """Streamed gradients are added up in bf16, where torch's engine adds micro-batches in fp32: 8 bits of mantissa."""
    ((resident, tiered, streamed),) = run_ranks(bf16_losses, 1, timeout_s=120)
    assert relative(tiered, resident) < 1e-2
    assert relative(streamed, resident) < 1e-2


VALUES = {key: get_args(hint) for key, hint in get_type_hints(OffloadConfig).items() if get_args(hint)}


def test_every_combination_has_an_engine_or_a_reason() -> None:
    keys = ("optimizer", "parameters", "activations")
    base = configure("--parallel.replicate=1")
    allowed = 0
    for values, stage in itertools.product(itertools.product(*(VALUES[key] for key in keys)), range(4)):
        config = replace(
            base,
            offload=OffloadConfig(**dict(zip(keys, values, strict=True)), nvme_dir="/tmp"),
            engine=replace(base.engine, zero_stage=stage),
            checkpoint=replace(base.checkpoint, every=0 if "deepspeed_nvme" in values else 10),
        )
        try:
            check(config)
        except ConfigError as error:
            for line in str(error).splitlines():
                assert line.startswith(("config: offload.", "config: engine.")), line
                assert "allowed" in line or "does not run on" in line, line
        else:
            allowed += 1
            expected = "torch" if "tiered" in values or "streamed" in values else "deepspeed"
            assert backend_of(config) == expected
    # none, deepspeed_cpu, tiered; nvme and parameters under ZeRO 3; streamed under ZeRO 0; 4 activations, but for one.
    assert allowed == 4 * (4 + 3 + 4 + 1 + 4 + 1) - 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--offload.optimizer=deepspeed_cpu", "--engine.zero_stage=0"], "sharded optimizer state alone"),
        (["--offload.optimizer=deepspeed_nvme", "--engine.zero_stage=2"], "swaps the states of ZeRO 3 alone"),
        (["--offload.parameters=deepspeed_cpu", "--engine.zero_stage=2"], "parameters of ZeRO 3 alone"),
        (["--offload.parameters=deepspeed_cpu", "--engine.zero_stage=3"], "keeps masters of offloaded parameters"),
        (["--offload.optimizer=deepspeed_nvme", "--engine.zero_stage=3"], "which checkpoints cannot read"),
        (["--offload.optimizer=deepspeed_nvme", "--engine.zero_stage=3"], "deepspeed_nvme needs a folder"),
        (["--offload.optimizer=tiered", "--offload.host_bytes=1"], "needs a folder on a disk"),
        (["--offload.optimizer=tiered", "--optim.kind=muon"], "tiered is AdamW"),
        (["--offload.optimizer=tiered", "--offload.parameters=streamed"], "tiered updates weights that are on"),
        (["--offload.optimizer=deepspeed_cpu", "--offload.parameters=streamed"], "states beside them in CPU memory"),
        (["--parallel.tensor=2", "--offload.parameters=streamed"], "streamed is for whole replicas"),
        (["--engine.zero_stage=1", "--offload.parameters=streamed"], "replicas shard nothing"),
        (["--optim.kind=muon", "--offload.parameters=streamed"], "products of matrices belong on the device"),
        (["--engine.compile=true", "--offload.parameters=streamed"], "skip the hooks that stream them"),
        (["--engine.compile=true", "--offload.activations=swap"], "choose what they save"),
        (["--engine.recompute=selective", "--offload.activations=recompute"], "contradicts"),
        (["--engine.recompute=full", "--offload.activations=auto"], "save nothing to swap"),
        (["--offload.parameters=streamed", "--offload.activations=auto"], "auto measures blocks whose weights stay"),
        (["--parallel.pipeline=2", "--offload.activations=swap"], "in an order that swapping does not know"),
    ],
)
def test_what_does_not_go_together_is_refused_with_the_reason(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as info:
        check(configure(*overrides))
    assert any(message in line for line in str(info.value).splitlines()), str(info.value)


def test_every_rule_is_tried() -> None:
    parameters = test_what_does_not_go_together_is_refused_with_the_reason.pytestmark[0].args[1]  # type: ignore[attr-defined]
    assert len(parameters) == len(RULES)
    for rule in RULES:
        assert any(message in rule.message for _, message in parameters), rule.message


def test_a_streamed_run_tells_what_it_moved_and_waited_for(tmp_path: Path) -> None:
    text = runs.write_text(tmp_path / "text")
    settings = ["--steps=4", "--parallel.replicate=1", "--engine.zero_stage=0", "--offload.parameters=streamed"]
    settings += ["--offload.window_layers=1", "--profile.start_step=2", "--profile.num_steps=1", "--name=seen"]
    runs.succeed("launch", *runs.arguments(f"--data.path={text}", *settings), cwd=tmp_path)
    records = [r for r in metrics.read(tmp_path / "runs" / "seen" / "metrics.jsonl") if "offload/moved_bytes" in r]
    assert len(records) == 4
    assert all(record["offload/moved_bytes"] > 0 for record in records)
    assert all(record["memory/peak_host_bytes"] > 0 for record in records)
    (trace,) = (tmp_path / "runs" / "seen" / "profile").glob("*.offload.json")
    names = {event["args"].get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"compute", "cpu to gpu", "gpu to cpu"} <= names


def test_tiered_state_moves_to_any_other_placement_through_a_checkpoint(tmp_path: Path) -> None:
    """Six steps tiered on two ranks, then on one rank in DeepSpeed, then tiered with most states on a disk."""
    text = runs.write_text(tmp_path / "text")
    shared = [f"--data.path={text}", "--schedule.kind=constant", "--evaluation.every=0", "--evaluation.sample_tokens=0"]

    def train(name: str, steps: int, *overrides: str) -> None:
        resume = ["--resume"] if (tmp_path / "runs" / name).exists() else []
        arguments = runs.arguments(*shared, f"--name={name}", f"--steps={steps}", *overrides)
        runs.succeed("launch", *arguments, *resume, cwd=tmp_path)

    whole = ["--parallel.replicate=1", "--engine.zero_stage=0"]
    train("plain", 12, *whole)
    train("moved", 4, "--parallel.replicate=2", "--engine.zero_stage=1", "--offload.optimizer=tiered")
    train("moved", 8, "--parallel.replicate=1", "--engine.zero_stage=1", "--offload.optimizer=deepspeed_cpu")
    disk = [f"--offload.nvme_dir={tmp_path}", "--offload.host_bytes=4096"]
    train("moved", 12, *whole, "--offload.optimizer=tiered", *disk)
    expected, found = (runs.losses(tmp_path / "runs" / name) for name in ("plain", "moved"))
    assert found.keys() == expected.keys()
    assert relative(list(found.values()), list(expected.values())) < 1e-5


def test_deepspeed_on_a_disk_trains_as_a_plain_loop_or_says_what_to_install(
    tmp_path: Path, plain: tuple[list[float], list[float]]
) -> None:
    config = configure(
        "--parallel.replicate=1",
        "--engine.zero_stage=3",
        "--offload.optimizer=deepspeed_nvme",
        "--offload.parameters=deepspeed_nvme",
        "--offload.nvme_dir=/tmp",
        "--checkpoint.every=0",
    )
    check(config)
    zero = deepspeed_settings(config)["zero_optimization"]
    for kind in ("optimizer", "param"):
        assert zero[f"offload_{kind}"] == {"device": "nvme", "pin_memory": False, "nvme_path": "/tmp"}
    op_builder = pytest.importorskip("deepspeed.ops.op_builder")
    if op_builder.AsyncIOBuilder().is_compatible(verbose=False):  # the first time it builds for some minutes
        disk = ("--engine.zero_stage=3", "--offload.optimizer=deepspeed_nvme", f"--offload.nvme_dir={tmp_path}")
        for more in ((), ("--offload.parameters=deepspeed_nvme",)):
            (report,) = run_ranks(trained, 1, ("--checkpoint.every=0", *disk, *more), timeout_s=600)
            assert relative(report[0], plain[0]) < 1e-6
            assert relative(report[1], plain[1]) < 1e-4
        return
    with pytest.raises(ConfigError, match=r"offload\.optimizer: deepspeed_nvme builds .* libaio's headers"):
        run_alone(config)


def run_alone(config: RunConfig) -> None:
    """Open the engine as far as it gets without a group."""
    part = SimpleNamespace(module=build(config))
    DeepSpeedEngine(part, config, lambda module: build_optimizer(module, config.optim))  # type: ignore[arg-type]
