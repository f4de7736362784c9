"""How a rank's tensor lies in the whole one where that is more than a box: fused, padded, strided. Pure.

A layout says, for each dimension on its own, which runs of the local indices are which runs of the whole tensor's;
what is in none is padding, neither saved nor loaded. The blocks of the tensor are the product of these runs. So the
whole tensor can be named in the form that everybody agrees on (a fused projection as [q | k | v], a vocabulary
without its padding), however each rank keeps its part, and any layout loads what any other saved.

    w1 of a gated MLP, 8 ranks       (fused([ffn, ffn], rank, 8), whole(hidden))
    grouped-query attention          (grouped_qkv(heads, kv_heads, head_dim, rank, 8), whole(hidden))
    embedding padded to a multiple   (padded(vocab, padded_vocab, rank, 8), whole(hidden))
    experts with fused gate and up   (split(num_experts, ep_rank, 4), fused([ffn, ffn], tp_rank, 2), whole(hidden))
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from checkpoint.errors import InvalidState
from checkpoint.region import Shape


@dataclass(frozen=True, slots=True)
class Run:
    """Local indices [local, local + length) of a dimension are [start, start + length) of the whole one."""

    local: int
    start: int
    length: int
    copy: int = 0
    """Which of the equal copies of this run is here: only one of them is written."""
    num_copies: int = 1
    """How many ranks hold this run."""


@dataclass(frozen=True, slots=True)
class DimLayout:
    """One dimension of a local tensor in that dimension of the whole one."""

    size: int
    """Of the whole tensor."""
    local_size: int
    """Of the local tensor, padding included."""
    runs: tuple[Run, ...]
    """By rising local index; what lies in none of them is padding."""

    def __post_init__(self) -> None:
        end = 0
        for run in self.runs:
            if run.length < 1 or run.local < end or run.start < 0:
                raise InvalidState(f"layout: {run} is empty, overlaps the run before it, or starts below 0")
            if run.start + run.length > self.size or run.local + run.length > self.local_size:
                raise InvalidState(f"layout: {run} leaves its {self.local_size} local or {self.size} whole indices")
            if not 0 <= run.copy < run.num_copies:
                raise InvalidState(f"layout: {run} is not one of its copies")
            end = run.local + run.length


Layout = tuple[DimLayout, ...]
"""A local tensor in the whole one: one DimLayout a dimension."""


@dataclass(frozen=True, slots=True)
class Block:
    """The box at `local` of a local tensor is the box at `offset` of the whole one, both of `shape`."""

    local: Shape
    offset: Shape
    shape: Shape
    copy: int
    num_copies: int


def blocks(layout: Layout) -> Iterator[Block]:
    """Yield the blocks of a layout in the local tensor's order."""
    for runs in itertools.product(*(dim.runs for dim in layout)):
        copy, num_copies = 0, 1
        for run in runs:
            copy, num_copies = copy * run.num_copies + run.copy, num_copies * run.num_copies
        yield Block(
            tuple(run.local for run in runs),
            tuple(run.start for run in runs),
            tuple(run.length for run in runs),
            copy,
            num_copies,
        )


def whole(size: int) -> DimLayout:
    """Return a dimension that the local tensor has all of."""
    return split(size, 0, 1)


def split(size: int, rank: int, num_ranks: int) -> DimLayout:
    """Return rank's share of a dimension cut as torch.chunk does; the last ranks may have less, or nothing."""
    _check_rank(rank, num_ranks)
    return _local(size, _chunk([(0, size)], rank, num_ranks))


