"""Initial weights that depend on the seed and the parameter's name, and on nothing else."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

_RESIDUAL = ("attention.output.weight", "down.weight", "experts.down")
"""Names of the projections that write to the residual stream."""


@torch.no_grad()
def initialise(model: nn.Module, *, num_layers: int, seed: int, std: float) -> None:
    """Fills every matrix from a normal of `std` cut at 3 `std`, residual projections `std / sqrt(2 L)`;
    gains are 1.

    Each parameter has a generator of its own, seeded by (seed, name), on the CPU and in fp32: the values do
    not depend on rank, device, dtype or the order of construction. Parameters on the meta device stay
    unset.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            continue
        if parameter.ndim == 1:
            parameter.fill_(1.0)
            continue
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        own_std = std / (2 * num_layers) ** 0.5 if name.endswith(_RESIDUAL) else std
        values = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
        nn.init.trunc_normal_(values, std=own_std, a=-3 * own_std, b=3 * own_std, generator=generator)
        parameter.copy_(values)
