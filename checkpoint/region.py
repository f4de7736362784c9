"""Where the elements of a slice lie in its whole tensor.

One description fits every layout: a *region* is a box of the tensor and a range of that box's row-major
order. A whole tensor is the full box and its full range; a tensor-parallel shard is a smaller box; a ZeRO
partition is the full box and part of the range; an 8 MiB chunk of any of these is the same box and a shorter
range. Intersections are boxes, because a range of a row-major order is a handful of boxes, and a box is a
strided view on either side: that is all that resharding needs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Region:
    """Elements [start, stop) of the row-major order of the box at `offset` with `shape`."""

    offset: Shape
    shape: Shape
    start: int
    stop: int

    @classmethod
    def whole(cls, shape: Shape) -> Region:
        """Return the region of an entire tensor."""
        return cls((0,) * len(shape), shape, 0, math.prod(shape))

    @classmethod
    def box(cls, offset: Shape, shape: Shape) -> Region:
        """Return all of a box."""
        return cls(offset, shape, 0, math.prod(shape))

    @property
    def numel(self) -> int:
        return self.stop - self.start

    @property
    def is_box(self) -> bool:
        """Whether the range is all of the box."""
        return self.start == 0 and self.stop == math.prod(self.shape)

    def part(self, start: int, stop: int) -> Region:
        """Return elements [start, stop) of this region, counted from its first."""
        return Region(self.offset, self.shape, self.start + start, self.start + stop)

    def problem(self, global_shape: Shape) -> str | None:
        """Say why this region does not lie inside a tensor of `global_shape`; None if it does."""
        if len(self.offset) != len(global_shape) or len(self.shape) != len(global_shape):
            return f"has {len(self.shape)} dimensions, its tensor {len(global_shape)}"
        if any(o < 0 or n < 0 or o + n > g for o, n, g in zip(self.offset, self.shape, global_shape, strict=True)):
            return f"box at {list(self.offset)} of shape {list(self.shape)} leaves shape {list(global_shape)}"
        if not 0 <= self.start <= self.stop <= math.prod(self.shape):
            return f"range [{self.start}, {self.stop}) leaves its {math.prod(self.shape)} elements"
        return None

    def boxes(self) -> Iterator[tuple[Shape, Shape]]:
        """Yield (offset, shape) of the disjoint boxes of the tensor that make up this region, in order."""
        for offset, shape in _range_boxes(self.shape, self.start, self.stop):
            yield tuple(o + b for o, b in zip(self.offset, offset, strict=True)), shape


def row_major(shape: Shape) -> Shape:
    """Return the element strides of a contiguous tensor of `shape`."""
    strides = [1] * len(shape)
    for dim in range(len(shape) - 2, -1, -1):
        strides[dim] = strides[dim + 1] * shape[dim + 1]
    return tuple(strides)


def intersect(a: Region, b: Region) -> Iterator[tuple[Shape, Shape]]:
    """Yield (offset, shape) of the disjoint boxes of the tensor whose elements lie in both regions."""
    others = list(b.boxes())
    for a_offset, a_shape in a.boxes():
        for b_offset, b_shape in others:
            offset = tuple(map(max, a_offset, b_offset))
            end = tuple(
                min(ao + an, bo + bn) for ao, an, bo, bn in zip(a_offset, a_shape, b_offset, b_shape, strict=True)
            )
            shape = tuple(e - o for e, o in zip(end, offset, strict=True))
            if all(n > 0 for n in shape):
                yield offset, shape


def _range_boxes(shape: Shape, start: int, stop: int) -> Iterator[tuple[Shape, Shape]]:
    """Yield the boxes of a row-major range: a block of whole rows, and the partial rows around it."""
    if start >= stop:
        return
    if not shape:
        yield (), ()
        return
    inner = math.prod(shape[1:])
    first, head = divmod(start, inner)
    last, tail = divmod(stop, inner)
    if first == last:
        for offset, box in _range_boxes(shape[1:], head, tail):
            yield (first, *offset), (1, *box)
        return
    if head:
        for offset, box in _range_boxes(shape[1:], head, inner):
            yield (first, *offset), (1, *box)
        first += 1
    if last > first:
        yield (first, *(0,) * (len(shape) - 1)), (last - first, *shape[1:])
    if tail:
        for offset, box in _range_boxes(shape[1:], 0, tail):
            yield (last, *offset), (1, *box)
