"""`trainsys plan RECIPE --offload`: bytes per tier, time per step and efficiency that a run will have, from a probe."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from offload import TierSpec
from offload.machine import NUM_OUTS, Tiering
from offload.placement import Placement, TensorUse, TierOffer, Walker, efficiency, place
from offload.schedule import STATE_BYTES, Budget, Interleave, Plan, Rates, Subgroup, cut, plan, predict
from trainsys import models, offloading
from trainsys.check import accumulation_steps, check, data_ranks, num_ranks
from trainsys.config import RunConfig
from trainsys.engines import DTYPES
from trainsys.errors import ConfigError
from trainsys.precision import Ability, ability_of, alone

_BYTE_VOCABULARY = 320
"""Rows of the embedding for tokenizer = bytes."""
_SUBGROUP_NUMEL = Tiering().subgroup_numel


@dataclass(frozen=True, slots=True)
class Machine:
    """What a probe found: medians by metric, and tiers."""

    figures: Mapping[str, float]
    tiers: tuple[TierOffer, ...]
    has_gpu: bool

    @property
    def flops_per_s(self) -> float:
        """Of large products of matrices."""
        return self.figures["cuda.matmul" if self.has_gpu else "cpu.matmul"]

    @property
    def rates(self) -> Rates:
        """What updates and copies do."""
        cpu = self.figures.get("cpu.tiered_adamw", self.figures["cpu.adamw"])
        if self.has_gpu:
            up, down = self.figures["cuda.host_to_device"], self.figures["cuda.device_to_host"]
            return Rates(
                cpu=cpu,
                device=self.figures.get("cuda.tiered_adamw", self.figures["cuda.adamw"]),
                up=up,
                down=down,
                both=self.figures["cuda.both"],
                cpu_beside=self.figures.get("cuda.cpu_beside"),
                stream_beside=self.figures.get("cuda.stream_beside"),
                **self._disk,
            )
        copied = max(value for metric, value in self.figures.items() if metric.startswith("memory.copy_"))
        return Rates(cpu=cpu, device=cpu, up=copied, down=copied, both=copied, **self._disk)

    @property
    def _disk(self) -> dict[str, float]:
        found = {"tier_read": self.figures.get("nvme.read"), "tier_write": self.figures.get("nvme.write")}
        return {name: rate for name, rate in found.items() if rate is not None}


@dataclass(frozen=True, slots=True)
class Workload:
    """What one rank does in a step."""

    num_parameters: int
    """That this rank updates."""
    weight_bytes: int
    """A parameter, as forward reads it."""
    flops: float
    """Forward and backward, without what is computed again."""
    layer_bytes: int
    """Activations that one block saves for one micro-batch; an estimate."""
    input_bytes: int
    """Of a block's input."""
    num_layers: int
    num_micro_batches: int


def read_probe(path: Path) -> Machine:
    """Return what `python -m offload probe` kept.

    Raises:
        ConfigError: it is not there, or not what the probe writes.
    """
    try:
        report = json.loads(path.read_text())
        figures = {row["metric"]: float(row["value"]) for row in report["measurements"] if row["value"] is not None}
        specs = [TierSpec(**spec) for spec in report["tiers"]]
        gpu = _gpu_offer(report, figures)
    except FileNotFoundError as error:
        raise ConfigError([f"--probe: {path} is not there; measure this machine: python -m offload probe"]) from error
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError([f"--probe: {path} is not a probe's file ({error}); run python -m offload probe"]) from error
    kinds: Mapping[str, Any] = {"cpu": "cpu", "nvme": "nvme"}
    offers = tuple(TierOffer(kind=kinds.get(spec.name, "cxl"), spec=spec) for spec in specs)
    return Machine(figures, (gpu, *offers), "cuda.matmul" in figures)


