"""Which part of a parameter a rank holds, dimension by dimension, and what else must be known to treat it right. Pure.

Parallel layers tag their parameters with a `Shard`; everything that looks at parameters from outside (initial
weights, gradient norms, checkpoints) asks for it. A parameter without a tag is whole and equal on all ranks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from parallel.mesh import Axis

_TAG = "_parallel_shard"


@dataclass(frozen=True, slots=True)
class Run:
    """Local indices [local, local + length) of a dimension are [start, start + length) of the whole one."""

    local: int
    start: int
    length: int
    copy: int = 0
    """Which of the equal copies of this run is here (key and value heads that several ranks need)."""
    num_copies: int = 1
    """How many ranks along the shard's axes hold this run."""


@dataclass(frozen=True, slots=True)
class DimShard:
    """One dimension of a local tensor in that dimension of the whole one; what lies in no run is padding."""

    size: int
    """Of the whole tensor."""
    local_size: int
    """Of the local tensor, padding included."""
    runs: tuple[Run, ...]
    """By rising local index."""


@dataclass(frozen=True, slots=True)
class Shard:
    """A rank's part of one parameter: the product of its dimensions' runs."""

    dims: tuple[DimShard, ...]
    axes: tuple[Axis, ...] = field(default=())
    """Axes along which ranks hold different parts; along all others they hold equal copies."""

    @property
    def global_shape(self) -> tuple[int, ...]:
        return tuple(dim.size for dim in self.dims)

    @property
    def local_shape(self) -> tuple[int, ...]:
        return tuple(dim.local_size for dim in self.dims)

    def blocks(self) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...], int, int]]:
        """Yield (indices of the local tensor, indices of the whole one, copy, num_copies) of every block."""
        for runs in itertools.product(*(dim.runs for dim in self.dims)):
            copy, num_copies = 0, 1
            for run in runs:
                copy, num_copies = copy * run.num_copies + run.copy, num_copies * run.num_copies
            yield (
                tuple(slice(run.local, run.local + run.length) for run in runs),
                tuple(slice(run.start, run.start + run.length) for run in runs),
                copy,
                num_copies,
            )

    @torch.no_grad()
    def take(self, whole_tensor: Tensor) -> Tensor:
        """Return this rank's part of a whole tensor, in new memory; padding is zero."""
        local = whole_tensor.new_zeros(self.local_shape)
        for mine, theirs, _, _ in self.blocks():
            local[mine] = whole_tensor[theirs]
        return local

    @torch.no_grad()
    def put(self, local: Tensor, whole_tensor: Tensor) -> None:
        """Write this rank's part into a whole tensor."""
        for mine, theirs, _, _ in self.blocks():
            whole_tensor[theirs] = local[mine]


def whole(shape: Sequence[int]) -> Shard:
    """Return the shard of a parameter that is whole on every rank."""
    return Shard(tuple(whole_dim(size) for size in shape))


def whole_dim(size: int) -> DimShard:
    """Return a dimension that every rank has all of."""
    return DimShard(size, size, (Run(0, 0, size),) if size else ())


def even_dim(size: int, rank: int, num_ranks: int) -> DimShard:
    """Return rank's share of a dimension that is cut evenly, padded at its end where it does not divide."""
    share = math.ceil(size / num_ranks)
    length = min(share, size - rank * share)
    return DimShard(size, share, (Run(0, rank * share, length),) if length > 0 else ())


def fused_dim(sizes: Sequence[int], rank: int, num_ranks: int) -> DimShard:
    """Return rank's share of each of several stacked matrices, stacked; every size must divide by `num_ranks`.

    Raises: ValueError.
    """
    odd = [size for size in sizes if size % num_ranks]
    if odd:
        raise ValueError(f"parallel: {num_ranks} ranks cannot share {', '.join(map(str, odd))} evenly")
    runs, start, local = [], 0, 0
    for size in sizes:
        share = size // num_ranks
        runs.append(Run(local, start + rank * share, share))
        start, local = start + size, local + share
    return DimShard(start, local, tuple(runs))


def tag(parameter: nn.Parameter, shard: Shard) -> nn.Parameter:
    """Note on a parameter which part of the whole one it is; returns it.

    The note stays with this object, also when its module moves to another device. `copy.deepcopy` of a parameter drops
    it, after which the copy would pass for a whole one: ask before copying, or build the model twice.
    """
    assert shard.local_shape == tuple(parameter.shape), f"{shard.local_shape} tags {tuple(parameter.shape)}"
    setattr(parameter, _TAG, shard)
    return parameter


def shard_of(parameter: Tensor) -> Shard:
    """Return what a parameter is tagged with; without a tag it is whole."""
    found: Shard | None = getattr(parameter, _TAG, None)
    return found if found is not None else whole(parameter.shape)


def shards_of(model: nn.Module) -> dict[str, Shard]:
    """Return the shard of every parameter by name; ask before an engine wraps the model, which may drop tags."""
    return {name: shard_of(parameter) for name, parameter in model.named_parameters()}


@torch.no_grad()
def gather_state(parts: Sequence[tuple[Mapping[str, Shard], Mapping[str, Tensor]]]) -> dict[str, Tensor]:
    """Return whole tensors from all ranks' (shards, local tensors), by name; for tests and small models."""
    state: dict[str, Tensor] = {}
    for shards, tensors in parts:
        for name, tensor in tensors.items():
            shard = shards.get(name, whole(tensor.shape))
            if name not in state:
                state[name] = tensor.new_zeros(shard.global_shape)
            shard.put(tensor, state[name])
    return state
