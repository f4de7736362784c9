"""The global norm of gradients and what it decides: computed where they are, read without stopping anybody."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from offload.rounds import Verdict
from offload.transfer import Lanes, Ticket


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a DTensor; any other tensor as it is."""
    to_local = getattr(tensor, "to_local", None)
    if to_local is None:
        return tensor
    part: Any = to_local()
    found: torch.Tensor = part.wait() if hasattr(part, "wait") else part
    return found


def groups_of(tensor: Any) -> tuple[dist.ProcessGroup, ...]:
    """Return the process groups over which a parameter is cut."""
    if not hasattr(tensor, "placements"):
        return ()
    mesh = tensor.device_mesh
    return tuple(mesh.get_group(dim) for dim, placement in enumerate(tensor.placements) if placement.is_shard())


def like(tensor: torch.Tensor, parameter: Any) -> torch.Tensor:
    """Return this rank's part of something as a DTensor cut as the parameter is; any other tensor as it is."""
    if not hasattr(parameter, "placements"):
        return tensor
    from torch.distributed.tensor import DTensor

    if tensor.device.type != parameter.device_mesh.device_type:
        tensor = tensor.to(parameter.device_mesh.device_type)
    whole: torch.Tensor = DTensor.from_local(
        tensor,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
    return whole


def norm_of(gradient: torch.Tensor) -> torch.Tensor:
    """Return the 2-norm of a gradient, in float32, on its device."""
    norm: torch.Tensor = torch.linalg.vector_norm(gradient, dtype=torch.float32)
    return norm


def total(
    norms: Sequence[torch.Tensor], groups: Sequence[tuple[dist.ProcessGroup, ...]], device: torch.device
) -> torch.Tensor:
    """Return the norm of all gradients together, in double precision on the device; a collective where they are cut.

    The sum is in the order given, so the same on every placement of the states.
    """
    sums: dict[tuple[dist.ProcessGroup, ...], list[torch.Tensor]] = {}
    for norm, cut_over in zip(norms, groups, strict=True):
        sums.setdefault(cut_over, []).append(norm)
    square = torch.zeros((), dtype=torch.float64, device=device)
    for cut_over, parts in sums.items():
        part = torch.stack(parts).double().square().sum()
        for group in cut_over:
            dist.all_reduce(part, group=group)
        square = square + part
    return square.sqrt()


@dataclass(frozen=True, slots=True)
class Scalars:
    """Norm, loss scale and whether something was infinite, on their way to the host."""

    values: torch.Tensor
    ticket: Ticket

    @classmethod
    def send(
        cls, norm: torch.Tensor | None, scale: torch.Tensor | None, found_inf: torch.Tensor | None, lanes: Lanes
    ) -> Scalars:
        """Enqueue the copy; nobody waits."""
        known = [value for value in (norm, scale, found_inf) if value is not None]
        device = known[0].device if known else torch.device("cpu")
        defaults = (0.0, 1.0, 0.0)
        on_device = torch.stack(
            [
                torch.full((), default, dtype=torch.float64, device=device)
                if value is None
                else value.detach().double().reshape(()).to(device)
                for value, default in zip((norm, scale, found_inf), defaults, strict=True)
            ]
        )
        values = torch.empty(3, dtype=torch.float64, pin_memory=device.type == "cuda")
        values.copy_(on_device, non_blocking=True)
        return cls(values, lanes.now())

    def verdict(self, max_norm: float | None) -> tuple[Verdict, float]:
        """Wait for the copy; return what follows from it, and the norm of the unscaled gradients.

        As torch.nn.utils.clip_grad_norm_: gradients are multiplied with max_norm / (norm + 1e-6) where that is below 1.
        """
        self.ticket.wait()
        scaled_norm, loss_scale, found_inf = self.values.tolist()
        norm = scaled_norm / loss_scale
        if found_inf or not math.isfinite(norm):
            return Verdict(1.0, skip=True), norm
        factor = 1.0 if max_norm is None else min(1.0, max_norm / (norm + 1e-6))
        return Verdict(factor / loss_scale), norm
