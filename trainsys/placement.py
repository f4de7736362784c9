"""Where this rank's tensors lie in those of the whole model, and how many ranks hold the same: for checkpoints.

Parallel layers tag parameters with a parallel.shards.Shard; a checkpoint wants that as a layout of its own, and to
know of equal copies, of which one is written. ZeRO's flat partitions are ranges of such a local tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch import distributed as dist

from checkpoint import FlatSlice, LayoutSlice, Replica
from checkpoint.layout import DimLayout, Layout, Run
from checkpoint.state import TensorLike, pieces_of
from parallel import Mesh
from parallel.shards import DimShard, Shard, whole


class Placement:
    """The places of one rank's parameters and buffers by their name in the whole model."""

    def __init__(
        self, mesh: Mesh, rank: int, shards: Mapping[str, Shard], tied: Mapping[str, int] | None = None
    ) -> None:
        """`tied` are the parameters that two stages of a pipeline have, each with which copy is here, 0 or 1."""
        self._mesh, self._at, self._data_rank = mesh, mesh.coordinates(rank), mesh.data_rank(rank)
        self._shards, self._tied = shards, tied or {}
        self._layouts: dict[str, Layout] = {}

    def shard(self, name: str, shape: tuple[int, ...]) -> Shard:
        """Return which part of the whole tensor the local one of `shape` is."""
        return self._shards.get(name) or whole(shape)

    def all_of(self, name: str, tensor: Tensor) -> TensorLike:
        """Return a tensor that this rank has all of its part of, as every rank has that has the same part."""
        shard = self.shard(name, tuple(tensor.shape))
        if not shard.axes and self._mesh.size("pipeline") == 1:
            return tensor  # whole on every rank there is
        return self._copy(name, LayoutSlice(tensor, self._layout(name, shard)), self._copies(shard, partitioned=False))

    def part_of(
        self, name: str, flat: Tensor, shape: tuple[int, ...], start: int, copies: tuple[int, int] | None = None
    ) -> TensorLike:
        """Return a range of a flattened local tensor of `shape`.

        `copies` are (which copy this is, how many ranks of the stage have it); None: no other data or context rank has.
        """
        shard = self.shard(name, shape)
        value: FlatSlice | LayoutSlice
        if not shard.axes and shard.local_shape == shard.global_shape:
            value = FlatSlice(flat, shard.global_shape, start)
        else:
            value = LayoutSlice(flat, self._layout(name, shard), start)
        return self._copy(name, value, copies or self._copies(shard, partitioned=True))

    def num_holders(self, shard: Shard, *, partitioned: bool) -> int:
        """Return how many ranks hold each element, without copies inside the shard; see `all_of` and `part_of`."""
        return self._copies(shard, partitioned=partitioned)[1]

    def _copy(self, name: str, value: FlatSlice | LayoutSlice, copies: tuple[int, int]) -> TensorLike:
        index, count = copies
        if name in self._tied:
            index, count = 2 * index + self._tied[name], 2 * count
        return Replica(value, index, count) if count > 1 else value

    def _copies(self, shard: Shard, *, partitioned: bool) -> tuple[int, int]:
        """Return (which copy this rank holds, how many there are)."""
        index, count = 0, 1
        if not partitioned:
            index, count = self._data_rank, self._mesh.data_size
            if "expert" in shard.axes:
                index, count = index // self._mesh.size("expert"), count // self._mesh.size("expert")
            index, count = index * self._mesh.size("context") + self._at.context, count * self._mesh.size("context")
        if "tensor" not in shard.axes:
            index, count = index * self._mesh.size("tensor") + self._at.tensor, count * self._mesh.size("tensor")
        return index, count

    def _layout(self, name: str, shard: Shard) -> Layout:
        if name not in self._layouts:
            self._layouts[name] = tuple(_dim(dim) for dim in shard.dims)
        return self._layouts[name]


def elsewhere(slices: Callable[[], Mapping[str, TensorLike]], stages: dist.ProcessGroup) -> dict[str, TensorLike]:
    """Return an empty part of every tensor that only other ranks of the group have; all of them call.

    `slices` are those of this rank; a group of one rank does not ask for them, which may be large copies.

    So every rank has something to say of every name, and a name that nobody has is still noticed.
    """
    if stages.size() == 1:
        return {}
    mine = {piece.name: (tuple(piece.global_shape), piece.tensor.dtype) for piece in pieces_of(slices())}
    everyone: list[dict[str, tuple[tuple[int, ...], torch.dtype]]] = [{} for _ in range(stages.size())]
    dist.all_gather_object(everyone, mine, group=stages)
    known = {name: described for each in everyone for name, described in each.items()}
    return {
        name: FlatSlice(torch.empty(0, dtype=dtype), shape, 0)
        for name, (shape, dtype) in known.items()
        if name not in mine
    }


def _dim(dim: DimShard) -> DimLayout:
    runs = tuple(Run(run.local, run.start, run.length, run.copy, run.num_copies) for run in dim.runs)
    return DimLayout(dim.size, dim.local_size, runs)