def describe(config: RunConfig, machine: Machine, *, utilisation: float, sources: Mapping[str, str]) -> str:
    """Return the plan of a run as text.

    `utilisation` is the share of the matrix rate that forward and backward reach.

    Raises:
        ConfigError: the settings contradict each other, or the vocabulary is not known yet.
        offload.PlacementError: it does not fit; with the bytes that are missing.
    """
    check(config, sources=sources)
    config = _on(machine, config)
    work = _workload(config)
    placement = place(_tensors(config, work, machine), machine.tiers)
    step_s, parts = _times(config, work, machine, utilisation)
    compute_s = work.flops / (machine.flops_per_s * utilisation)
    settings = config.offload
    lines = [
        f"{config.name}: {work.num_parameters / 1e9:.4g}B parameters a rank in {config.engine.precision}; "
        f"offload.optimizer = {settings.optimizer}, parameters = {settings.parameters}, "
        f"activations = {settings.activations}",
        "",
        placement.table(),
        "",
        *_tier_lines(placement),
        "",
        *(f"{name}: {taken_s:.4g} s" for name, taken_s in parts.items()),
        f"step: {step_s:.4g} s, {compute_s / step_s:.0%} of the time that forward and backward alone would take",
        *_efficiency_lines(config, work, machine, utilisation),
        f"predicted from the probe's figures, with forward and backward at {utilisation:.0%} of its matrix rate "
        f"({machine.flops_per_s / 1e12:.4g} TFLOP/s); activations are an estimate",
    ]
    return "\n".join(lines)


def _on(machine: Machine, config: RunConfig) -> RunConfig:
    """Return `config` with what `engine.precision = auto` comes to: a GPU's probe has multiplied bf16."""
    if machine.has_gpu and config.engine.device != "cpu":
        return alone(config, Ability("GPU", multiplies_bf16=True))
    return alone(config, ability_of(torch.device("cpu")))


def _workload(config: RunConfig) -> Workload:
    degrees, batch = config.parallel, config.batch
    vocab = config.model.vocab_size or (_BYTE_VOCABULARY if config.data.tokenizer == "bytes" else 0)
    if config.model.kind == "decoder" and not vocab:
        raise ConfigError(["config: model.vocab_size: 0 takes the tokenizer's, which a plan does not open; give it"])
    length = config.data.sequence_length
    with torch.device("meta"):
        model = models.build(config.model, vocab_size=vocab, max_positions=length, recompute="none", seed=0)
    total = models.num_parameters(model)
    tokens = batch.global_sequences * length
    ranks = num_ranks(degrees)
    model_ranks = ranks // (data_ranks(degrees) * degrees.context)
    width = DTYPES[config.engine.precision].itemsize
    dim, ffn = config.model.dim, config.model.ffn_dim or config.model.dim * 8 // 3
    micro = batch.micro_sequences * length // (degrees.context * degrees.tensor)
    return Workload(
        num_parameters=total // model_ranks,
        weight_bytes=width,
        flops=models.flops_per_token(model, length) * tokens / ranks,
        # Norms, queries, keys, values, the mixed values and the residual; gate, up and their product.
        layer_bytes=micro * width * (8 * dim + 3 * ffn),
        input_bytes=micro * width * dim,
        num_layers=config.model.num_layers // degrees.pipeline,
        num_micro_batches=accumulation_steps(config),
    )