def fused(sizes: Sequence[int], rank: int, num_ranks: int) -> DimLayout:
    """Return a dimension of concatenated projections, of each of which the rank holds its share, concatenated.

    `fused([ffn, ffn], …)` is gate and up; `fused([q, k, v], …)` is attention with a head of k and v for each of q.
    Every size must divide by `num_ranks`.
    """
    _check_rank(rank, num_ranks)
    _check_divides("sizes", sizes, num_ranks)
    starts = itertools.accumulate(sizes, initial=0)
    ranges = [(start + size // num_ranks * rank, size // num_ranks) for start, size in zip(starts, sizes, strict=False)]
    return _local(sum(sizes), ranges)


def grouped_qkv(num_heads: int, num_kv_heads: int, head_dim: int, rank: int, num_ranks: int) -> DimLayout:
    """Return a fused projection that is kept by groups [q … q k v] locally and is [q | k | v] as a whole.

    A group is a head of k and v and the heads of q that use it. With more ranks than groups, each rank has a part
    of a group's q and all of its k and v, which are copies: one of the ranks writes them.
    """
    _check_rank(rank, num_ranks)
    _check_divides("num_heads", [num_heads], max(num_ranks, num_kv_heads))
    _check_divides("num_kv_heads, num_ranks", [max(num_kv_heads, num_ranks)], min(num_kv_heads, num_ranks))
    num_copies = max(1, num_ranks // num_kv_heads)
    groups = max(1, num_kv_heads // num_ranks)
    q_heads = num_heads // num_kv_heads // num_copies
    first = rank // num_copies * groups
    k, v = num_heads, num_heads + num_kv_heads
    runs, local = [], 0
    for group in range(first, first + groups):
        q = group * num_heads // num_kv_heads + rank % num_copies * q_heads
        for start, heads, copies in ((q, q_heads, 1), (k + group, 1, num_copies), (v + group, 1, num_copies)):
            copy = rank % num_copies if copies > 1 else 0
            runs.append(Run(local * head_dim, start * head_dim, heads * head_dim, copy, copies))
            local += heads
    return DimLayout((num_heads + 2 * num_kv_heads) * head_dim, local * head_dim, tuple(runs))


def padded(size: int, padded_size: int, rank: int, num_ranks: int) -> DimLayout:
    """Return rank's share of a dimension that was padded at its end to `padded_size` and cut evenly."""
    _check_rank(rank, num_ranks)
    _check_divides("padded_size", [padded_size], num_ranks)
    if padded_size < size:
        raise InvalidState(f"layout: padded_size {padded_size} is less than the size {size}")
    share = padded_size // num_ranks
    length = min(share, size - rank * share)
    return DimLayout(size, share, (Run(0, rank * share, length),) if length > 0 else ())


@dataclass(frozen=True, slots=True)
class DTensorLayout:
    """Where a DTensor's local part lies, and which of its equal copies it is."""

    layout: Layout
    copy: int
    num_copies: int


def of_dtensor(tensor: Any) -> DTensorLayout | None:
    """Return the layout of a DTensor's local part from its placements; None on a rank outside of its mesh.

    Any placements but Partial, on any dimensions, in meshes of any rank; uneven and empty shards; the strided ones
    of FSDP over tensor parallelism. Raises InvalidState.
    """
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        return None
    ranges = [[(0, size)] for size in tensor.shape]
    copy, num_copies = 0, 1
    for axis, placement in enumerate(tensor.placements):
        num_ranks, rank = tensor.device_mesh.size(axis), coordinate[axis]
        dim = getattr(placement, "dim", None)
        if placement.is_replicate():
            copy, num_copies = copy * num_ranks + rank, num_copies * num_ranks
        elif placement.is_partial() or dim is None:
            raise InvalidState(f"is a DTensor placed as {placement}; redistribute it to Shard or Replicate first")
        else:
            # A strided shard has a part of each of `split_factor` pieces, a plain one of the only piece.
            factor = getattr(placement, "split_factor", 1)
            pieces = [_chunk(ranges[dim], i, factor) for i in range(factor)]
            ranges[dim] = [r for piece in pieces for r in _chunk(piece, rank, num_ranks)]
    return DTensorLayout(
        tuple(_local(size, found) for size, found in zip(tensor.shape, ranges, strict=True)), copy, num_copies
    )


def share(numel: int, per_chunk: int, copy: int, num_copies: int) -> tuple[int, int]:
    """Return the elements [start, stop) that a holder of one of several equal copies writes: whole chunks, evenly."""
    run = math.ceil(math.ceil(numel / per_chunk) / num_copies) * per_chunk
    return min(copy * run, numel), min((copy + 1) * run, numel)


def _chunk(ranges: list[tuple[int, int]], index: int, num_chunks: int) -> list[tuple[int, int]]:
    """Return the (start, length) of chunk `index` of concatenated ranges, cut as torch.chunk does."""
    size = math.ceil(sum(length for _, length in ranges) / num_chunks)
    first, last = index * size, (index + 1) * size
    found, position = [], 0
    for start, length in ranges:
        begin, end = max(first, position), min(last, position + length)
        if begin < end:
            found.append((start + begin - position, end - begin))
        position += length
    return found


def _local(size: int, ranges: Sequence[tuple[int, int]]) -> DimLayout:
    """Return the dimension whose local indices are these (start, length) of the whole one, one after the other."""
    runs: list[Run] = []
    local = 0
    for start, length in ranges:
        if runs and runs[-1].start + runs[-1].length == start:
            runs[-1] = Run(runs[-1].local, runs[-1].start, runs[-1].length + length)
        elif length:
            runs.append(Run(local, start, length))
        local += length
    return DimLayout(size, local, tuple(runs))


def _check_rank(rank: int, num_ranks: int) -> None:
    if not 0 <= rank < num_ranks:
        raise InvalidState(f"layout: {rank} is not a rank of {num_ranks}")


def _check_divides(what: str, sizes: Sequence[int], divisor: int) -> None:
    odd = [size for size in sizes if size < 0 or size % divisor]
    if odd:
        raise InvalidState(f"layout: {what}: {', '.join(map(str, odd))} cannot be divided by {divisor}")
