"""What a tiered optimizer refuses before it begins: all problems at once."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from offload.errors import OptimizerError
from offload.schedule import Mode

if TYPE_CHECKING:
    from offload.machine import Tiering

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_settings(mode: Mode, max_norm: float | None, tiering: Tiering) -> None:
    """Raise OptimizerError about settings that exclude each other."""
    problems = []
    if mode not in ("sync", "defer", "stream", "spec"):
        problems.append(f"mode: {mode!r}; allowed: sync, defer, stream, spec")
    if max_norm is not None and not (max_norm > 0 and math.isfinite(max_norm)):
        problems.append(f"max_norm: {max_norm}; above 0, or None not to clip")
    if mode == "stream" and max_norm is not None:
        problems.append("mode: stream; it updates before the norm is known: max_norm needs spec, defer or sync")
    steps = tiering.accumulation_steps
    if steps is not None and steps < 1:
        problems.append(f"accumulation_steps: {steps}; at least 1")
    if mode in ("stream", "spec") and steps is None:
        problems.append(f"mode: {mode}; tiering.accumulation_steps is needed: how many backwards precede a step()")
    if problems:
        raise OptimizerError("\n".join(problems))


def check_parameters(groups: list[list[torch.Tensor]]) -> None:
    """Raise OptimizerError about parameters, by group, that cannot be updated together."""
    problems = []
    devices = {parameter.device for group in groups for parameter in group}
    if len(devices) > 1:
        problems.append(f"parameters: on {', '.join(sorted(map(str, devices)))}; all of them on one device")
    for index, group in enumerate(groups):
        found = {parameter.dtype for parameter in group}
        if len(found) > 1 or not found <= set(_DTYPES):
            names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in found))
            problems.append(f"param_groups[{index}]: {names}; one of float32, bfloat16, float16 a group")
        if any(not parameter.is_contiguous() for parameter in group):
            problems.append(f"param_groups[{index}]: a parameter is not contiguous; call contiguous() on it first")
    if problems:
        raise OptimizerError("\n".join(problems))
