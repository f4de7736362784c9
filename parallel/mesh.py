"""Where a rank stands: degrees of parallelism and a number of ranks -> axes, coordinates and groups.

This is the only file that knows the order of the axes. From the outside in:

    axis        ranks along it share           talk
    pipeline    the layers, a stage each       once a micro-batch, to their neighbours
    replicate   nothing: they hold copies      once a step
    shard       the state of one copy          several times a step
    context     one sequence                   in every attention
    tensor      one matrix                     in every layer

The rank number counts the innermost axis first, so the ranks that talk most have neighbouring numbers, as
ranks of one host do. `expert` adds no ranks: its groups are runs of neighbours in replicate x shard, where
each rank has tokens of its own to send to experts. The ranks of replicate x shard that hold the same experts,
one of every run, are the groups of `expert_data`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from parallel.config import ParallelConfig
from parallel.errors import MeshError

Axis = Literal["pipeline", "replicate", "shard", "context", "tensor", "expert"]
"""Name of an axis; `expert` is carved out of replicate x shard."""

Along = Literal["pipeline", "replicate", "shard", "context", "tensor", "expert", "expert_data"]
"""What a group may be formed along: an axis, or `expert_data`, which with `expert` makes up replicate x shard."""


class Coordinates(NamedTuple):
    """Position of a rank along each axis, from the outermost to the innermost."""

    pipeline: int = 0
    replicate: int = 0
    shard: int = 0
    context: int = 0
    tensor: int = 0


@dataclass(frozen=True, slots=True)
class Mesh:
    """Ranks 0 to world_size - 1 laid out on the axes; a value without process groups or any other state.

    Raises:
        MeshError: the degrees do not multiply to `world_size`, one is below 1, or `expert` does not divide
            replicate x shard. All problems at once.
    """

    degrees: ParallelConfig
    world_size: int

    def __post_init__(self) -> None:
        problems = list(_problems(self.degrees, self.world_size))
        if problems:
            raise MeshError("\n".join(problems))

    @property
    def _sizes(self) -> Coordinates:
        return Coordinates(*(_degree(self.degrees, axis) for axis in Coordinates._fields))

    def size(self, *axes: Along) -> int:
        """Return the number of ranks in a group over the axes."""
        _check_axes(axes)
        return math.prod(
            self.data_size // self.degrees.expert if axis == "expert_data" else _degree(self.degrees, axis)
            for axis in set(axes)
        )

    @property
    def data_size(self) -> int:
        """How many ranks see a part of the batch of their own (the others share it along the other axes)."""
        return self._sizes.replicate * self._sizes.shard

    def data_rank(self, rank: int) -> int:
        """Return which part of a batch the rank sees: its place in replicate x shard, 0 to data_size - 1."""
        at = self.coordinates(rank)
        return at.replicate * self._sizes.shard + at.shard

    def coordinates(self, rank: int) -> Coordinates:
        """Return where the rank stands."""
        if not 0 <= rank < self.world_size:
            raise MeshError(f"parallel: there is no rank {rank}; ranks are 0 to {self.world_size - 1}")
        inside_out = []
        for size in reversed(self._sizes):
            rank, index = divmod(rank, size)
            inside_out.append(index)
        return Coordinates(*reversed(inside_out))

    def rank_of(self, coordinates: Coordinates) -> int:
        """Return the rank that stands there."""
        rank = 0
        for axis, index, size in zip(Coordinates._fields, coordinates, self._sizes, strict=True):
            if not 0 <= index < size:
                raise MeshError(f"parallel: {axis} has no index {index}; indices are 0 to {size - 1}")
            rank = rank * size + index
        return rank

    def groups(self, *axes: Along) -> list[list[int]]:
        """Return the groups over the axes: ranks of a group differ in their position only there.

        Ranks of a group ascend, groups ascend by their first rank: the same list on every rank.
        """
        seen: set[int] = set()
        groups = []
        for rank in range(self.world_size):
            if rank not in seen:
                groups.append(self.group(rank, *axes))
                seen.update(groups[-1])
        return groups

    def group(self, rank: int, *axes: Along) -> list[int]:
        """Return the group of the rank over the axes."""
        _check_axes(axes)
        at, sizes = self.coordinates(rank), self._sizes
        along: list[Sequence[int]] = [
            range(n) if axis in axes else (i,) for axis, i, n in zip(at._fields, at, sizes, strict=True)
        ]
        pipeline, replicate, shard, context, tensor = along
        data = list(itertools.product(replicate, shard))
        if "expert" in axes or "expert_data" in axes:
            size = self.degrees.expert
            run, expert = divmod(self.data_rank(rank), size)
            runs = range(self.data_size // size) if "expert_data" in axes else (run,)
            experts = range(size) if "expert" in axes else (expert,)
            data = [divmod(run * size + expert, sizes.shard) for run in runs for expert in experts]
        places = itertools.product(pipeline, data, context, tensor)
        return [self.rank_of(Coordinates(p, r, s, c, t)) for p, (r, s), c, t in places]

    @staticmethod
    def product(degrees: ParallelConfig) -> int:
        """Return the number of ranks that the degrees ask for."""
        return math.prod(_degree(degrees, axis) for axis in Coordinates._fields)

    @staticmethod
    def fill(degrees: ParallelConfig, axis: Literal["replicate", "shard"], world_size: int) -> ParallelConfig:
        """Return the degrees with that of `axis` multiplied until their product is `world_size`.

        Raises:
            MeshError: `world_size` is no multiple of the product.
        """
        product = Mesh.product(degrees)
        if product < 1 or world_size < 1 or world_size % product:
            raise MeshError(
                f"parallel.{axis}: cannot fill {_ranks(world_size)}: degrees multiply to {product} "
                f"({_product(degrees)}); a multiple of {product}"
            )
        degree = _degree(degrees, axis) * (world_size // product)
        if axis == "replicate":
            return dataclasses.replace(degrees, replicate=degree)
        return dataclasses.replace(degrees, shard=degree)


def _degree(degrees: ParallelConfig, axis: str) -> int:
    degree = getattr(degrees, axis)
    assert isinstance(degree, int)
    return degree


def _product(degrees: ParallelConfig) -> str:
    """Write the degrees above 1 as a product."""
    factors = [f"{axis} {_degree(degrees, axis)}" for axis in Coordinates._fields if _degree(degrees, axis) != 1]
    return " x ".join(factors) or "1"


def _ranks(number: int) -> str:
    return "1 rank" if number == 1 else f"{number} ranks"


def _problems(degrees: ParallelConfig, world_size: int) -> Iterator[str]:
    small = [axis for axis in sorted(get_args(Axis)) if _degree(degrees, axis) < 1]
    yield from (f"parallel.{axis}: {_degree(degrees, axis)} ranks cannot share it; at least 1" for axis in small)
    if small:
        return
    num_ranks = Mesh.product(degrees)
    if num_ranks != world_size:
        there_are = "there is" if world_size == 1 else "there are"
        yield (
            f"parallel: degrees multiply to {num_ranks} ({_product(degrees)}) but {there_are} "
            f"{_ranks(world_size)}; start {num_ranks} or choose degrees with the product {world_size}"
        )
    num_data_ranks = degrees.replicate * degrees.shard
    if num_data_ranks % degrees.expert:
        yield (
            f"parallel.expert: {degrees.expert} does not divide replicate x shard = {num_data_ranks}; "
            f"one of {', '.join(str(n) for n in range(1, num_data_ranks + 1) if num_data_ranks % n == 0)}"
        )


def _check_axes(axes: tuple[Along, ...]) -> None:
    unknown = sorted(set(axes) - set(get_args(Along)))
    if unknown:
        raise MeshError(f"parallel: there is no axis {', '.join(unknown)}; axes are {', '.join(get_args(Along))}")
    if {"expert", "expert_data"} & set(axes) and {"replicate", "shard"} & set(axes):
        raise MeshError("parallel: expert is a part of replicate x shard; group over either, not both")
