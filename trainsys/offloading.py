"""What of `offload` runs with what: one table of refusals, and what a run does for the rest."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from parallel.legal import Backend
from trainsys.config import RunConfig

Recompute = Literal["none", "selective", "full"]
"""As trainsys.models.recompute says."""

if TYPE_CHECKING:
    import torch
    from torch import nn

    from trainsys.metrics import Record

_DEEPSPEED = ("deepspeed_cpu", "deepspeed_nvme")


@dataclass(frozen=True, slots=True)
class Rule:
    """Settings that exclude each other."""

    key: str
    applies: Callable[[RunConfig], bool]
    message: str
    """What is wrong; what is allowed."""


def _has_parts(config: RunConfig) -> bool:
    """Whether a rank has a part of the model or of a sequence."""
    degrees = config.parallel
    return max(degrees.pipeline, degrees.shard, degrees.context, degrees.tensor, degrees.expert) > 1


RULES: tuple[Rule, ...] = (
    Rule(
        "offload.optimizer",
        lambda c: c.offload.optimizer in _DEEPSPEED and c.engine.zero_stage == 0,
        "DeepSpeed offloads sharded optimizer state alone; allowed with engine.zero_stage = 1, 2, 3",
    ),
    Rule(
        "offload.optimizer",
        lambda c: c.offload.optimizer == "deepspeed_nvme" and c.engine.zero_stage != 3,
        "deepspeed_nvme: DeepSpeed swaps the states of ZeRO 3 alone; allowed with engine.zero_stage = 3, or tiered "
        "with offload.nvme_dir and offload.host_bytes",
    ),
    Rule(
        "offload.parameters",
        lambda c: c.offload.parameters in _DEEPSPEED and c.engine.zero_stage != 3,
        "DeepSpeed offloads the parameters of ZeRO 3 alone; allowed with engine.zero_stage = 3, or streamed with "
        "engine.zero_stage = 0",
    ),
    Rule(
        "offload.parameters",
        lambda c: c.offload.parameters in _DEEPSPEED and c.offload.optimizer == "none",
        "without offload.optimizer DeepSpeed keeps masters of offloaded parameters on the device and does not step "
        "them; allowed with offload.optimizer = deepspeed_cpu, deepspeed_nvme",
    ),
    Rule(
        "checkpoint.every",
        lambda c: "deepspeed_nvme" in (c.offload.optimizer, c.offload.parameters) and c.checkpoint.every > 0,
        "DeepSpeed keeps what is on NVMe in files of its own, which checkpoints cannot read; allowed: 0, or "
        "offload.optimizer = tiered",
    ),
    Rule(
        "offload.nvme_dir",
        lambda c: "deepspeed_nvme" in (c.offload.optimizer, c.offload.parameters) and not c.offload.nvme_dir,
        "missing; deepspeed_nvme needs a folder on the disk",
    ),
    Rule(
        "offload.nvme_dir",
        lambda c: c.offload.optimizer == "tiered" and c.offload.host_bytes > 0 and not c.offload.nvme_dir,
        "missing; what offload.host_bytes does not hold needs a folder on a disk",
    ),
    Rule(
        "offload.optimizer",
        lambda c: c.offload.optimizer == "tiered" and c.optim.kind != "adamw",
        "tiered is AdamW; allowed with optim.kind = adamw",
    ),
    Rule(
        "offload.optimizer",
        lambda c: c.offload.optimizer == "tiered" and c.offload.parameters != "none",
        "tiered updates weights that are on the device; streamed ones are in CPU memory beside their states and are "
        "updated there, DeepSpeed's are its own; allowed with offload.parameters = none",
    ),
    Rule(
        "offload.optimizer",
        lambda c: c.offload.parameters == "streamed" and c.offload.optimizer in _DEEPSPEED,
        "streamed parameters have their optimizer states beside them in CPU memory; allowed: none",
    ),
    Rule(
        "offload.parameters",
        lambda c: c.offload.parameters == "streamed" and _has_parts(c),
        "streamed is for whole replicas: layers are summed in CPU memory, one after the other, and parts of "
        "layers are not; allowed with all degrees but replicate 1, or deepspeed_cpu",
    ),
    Rule(
        "offload.parameters",
        lambda c: c.offload.parameters == "streamed" and c.engine.zero_stage != 0,
        "streamed: replicas shard nothing; allowed with engine.zero_stage = 0",
    ),
    Rule(
        "offload.parameters",
        lambda c: c.offload.parameters == "streamed" and c.optim.kind != "adamw",
        "streamed: muon's products of matrices belong on the device; allowed with optim.kind = adamw",
    ),
    Rule(
        "engine.compile",
        lambda c: c.engine.compile and c.offload.parameters == "streamed",
        "true: compiled blocks skip the hooks that stream them; allowed with offload.parameters = streamed: false",
    ),
    Rule(
        "engine.compile",
        lambda c: c.engine.compile and c.offload.activations in ("swap", "auto"),
        "true: compiled blocks choose what they save; allowed with offload.activations = swap, auto: false",
    ),
    Rule(
        "engine.recompute",
        lambda c: c.offload.activations == "recompute" and c.engine.recompute == "selective",
        "selective contradicts offload.activations = recompute; allowed: none, full",
    ),
    Rule(
        "engine.recompute",
        lambda c: c.offload.activations in ("swap", "auto") and c.engine.recompute != "none",
        "blocks that compute again save nothing to swap; allowed with offload.activations = swap, auto: none",
    ),
    Rule(
        "offload.activations",
        lambda c: c.offload.activations == "auto" and c.offload.parameters == "streamed",
        "auto measures blocks whose weights stay; allowed with offload.parameters = streamed: none, recompute, swap",
    ),
    Rule(
        "offload.activations",
        lambda c: c.offload.activations in ("swap", "auto") and c.parallel.pipeline > 1,
        "in a pipeline several micro-batches are between forward and backward, in an order that swapping does not "
        "know; allowed: none, recompute",
    ),
)
"""All of them; whatever none applies to is run by a test."""


def problems(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Yield (key, what is wrong; what is allowed) for what the table refuses."""
    for rule in RULES:
        if rule.applies(config):
            yield rule.key, rule.message