def _tensors(config: RunConfig, work: Workload, machine: Machine) -> list[TensorUse]:
    """Return what a rank keeps, by who goes through it."""
    offload, count = config.offload, work.num_parameters
    stage, shards = config.engine.zero_stage, data_ranks(config.parallel) * config.parallel.context
    streamed = offload.parameters != "none"
    states: Walker = "gpu" if offload.optimizer == "none" and not streamed else "cpu"
    weights: Walker = "dma" if streamed else "gpu"
    own_master = 0 if work.weight_bytes == 4 else 4
    state_count = count // (shards if stage >= 1 else 1)
    found = [
        TensorUse(
            name="weights",
            num_bytes=count * work.weight_bytes // (shards if stage == 3 else 1),
            walker=weights,
            reads_per_step=2.0 * work.num_micro_batches,
            when="forward",
        ),
        TensorUse(
            name="gradients",
            num_bytes=count * work.weight_bytes // (shards if stage >= 2 else 1),
            walker="cpu" if streamed else "gpu",
            when="backward",
        ),
    ]
    if offload.optimizer == "tiered":
        return [*found, *_tiered_tensors(config, work, machine), *_activations(config, work)]
    found.append(TensorUse(name="optimizer moments", num_bytes=8 * state_count, walker=states))
    if own_master:
        found.append(TensorUse(name="fp32 masters", num_bytes=own_master * state_count, walker=states))
    if offload.optimizer.startswith("deepspeed"):
        found.append(TensorUse(name="fp32 gradients on the host", num_bytes=4 * state_count, walker="cpu"))
    if streamed:
        window = (config.offload.window_layers + 1) * count * work.weight_bytes // max(1, work.num_layers)
        found.append(TensorUse(name="window of weights", num_bytes=window, walker="gpu", when="forward"))
    return [*found, *_activations(config, work)]


