"""Saved slices joined with wanted regions: interval arithmetic, without storage or ranks. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from checkpoint.coverage import Ints
from checkpoint.format import CHUNK_BYTES
from checkpoint.manifest import SavedSlice
from checkpoint.region import Region, Shape, intersect, row_major


@dataclass(frozen=True, slots=True)
class Read:
    """A run of chunks of a saved slice that a wanted region needs, and the boxes of the tensor they share."""

    row: SavedSlice
    first: int
    """Index of the first chunk."""
    last: int
    """Index behind the last chunk."""
    region: Region
    """The elements of the chunks."""
    boxes: tuple[tuple[Shape, Shape], ...]
    """(offset, shape) in the whole tensor."""
    target: int = 0
    """Which of the caller's regions wants them."""

    @property
    def file(self) -> str:
        return self.row.file

    @property
    def byte_start(self) -> int:
        return self.row.byte_start + self.first * self.row.chunk_bytes

    @property
    def nbytes(self) -> int:
        return self.region.numel * self.row.itemsize

    @property
    def byte_stop(self) -> int:
        return self.byte_start + self.nbytes

    @property
    def needed_bytes(self) -> int:
        """Bytes that the wanted region takes from the chunks."""
        return sum(math.prod(shape) for _, shape in self.boxes) * self.row.itemsize


def plan(rows: Sequence[SavedSlice], wanted: Region, target: int = 0) -> Iterator[Read]:
    """Yield reads of at most CHUNK_BYTES that hold what `wanted`, region `target` of the caller, needs of a tensor.

    Chunks that hold nothing of it are left out.
    """
    for row in rows:
        boxes = tuple(intersect(row.region, wanted))
        runs = list(_runs(row, boxes))
        for first, last in runs:
            region = _chunks(row, first, last)
            yield Read(row, first, last, region, boxes if len(runs) == 1 else tuple(intersect(region, wanted)), target)


def _chunks(row: SavedSlice, first: int, last: int) -> Region:
    per_chunk = row.chunk_bytes // row.itemsize
    return row.region.part(first * per_chunk, min(last * per_chunk, row.region.numel))


def _runs(row: SavedSlice, boxes: Sequence[tuple[Shape, Shape]]) -> Iterator[tuple[int, int]]:
    """Yield the runs [first, last) of chunks that hold elements of the boxes, each of CHUNK_BYTES at most."""
    if not boxes:
        return
    at_most = CHUNK_BYTES // row.chunk_bytes
    if sum(math.prod(shape) for _, shape in boxes) == row.region.numel:  # all of it
        for start in range(0, len(row.digests), at_most):
            yield start, min(start + at_most, len(row.digests))
        return
    per_chunk = row.chunk_bytes // row.itemsize
    spans = [_spans(row.region, offset, shape, per_chunk) for offset, shape in boxes]
    firsts = np.concatenate([starts // per_chunk for starts, _ in spans])
    lasts = np.concatenate([(starts + extent - 1) // per_chunk + 1 for starts, extent in spans])
    order = np.argsort(firsts)
    firsts, lasts = firsts[order], np.maximum.accumulate(lasts[order])
    gaps = np.flatnonzero(firsts[1:] > lasts[:-1])
    for first, last in zip(firsts[[0, *(gaps + 1)]].tolist(), lasts[[*gaps, -1]].tolist(), strict=True):
        for start in range(first, last, at_most):
            yield start, min(start + at_most, last)


def _spans(region: Region, offset: Shape, shape: Shape, per_chunk: int) -> tuple[Ints, int]:
    """Return where in a region's order spans begin, and how long each is, that a box has something in every chunk of.

    Rows of the box less than a chunk apart are one span.
    """
    strides = row_major(region.shape)
    begin = sum((o - r) * s for o, r, s in zip(offset, region.offset, strides, strict=True)) - region.start
    starts, extent = np.array([begin], dtype=np.int64), 1
    for count, stride in zip(reversed(shape), reversed(strides), strict=True):
        if len(starts) == 1 and stride - extent < per_chunk:
            extent += (count - 1) * stride
        elif count > 1:
            starts = (np.arange(count) * stride + starts[:, None]).reshape(-1)
    return starts, extent


def view(tensor: torch.Tensor, region: Region, offset: Shape, shape: Shape) -> torch.Tensor:
    """Return the box (offset, shape) of the whole tensor as a view of `tensor`, which holds `region`.

    `tensor` has the shape of the region's box, or one dimension with the region's elements in order; the box
    must lie inside the region.
    """
    local = tuple(o - r for o, r in zip(offset, region.offset, strict=True))
    if tuple(tensor.shape) == region.shape and region.is_box:
        return tensor[tuple(slice(o, o + n) for o, n in zip(local, shape, strict=True))]
    unit = tensor.stride(0)
    strides = row_major(region.shape)
    first = sum(o * s for o, s in zip(local, strides, strict=True)) - region.start
    return tensor.as_strided(shape, [s * unit for s in strides], tensor.storage_offset() + first * unit)