def engine_refusals(config: RunConfig) -> dict[Backend, str]:
    """Return the engines that cannot do what `offload` asks for, with the reason."""
    offload, found = config.offload, dict[Backend, str]()
    if offload.optimizer in _DEEPSPEED or offload.parameters in _DEEPSPEED:
        found["torch"] = "DeepSpeed's offload is DeepSpeed's"
    if offload.optimizer == "tiered":
        found["deepspeed"] = "its ZeRO has masters of its own, which offload.optimizer = tiered replaces"
    if offload.parameters == "streamed":
        found["deepspeed"] = "it moves parameters by itself, and not those that offload.parameters = streamed does"
    return found


def recompute_of(config: RunConfig) -> Recompute:
    """Return what blocks compute again in backward."""
    return "full" if config.offload.activations == "recompute" else config.engine.recompute


def swapping(config: RunConfig, module: nn.Module, device: torch.device) -> AbstractContextManager[Any]:
    """Return what swaps the activations of a model's blocks, as the run asks for; streamed blocks have their own."""
    from offload.activations import Activations, Automatic
    from trainsys.models import blocks

    kind = config.offload.activations
    if kind not in ("swap", "auto") or config.offload.parameters == "streamed":
        return contextlib.nullcontext()
    layers = blocks(module)
    if kind == "auto":
        return Automatic(module, layers, device=device)
    return Activations(layers, ["swap"] * len(layers), device=device).attach()


def seen(engine: object) -> Record:
    """Return what an engine's offload did since the last call; nothing where it has none."""
    from trainsys.metrics import offload_record

    trace = getattr(engine, "trace", None)
    return {} if trace is None else offload_record(trace.step())


def write_trace(engine: object, path: Path) -> None:
    """Write what an engine's offload has moved, under what, as a Chrome trace; nothing where it has none."""
    trace = getattr(engine, "trace", None)
    if trace is not None:
        trace.write(path)


def home_of(config: RunConfig, device: torch.device) -> torch.device:
    """Return where the model's weights are when its engine takes it over."""
    import torch

    return torch.device("cpu") if config.offload.parameters == "streamed" else device


def compute_device(config: RunConfig, weights: torch.device) -> torch.device:
    """Return where a model computes whose weights are on `weights`."""
    import torch

    if config.offload.parameters == "streamed" and config.engine.device != "cpu" and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return weights
