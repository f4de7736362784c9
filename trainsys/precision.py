"""What a run trains in: the precision its recipe names, or with `auto` what the devices of all its ranks are made for.

Ranks decide it together when they first meet (`trainsys.setup`), and the run's record keeps it: with bf16 a checkpoint
has fp32 masters beside the weights, with fp32 it has none, so no later start may decide otherwise. Recipes are checked
with what is here, before torch is loaded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from trainsys.config import RunConfig
from trainsys.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import distributed as dist

Precision = Literal["fp32", "bf16", "fp16"]
Asked = Literal["auto", "fp32", "bf16", "fp16"]
"""As EngineConfig.precision."""

_CPU_INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "bf16")
"""Of x86, x86 and Arm: those with which oneDNN multiplies bf16."""


@dataclass(frozen=True, slots=True)
class Ability:
    """What `auto` asks of a rank's device."""

    device: Literal["CPU", "GPU"]
    multiplies_bf16: bool


@dataclass(frozen=True, slots=True)
class Choice:
    """The precision of a run, and what there is to say about it."""

    precision: Precision
    why: str = ""
    """What made `auto` this; empty where the recipe names it."""
    warning: str = ""
    """What the run loses by it and what helps; empty where nothing is lost."""

    def __str__(self) -> str:
        return f"{self.precision} (auto: {self.why})" if self.why else self.precision


def choose(asked: Asked, began: Asked, abilities: Sequence[Ability]) -> Choice:
    """Return the precision of a run whose recipe says `asked` and whose record `began`, which is `auto` at first.

    `abilities` are those of all ranks: where one of them lacks bf16, all take fp32.

    Raises:
        ConfigError: it is fp16, and a rank has no GPU.
    """
    lacking = _lacking(abilities)
    named, why = (began, "as the run began") if asked == "auto" else (asked, "")
    if named == "auto":
        if lacking:
            return Choice("fp32", f"{lacking} does not multiply bf16 in hardware")
        return Choice("bf16", f"this {abilities[0].device} multiplies bf16 in hardware")
    if named == "fp16" and any(ability.device == "CPU" for ability in abilities):
        raise ConfigError(["config: engine.precision: fp16 does not train on CPU; use bf16 or fp32"])
    if named != "bf16" or not lacking:
        return Choice(named, why)
    return Choice(
        named,
        why,
        f"warning: {lacking} does not multiply bf16 in hardware, which can make a step tens of times slower than in "
        "fp32; a new run with --engine.precision=auto takes fp32 here",
    )


def agree(asked: Asked, began: Asked, mine: Ability, control: dist.ProcessGroup) -> Choice:
    """Return what `choose` makes of the abilities of all ranks; every rank calls it, with the same `asked`, `began`.

    Raises:
        ConfigError: as `choose`, on every rank alike.
    """
    from torch import distributed as dist

    abilities = [mine] * control.size()
    dist.all_gather_object(abilities, mine, group=control)
    return choose(asked, began, abilities)


def ability_of(device: torch.device) -> Ability:
    """Return what a device is made for; on a GPU the current one is asked.

    Instructions, not a measurement: the same machine always gets the same answer, however busy it is.
    """
    import torch

    if device.type == "cuda":
        return Ability("GPU", torch.cuda.is_bf16_supported(including_emulation=False))
    has_onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return Ability("CPU", has_onednn and has_instructions(_capabilities()))


def alone(config: RunConfig, ability: Ability) -> RunConfig:
    """Return `config` with `auto` decided by one rank: for what is no training, a rehearsal or a plan."""
    if config.engine.precision != "auto":
        return config
    return with_precision(config, choose("auto", "auto", [ability]).precision)


def outcomes(config: RunConfig) -> list[RunConfig]:
    """Return what `config` may come to: where nobody knows the devices yet, all of it must hold together."""
    if config.engine.precision != "auto":
        return [config]
    return [with_precision(config, "fp32"), with_precision(config, "bf16")]


def with_precision(config: RunConfig, precision: Asked) -> RunConfig:
    """Return `config` with this precision."""
    return dataclasses.replace(config, engine=dataclasses.replace(config.engine, precision=precision))


def _lacking(abilities: Sequence[Ability]) -> str:
    """Return which devices do not multiply bf16, in words; empty where all do."""
    ranks = [rank for rank, ability in enumerate(abilities) if not ability.multiplies_bf16]
    if not ranks:
        return ""
    device = abilities[ranks[0]].device
    if len(ranks) == len(abilities):
        return f"this {device}"
    others = f" (and of {len(ranks) - 1} more)" if len(ranks) > 1 else ""
    return f"the {device} of rank {ranks[0]}{others}"


def has_instructions(capabilities: Mapping[str, object]) -> bool:
    """Return whether a CPU with these capabilities multiplies bf16.

    Without such instructions oneDNN converts to fp32 and back where there is AVX-512; elsewhere it leaves bf16 to a
    plain loop.
    """
    return any(bool(capabilities.get(name)) for name in _CPU_INSTRUCTIONS)


def _capabilities() -> Mapping[str, object]:
    """What torch says of this CPU; an older torch of x86 only."""
    import torch

    if hasattr(torch.cpu, "get_capabilities"):
        return dict(torch.cpu.get_capabilities())
    asked = {"avx512_bf16": "_is_avx512_bf16_supported", "amx_bf16": "_is_amx_tile_supported"}
    return {name: getattr(torch.cpu, function, bool)() for name, function in asked.items()}