def _tiered_plan(config: RunConfig, work: Workload, machine: Machine) -> tuple[list[Subgroup], Plan]:
    """Return the subgroups of this rank's part of the states, and where each is updated, as the optimizer will."""
    shards = data_ranks(config.parallel) * config.parallel.context if config.engine.zero_stage else 1
    offload, groups = config.offload, cut([[work.num_parameters // shards]], _SUBGROUP_NUMEL)
    budget = Budget(
        device_bytes=(offload.device_bytes or 2 << 30) if machine.has_gpu else 0, host_bytes=offload.host_bytes or None
    )
    interleave: Interleave = "auto" if machine.has_gpu else "cpu"
    return groups, plan([group.count for group in groups], machine.rates, interleave=interleave, budget=budget)


def _tiered_tensors(config: RunConfig, work: Workload, machine: Machine) -> list[TensorUse]:
    """Return the states of a tiered optimizer and the buffers through which they and gradients go."""
    groups, chosen = _tiered_plan(config, work, machine)
    on_host, on_disk = (chosen.numel(groups, path) for path in ("cpu", "tier"))
    largest = max(group.count for group in groups)
    uses: list[tuple[str, int, Walker]] = [
        ("optimizer states in host memory", STATE_BYTES * (on_host + chosen.numel(groups, "stream")), "cpu"),
        ("optimizer states on the device", STATE_BYTES * chosen.numel(groups, "resident"), "gpu"),
        ("optimizer states passing through the device", STATE_BYTES * largest * chosen.num_slots, "gpu"),
        ("optimizer states out of core", STATE_BYTES * on_disk, "dma"),
        ("gradients on the host", work.weight_bytes * (on_host + on_disk), "cpu"),
        ("new weights on their way up", work.weight_bytes * largest * NUM_OUTS, "cpu"),
        (
            "optimizer states on their way to and from the disk",
            STATE_BYTES * largest * Tiering().num_tier_slots if on_disk else 0,
            "cpu",
        ),
    ]
    return [TensorUse(name=name, num_bytes=size, walker=walker) for name, size, walker in uses if size]


def _activations(config: RunConfig, work: Workload) -> list[TensorUse]:
    how = config.offload.activations
    everything = work.layer_bytes * work.num_layers
    if offloading.recompute_of(config) == "full":
        kept = work.input_bytes * work.num_layers + work.layer_bytes
    elif how in ("swap", "auto"):
        kept = 2 * work.layer_bytes
    else:
        kept = everything
    found = [TensorUse(name="activations on the device", num_bytes=kept, walker="gpu", when="forward")]
    if how in ("swap", "auto"):
        found.append(TensorUse(name="swapped activations", num_bytes=everything, walker="dma", when="backward"))
    return found


def _times(config: RunConfig, work: Workload, machine: Machine, utilisation: float) -> tuple[float, dict[str, float]]:
    """Return the time of a step and of its parts."""
    rates, offload = machine.rates, config.offload
    forward_s = work.flops / 3 / (machine.flops_per_s * utilisation)
    backward_s = 2 * forward_s + (forward_s if offloading.recompute_of(config) == "full" else 0.0)
    shards = data_ranks(config.parallel) * config.parallel.context if config.engine.zero_stage else 1
    owned = work.num_parameters // shards
    if offload.parameters != "none":  # weights come up in forward and in backward, where gradients go down
        moved = work.num_parameters * work.weight_bytes
        forward_s = max(forward_s, moved * work.num_micro_batches / rates.up)
        backward_s = max(backward_s, moved * work.num_micro_batches * max(1 / rates.up, 1 / rates.down))
    if offload.activations in ("swap", "auto"):
        swapped = work.layer_bytes * work.num_layers * work.num_micro_batches
        forward_s, backward_s = max(forward_s, swapped / rates.down), max(backward_s, swapped / rates.up)
    parts = {"forward": forward_s, "backward": backward_s}
    if offload.optimizer == "tiered":
        groups, chosen = _tiered_plan(config, work, machine)
        counts = [group.count for group in groups]
        line = predict(counts, chosen.paths, rates, forward_s=forward_s, backward_s=backward_s, mode="defer")
        parts[f"update that no forward hides, of {line.update_s:.4g} s ({chosen.reason})"] = line.exposed_s
    elif offload.optimizer == "none" and offload.parameters == "none":
        parts["update"] = owned / rates.device
    else:  # after backward: gradients down, the update, weights up
        adamw = machine.figures["cpu.adamw"]
        moved_s = (
            0.0 if offload.parameters == "streamed" else owned * work.weight_bytes * (1 / rates.down + 1 / rates.up)
        )
        parts["update"] = owned / adamw + moved_s
    return sum(parts.values()), parts


def _tier_lines(placement: Placement) -> list[str]:
    capacities = {offer.spec.label: offer.spec.capacity_bytes for offer in placement.offers}
    return [
        f"{tier}: {used / 1e9:.3f} of {capacities[tier] / 1e9:.1f} GB" for tier, used in placement.used_bytes.items()
    ]


def _efficiency_lines(config: RunConfig, work: Workload, machine: Machine, utilisation: float) -> list[str]:
    """Return what is left of the rate if each kind of state moved in turn with compute (ZeRO-Infinity's formula)."""
    moved: dict[str, float] = {}
    if config.offload.parameters != "none":
        moved["weights and gradients"] = 3.0 * work.num_parameters * work.weight_bytes * work.num_micro_batches
    if config.offload.optimizer != "none":
        moved["optimizer states"] = 2.0 * STATE_BYTES * work.num_parameters
    if config.offload.activations in ("swap", "auto"):
        moved["activations"] = 2.0 * work.layer_bytes * work.num_layers * work.num_micro_batches
    link = min(machine.rates.up, machine.rates.down)
    return [
        f"efficiency with {name} over the link and nothing hidden: "
        + f"{efficiency(flops=work.flops, moved_bytes=num_bytes, bytes_per_s=link, peak_flops_per_s=peak):.0%}"
        for name, num_bytes in moved.items()
        for peak in (machine.flops_per_s * utilisation,)
    ]


def _gpu_offer(report: Mapping[str, Any], figures: Mapping[str, float]) -> TierOffer:
    """Return the device as a tier: the GPU, or without one the memory of the machine in its place."""
    memory, name = int(report["machine"].get("gpu_bytes", 0)), "gpu"
    if not memory:
        memory, name = int(report["machine"]["memory_bytes"]), "cpu as the device"
    rate = max(value for metric, value in figures.items() if metric.startswith("memory.copy_"))
    spec = TierSpec(name=name, capacity_bytes=memory, read_bytes_per_s=rate, write_bytes_per_s=rate, latency_s=0.0)
    return TierOffer(kind="gpu", spec=spec)
