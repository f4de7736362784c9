"""Saved slices joined with wanted regions: interval arithmetic, without storage or ranks. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from checkpoint.manifest import SavedSlice
from checkpoint.region import Region, Shape, intersect, row_major


@dataclass(frozen=True, slots=True)
class Read:
    """One chunk of a saved slice that a wanted region needs, and the boxes of the tensor they share."""

    row: SavedSlice
    chunk_index: int
    region: Region
    """The elements of the chunk."""
    boxes: tuple[tuple[Shape, Shape], ...]
    """(offset, shape) in the whole tensor."""
    target: int = 0
    """Which of the caller's regions wants them."""

    @property
    def file(self) -> str:
        return self.row.file

    @property
    def byte_start(self) -> int:
        return self.row.byte_start + self.chunk_index * self.row.chunk_bytes

    @property
    def nbytes(self) -> int:
        return self.region.numel * self.row.itemsize

    @property
    def digest(self) -> int:
        return self.row.digests[self.chunk_index]

    @property
    def numel(self) -> int:
        """Elements that the wanted region takes from the chunk."""
        return sum(math.prod(shape) for _, shape in self.boxes)


def plan(rows: Sequence[SavedSlice], wanted: Region, target: int = 0) -> Iterator[Read]:
    """Yield the chunks of one tensor's saved slices that hold elements of `wanted`, region `target` of the caller."""
    for row in rows:
        if not _may_touch(row.region, wanted):
            continue
        per_chunk = row.chunk_bytes // row.itemsize
        indices = range(len(row.digests))
        if (row.region.offset, row.region.shape) == (wanted.offset, wanted.shape):
            first, last = wanted.start - row.region.start, wanted.stop - row.region.start
            indices = indices[max(0, first // per_chunk) : -(-last // per_chunk)]
        for index in indices:
            chunk = row.region.part(index * per_chunk, min((index + 1) * per_chunk, row.region.numel))
            boxes = tuple(intersect(chunk, wanted))
            if boxes:
                yield Read(row, index, chunk, boxes, target)


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


def _may_touch(a: Region, b: Region) -> bool:
    """Cheap test that drops most pairs: the boxes meet, and ranges of the same box meet."""
    if a.offset == b.offset and a.shape == b.shape:
        return a.start < b.stop and b.start < a.stop
    return all(
        max(ao, bo) < min(ao + an, bo + bn) for ao, an, bo, bn in zip(a.offset, a.shape, b.offset, b.shape, strict=True)
    )
