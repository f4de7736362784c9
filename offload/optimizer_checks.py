"""What a tiered optimizer refuses before it begins: all problems at once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from offload import norms
from offload.errors import OptimizerError
from offload.group import Group
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
    budget, link = tiering.budget, tiering.link_bytes_per_s
    for key, value, allowed, right in (
        ("num_threads", tiering.num_threads, "at least 1", tiering.num_threads is None or tiering.num_threads >= 1),
        ("num_tier_slots", tiering.num_tier_slots, "at least 1", tiering.num_tier_slots >= 1),
        ("link_bytes_per_s", link, "above 0", link is None or link > 0),
        ("kernel", repr(tiering.kernel), "native, torch", tiering.kernel in ("native", "torch")),
        ("budget.device_bytes", budget.device_bytes, "at least 0", budget.device_bytes >= 0),
        ("budget.host_bytes", budget.host_bytes, "at least 0", budget.host_bytes is None or budget.host_bytes >= 0),
        ("budget.num_slots", budget.num_slots, "at least 1", budget.num_slots >= 1),
    ):
        if not right:
            problems.append(f"{key}: {value}; {allowed}")
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


def check_groups(groups: Sequence[Mapping[str, Any]]) -> list[Group]:
    """Return the hyper-parameters of all groups as they are now; raise OptimizerError about those that cannot be."""
    problems: list[str] = []
    found = []
    for index, group in enumerate(groups):
        missing = [key for key in ("lr", "betas", "eps", "weight_decay") if key not in group]
        if missing:
            problems.append(f"param_groups[{index}]: no {', '.join(missing)}; a state of AdamW has them")
            continue
        betas = float(group["betas"][0]), float(group["betas"][1])
        found.append(Group(float(group["lr"]), betas, float(group["eps"]), float(group["weight_decay"])))
        for key in ("lr", "eps", "weight_decay"):
            value = float(group[key])
            if not (value >= 0 and math.isfinite(value)):
                problems.append(f"param_groups[{index}].{key}: {value}; finite, at least 0")
        if not all(0 <= beta < 1 for beta in betas):
            problems.append(f"param_groups[{index}].betas: {betas}; at least 0 and below 1")
        problems += [
            f"param_groups[{index}].{key}: {group[key]}; this AdamW has none: False, or torch.optim.AdamW"
            for key in ("amsgrad", "maximize")
            if group.get(key)
        ]
    if problems:
        raise OptimizerError("\n".join(problems))
    return found


def check_apart(parameters: Sequence[torch.Tensor]) -> None:
    """Raise OptimizerError where one parameter is there twice: it would be updated twice."""
    seen: dict[int, int] = {}
    for number, parameter in enumerate(parameters):
        first = seen.setdefault(id(parameter), number)
        if first != number:
            raise OptimizerError(f"params: {number} is {first} again; give a tied parameter once")


def check_gradient(number: int, gradient: torch.Tensor) -> None:
    """Raise OptimizerError about a gradient that no kernel here reads."""
    if gradient.layout != torch.strided:
        kind = str(gradient.layout).removeprefix("torch.")
        raise OptimizerError(
            f"parameter {number}: its gradient is {kind}; AdamW moves every element in every step: give it dense ones "
            "(sparse=False), or train it with an optimizer of its own, such as SparseAdam"
        )


def check_entries(parameters: Sequence[torch.Tensor], entries: Mapping[int, Mapping[str, Any]]) -> None:
    """Raise OptimizerError about saved states that are not of these parameters, all of them at once."""
    problems = [
        f"state[{number}]: there are {len(parameters)} parameters"
        for number in entries
        if number not in range(len(parameters))
    ]
    for number, parameter in enumerate(parameters):
        entry = entries.get(number, {})
        if entry and not {"step", "exp_avg", "exp_avg_sq"} <= entry.keys():
            problems.append(
                f"state[{number}]: {', '.join(sorted(map(str, entry)))}; of AdamW: step, exp_avg, exp_avg_sq"
            )
        shape = norms.local(parameter).shape
        for kind in ("master", "exp_avg", "exp_avg_sq"):
            saved = entry.get(kind)
            if isinstance(saved, torch.Tensor) and norms.local(saved).shape != shape:
                problems.append(
                    f"state[{number}].{kind}: {tuple(norms.local(saved).shape)}; the parameter is {tuple(shape)}"
                )
    if problems:
        raise OptimizerError("\n".join(problems))
