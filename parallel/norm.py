"""The norm of a gradient whose elements lie on many ranks, each counted once however many ranks hold it.

Every rank adds up the squares of what it holds, each divided by the number of ranks that hold it too, and one
all-reduce of a number makes the sum.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from parallel.shards import Shard

_TINY = 1e-6


@dataclass(frozen=True, slots=True)
class Held:
    """What one rank holds of the gradient of one parameter."""

    gradient: Tensor
    """Of the local parameter's shape; with `start`, some of its elements in one dimension."""
    shard: Shard
    """Which part of the whole parameter the local one is."""
    num_holders: int = 1
    """Ranks of the group that hold the same elements, without the copies that `shard` speaks of; 0 counts nothing."""
    start: int | None = None
    """First element in the flattened local parameter: a ZeRO partition."""


def global_norm(held: Iterable[Held], group: ProcessGroup) -> Tensor:
    """Return the L2 norm over all ranks of `group`, a float64 scalar on the gradients' device; all of them call."""
    total = sum_of_squares(held, torch.device("cpu") if dist.get_backend(group) == "gloo" else None)
    if group.size() > 1:
        dist.all_reduce(total, group=group)
    return total.sqrt()


@torch.no_grad()
def sum_of_squares(held: Iterable[Held], device: torch.device | None = None) -> Tensor:
    """Return this rank's share of the squared norm, a float64 scalar on `device` (None: where the gradients are).

    Squares are added up in fp32, those of float64 gradients in float64.
    """
    parts: list[Tensor] = []
    weights: list[float] = []
    for each in held:
        for part, weight in _weighed(each):
            parts.append(part)
            weights.append(weight)
    by_kind: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, part in enumerate(parts):
        by_kind.setdefault((part.device, part.dtype), []).append(index)
    place = device or (parts[0].device if parts else torch.device("cpu"))
    total = torch.zeros((), dtype=torch.float64, device=place)
    for (_, dtype), members in by_kind.items():
        accumulated = torch.promote_types(dtype, torch.float32)
        norms = torch._foreach_norm([parts[index] for index in members], 2, dtype=accumulated)
        squares = torch.stack(norms).double().square()
        factors = torch.tensor([weights[index] for index in members], dtype=torch.float64)
        total += (squares @ factors.to(squares.device, non_blocking=True)).to(place)
    return total


def clip_factor(norm: float, limit: float) -> float:
    """Return what gradients of this norm are multiplied by to have at most `limit`; a limit of 0 clips nothing."""
    return min(1.0, limit / (norm + _TINY)) if limit > 0 else 1.0


def _weighed(held: Held) -> Iterator[tuple[Tensor, float]]:
    """Yield views of a gradient, each with the share of every square that counts here; padding is in none."""
    gradient, shard = held.gradient, held.shard
    if not held.num_holders or not gradient.numel():
        return
    scale = 1.0 / held.num_holders
    blocks = [(mine, num_copies) for mine, _, _, num_copies in shard.blocks()]
    covered = sum(math.prod(s.stop - s.start for s in mine) for mine, _ in blocks)
    if covered == math.prod(shard.local_shape) and len({num_copies for _, num_copies in blocks}) == 1:
        yield gradient, scale / blocks[0][1]
    elif held.start is None:
        yield from ((gradient[mine], scale / num_copies) for mine, num_copies in blocks)
    elif all(len(dim.runs) == 1 and dim.runs[0].length == dim.local_size for dim in shard.dims[1:]):
        yield from _rows(gradient, held.start, shard, scale)
    else:
        weights = torch.zeros(shard.local_shape, dtype=torch.promote_types(gradient.dtype, torch.float32))
        for mine, num_copies in blocks:
            weights[mine] = num_copies**-0.5
        flat = weights.view(-1)[held.start : held.start + gradient.numel()]
        yield gradient * flat.to(gradient.device), scale


def _rows(gradient: Tensor, start: int, shard: Shard, scale: float) -> Iterator[tuple[Tensor, float]]:
    """Yield what of a flat range lies in each run of whole rows."""
    width = math.prod(shard.local_shape[1:])
    copies = math.prod(dim.runs[0].num_copies for dim in shard.dims[1:])
    for run in shard.dims[0].runs:
        first = max(run.local * width, start) - start
        last = min((run.local + run.length) * width, start + gradient.numel()) - start
        if first < last:
            yield gradient[first:last], scale / (run.num_copies * copies)
