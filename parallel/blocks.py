"""Which tokens of one rank see which of another, where sequences are cut zigzag over a ring of ranks; values only."""

# Shapes: B batch, T tokens of this rank.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from parallel import kernels

_LARGE_BYTES = 2**20
"""Rows of as many bytes are added one by one: a GPU adds contiguous memory at twice the rate of strided memory."""


@dataclass(frozen=True, slots=True)
class Span:
    """Some tokens of a rank: the same slice of every row, or others in each row, by index into B x T."""

    along: slice
    index_N: Tensor | None = None

    def take(self, x_BT: Tensor) -> Tensor:
        """Return these tokens of `x` [B, T, ...]: [B, t, ...], or [N, ...] where rows differ."""
        return x_BT[:, self.along] if self.index_N is None else x_BT.flatten(0, 1)[self.index_N]

    def put(self, x_BT: Tensor, values: Tensor) -> None:
        """Write what `take` would return."""
        if self.index_N is None:
            x_BT[:, self.along] = values
        else:
            x_BT.flatten(0, 1).index_copy_(0, self.index_N, values.to(x_BT.dtype))

    def add(self, x_BT: Tensor, values: Tensor) -> None:
        """Add to what `take` would return."""
        if self.index_N is None and len(values) and values[0].nbytes >= _LARGE_BYTES:
            for row, part in zip(x_BT[:, self.along], values, strict=True):
                row += part
        elif self.index_N is None:
            x_BT[:, self.along] += values
        else:
            x_BT.flatten(0, 1).index_add_(0, self.index_N, values.to(x_BT.dtype))

    def empty(self, x_BT: Tensor) -> Tensor:
        """Return a contiguous tensor for what `take` would return."""
        if self.index_N is not None:
            return x_BT.new_empty(len(self.index_N), *x_BT.shape[2:])
        start, stop, _ = self.along.indices(x_BT.shape[1])
        return x_BT.new_empty(x_BT.shape[0], stop - start, *x_BT.shape[2:])


@dataclass(frozen=True, slots=True)
class Block:
    """Queries of one rank that see keys of another: all of `queries` see all of `keys`, row by row."""

    queries: Span
    keys: Span
    pieces: kernels.Pieces | None = None
    """Where rows differ: how many of each belong together."""


@dataclass(frozen=True, slots=True)
class Step:
    """What one rank does in one step of the ring."""

    shift: int
    block: Block | None
    """Of own queries with the keys of the rank `shift` below; None where none is seen."""
    given: Span | None
    """Own keys that the rank `shift` above sees; None where none is."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How one rank attends, the same in every layer of a forward."""

    found: kernels.Documents | None
    """Documents among its own tokens."""
    steps: tuple[Step, ...]
    is_causal: bool = False
    """Every row is one document, on all ranks."""


def causal_block(length: int, queries_rank: int, keys_rank: int) -> Block:
    """Return what queries of one rank see of another's keys without documents; `length` tokens are on each rank."""
    half = length // 2
    if keys_rank < queries_rank:
        return Block(Span(slice(0, length)), Span(slice(0, half)))
    return Block(Span(slice(half, length)), Span(slice(0, length)))


def causal_steps(length: int, rank: int, size: int) -> tuple[Step, ...]:
    """Return a rank's steps where every row is one document."""
    return tuple(
        Step(
            shift,
            causal_block(length, rank, (rank - shift) % size),
            causal_block(length, (rank + shift) % size, rank).keys,
        )
        for shift in range(1, size)
    )


def rectangle_sizes(numbers_RBT: Tensor, queries_rank: int, keys_rank: int) -> Tensor:
    """Return [2, B]: how many queries of one rank, counted from the first that may, see how many last keys of another.

    `numbers_RBT` are the documents' numbers by rank. Both counts of a row are 0 where nothing is seen.
    """
    block = causal_block(numbers_RBT.shape[2], queries_rank, keys_rank)
    queries_BT, keys_BT = block.queries.take(numbers_RBT[queries_rank]), block.keys.take(numbers_RBT[keys_rank])
    first_B1 = queries_BT[:, :1]
    counts_2B = torch.stack(((queries_BT == first_B1).sum(1), (keys_BT == first_B1).sum(1)))
    return counts_2B * (counts_2B[1] > 0)


def document_block(
    length: int, queries_rank: int, keys_rank: int, sizes: Sequence[Sequence[int]], device: torch.device
) -> Block | None:
    """Return the block of `rectangle_sizes` as numbers; None where nothing is seen."""
    whole = causal_block(length, queries_rank, keys_rank)
    query_start, *_ = whole.queries.along.indices(length)
    _, key_stop, _ = whole.keys.along.indices(length)
    rows = [(row, *both) for row, both in enumerate(zip(*sizes, strict=True)) if both[0]]
    if not rows:
        return None
    if len(rows) == len(sizes[0]) and len({(queries, keys) for _, queries, keys in rows}) == 1:
        (_, queries, keys) = rows[0]
        return Block(Span(slice(query_start, query_start + queries)), Span(slice(key_stop - keys, key_stop)))
    starts = [(row * length + query_start, row * length + key_stop - keys) for row, _, keys in rows]
    query_sizes, key_sizes = [queries for _, queries, _ in rows], [keys for _, _, keys in rows]
    return Block(
        Span(whole.queries.along, _ranges([start for start, _ in starts], query_sizes, device)),
        Span(whole.keys.along, _ranges([start for _, start in starts], key_sizes, device)),
        kernels.Pieces.of(query_sizes, key_sizes, device),
    )


def _ranges(starts: Sequence[int], sizes: Sequence[int], device: torch.device) -> Tensor:
    parts = [torch.arange(start, start + size) for start, size in zip(starts, sizes, strict=True)]
    return torch.cat(parts).to(device)
