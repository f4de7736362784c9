"""Initial weights that depend on the seed and the parameter's name, and on nothing else."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn

from parallel.shards import Shard, shard_of, shards_of, tag

_RESIDUAL = ("attention.output.weight", "down.weight", "experts.down")
"""Names of the projections that write to the residual stream."""


def spread(dim: int) -> float:
    """The spread of a decoder's weights: 1 / sqrt(dim), which keeps the size of activations, but at most 0.05.

    Of spreads from 0.02 to 0.09 it learned fastest at widths 128 and 384.
    """
    return min(0.05, 1 / math.sqrt(dim))


@torch.no_grad()
def initialise(model: nn.Module, *, num_layers: int, seed: int, std: float) -> None:
    """Fills every matrix from a normal of `std` cut at 3 `std`, residual projections `std / sqrt(2 L)`;
    gains are 1.

    Each parameter has a generator of its own, seeded by (seed, name), on the CPU and in fp32: the values do
    not depend on rank, device, dtype or the order of construction, and a rank's part of a parameter is a part of the
    whole one's values. Parameters on the meta device stay unset.
    """
    for name, parameter in model.named_parameters():
        if not parameter.is_meta:
            parameter.copy_(initial_part(name, shard_of(parameter), num_layers=num_layers, seed=seed, std=std))


def initial_part(name: str, shard: Shard, *, num_layers: int, seed: int, std: float) -> Tensor:
    """A rank's part of a parameter's initial values, in fp32 on the CPU; the whole is there for a moment."""
    if len(shard.global_shape) == 1:
        return shard.take(torch.ones(shard.global_shape, device="cpu"))
    own_std = std / (2 * num_layers) ** 0.5 if name.endswith(_RESIDUAL) else std
    values = torch.empty(shard.global_shape, dtype=torch.float32, device="cpu")
    generator = generator_of(seed, name)
    nn.init.trunc_normal_(values, std=own_std, a=-3 * own_std, b=3 * own_std, generator=generator)
    return values if shard.local_shape == shard.global_shape else shard.take(values)


def seed_of(seed: int, name: str) -> int:
    """A seed of 64 bits for what is called `name`."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little", signed=True)


def generator_of(seed: int, name: str) -> torch.Generator:
    """A generator for what is called `name`."""
    return torch.Generator().manual_seed(seed_of(seed, name))


@torch.no_grad()
def fill(model: nn.Module, name: str, values: Tensor, device: torch.device, dtype: torch.dtype) -> None:
    """Puts a rank's part of a parameter, which is on the meta device, where all that share it have it.

    The parameter is a new object with the old one's tag.
    """
    old = model.get_parameter(name)
    new = nn.Parameter(values.to(device, dtype), requires_grad=old.requires_grad)
    tag(new, shard_of(old))
    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is old:
                module._parameters[leaf] = new


def materialise_decoder(
    model: nn.Module, *, num_layers: int, std: float, device: torch.device, dtype: torch.dtype, seed: int
) -> None:
    """Gives the parameters of a decoder, or of what is left of one, their initial values, one after the other."""
    for name, shard in shards_of(model).items():
        if model.get_parameter(name).is_meta:
            fill(model, name, initial_part(name, shard, num_layers=num_layers, seed=seed, std=std), device, dtype)
