"""Whether slices hold every element of a tensor exactly once, for all tensors of a table together. Pure.

Flat ranges are sorted and compared. Boxes are counted at their corners: the mixed difference of a box's indicator
function is +1 or -1 at each of its corners and 0 elsewhere, and a function of bounded support is zero exactly if
its mixed difference is. So boxes tile a tensor exactly if their signed corners cancel, one by one, against those
of the tensor: one sort, however many boxes there are, however they lie, and no test of each against each. A range
of a row-major order is the difference of two that start at 0, each of which is one box a dimension.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from checkpoint.region import Region, Shape

MAX_SPLIT_DIMS = 5
"""A tensor may be cut into boxes along so many of its dimensions: a box has 2^n corners."""
_MAX_CORNERS = 1 << 24
"""Of one tensor."""
_MAX_INDEX = 2.0**62

Ints = np.ndarray[Any, np.dtype[np.int64]]
Bools = np.ndarray[Any, np.dtype[np.bool_]]


@dataclass(frozen=True, slots=True)
class Slices:
    """Slices of many tensors, sound each by itself; shapes are padded in front to one number of dimensions.

    The rows of a tensor stand together, tensor after tensor.
    """

    tensor: Ints
    """Index of each slice's tensor, ascending from 0 without gaps."""
    whole: Ints
    """[slices, dims] shape of the tensor."""
    offset: Ints
    """[slices, dims]."""
    box: Ints
    """[slices, dims]."""
    start: Ints
    stop: Ints


def covered(slices: Slices) -> Bools:
    """Return for each tensor whether its slices are known to hold every element exactly once.

    False may also mean that the tensor is too odd for fixed-size integers: `coverage_problem` decides.
    """
    tensor = slices.tensor
    if not len(tensor):
        return np.zeros(0, dtype=np.bool_)
    first = np.flatnonzero(np.diff(tensor, prepend=-1))
    total = slices.whole[first].prod(axis=1)
    is_flat = np.logical_and.reduceat((slices.box == slices.whole).all(axis=1), first)
    empty = total == 0
    held: Bools = empty.copy()
    held[is_flat & ~empty] = _flat_covered(slices, is_flat & ~empty, total)
    held[~is_flat & ~empty] = _boxes_covered(slices, ~is_flat & ~empty)
    return held


def coverage_problem(global_shape: Shape, regions: Sequence[Region]) -> str | None:
    """Say which elements of a tensor the regions leave out or hold twice; None if each is held once."""
    total = math.prod(global_shape)
    if total == 0:
        return None if regions else "is held by no rank"
    if all(r.shape == global_shape for r in regions):
        return _flat_problem(total, regions)
    if len(regions) * len(global_shape) > _MAX_CORNERS // 4:
        return f"is cut into {len(regions)} slices of {len(global_shape)} dimensions, more than can be checked"
    boxes = [box for region in regions for box in region.boxes()]
    split = [d for d, n in enumerate(global_shape) if any(shape[d] != n for _, shape in boxes)]
    if len(split) > MAX_SPLIT_DIMS or len(boxes) << len(split) > _MAX_CORNERS:
        return f"is cut into {len(boxes)} boxes along {len(split)} dimensions; allowed are {MAX_SPLIT_DIMS} dimensions"
    corners: Counter[Shape] = Counter()
    for offset, shape in boxes:
        corners.update(_corners(offset, shape, split, 1))
    corners.update(_corners((0,) * len(global_shape), global_shape, split, -1))
    wrong = sorted(point for point, count in corners.items() if count)
    if not wrong:
        return None
    overlap = _overlap(boxes, split, wrong[0])
    if overlap:
        return overlap
    held = sum(math.prod(shape) for _, shape in boxes)
    if held < total:
        return f"has {total - held} of its {total} elements held by no rank"
    place = dict(zip(split, wrong[0], strict=True))
    return f"has the element at {[place.get(d, 0) for d in range(len(global_shape))]} held by no rank"


def _flat_covered(slices: Slices, chosen: Bools, total: Ints) -> Bools:
    """Whether the ranges of each chosen tensor follow each other from its first element to its last."""
    rows = np.flatnonzero(chosen[slices.tensor] & (slices.start < slices.stop))
    rows = rows[np.lexsort((slices.start[rows], slices.tensor[rows]))]
    tensor, start, stop = slices.tensor[rows], slices.start[rows], slices.stop[rows]
    good = np.zeros(len(chosen), dtype=np.bool_)
    if len(rows):
        first = np.diff(tensor, prepend=-1) != 0
        before = np.where(first, 0, np.roll(stop, 1))
        starts = np.flatnonzero(first)
        last = np.append(starts[1:], len(rows)) - 1
        good[tensor[starts]] = np.logical_and.reduceat(start == before, starts) & (stop[last] == total[tensor[starts]])
    return good[chosen]


def _boxes_covered(slices: Slices, chosen: Bools) -> Bools:
    """Whether the corners of each chosen tensor's boxes cancel against its own."""
    good = np.zeros(len(chosen), dtype=np.bool_)
    for batch in _batches(slices, chosen):
        sums = np.zeros(len(chosen), dtype=np.bool_)
        tensor, key, sign = batch
        order = np.argsort(key)
        key, tensor, sign = key[order], tensor[order], sign[order]
        points = np.flatnonzero(np.diff(key, prepend=-1))
        sums[tensor[points[np.add.reduceat(sign, points) != 0]]] = True
        good[tensor] = ~sums[tensor]
    return good[chosen]


def _batches(slices: Slices, chosen: Bools) -> Iterator[tuple[Ints, Ints, Ints]]:
    """Yield the signed corners of some tensors at a time: index of the tensor, place in it and sign.

    Places of different tensors differ. Tensors too odd for this are left out.
    """
    tensor, offset, shape, sign = _signed_boxes(slices, np.flatnonzero(chosen[slices.tensor]))
    if not len(tensor):
        return
    first = np.flatnonzero(np.diff(tensor, prepend=-1))
    counts = np.diff(np.append(first, len(tensor)))
    whole = slices.whole[np.searchsorted(slices.tensor, tensor[first])]
    split = np.logical_or.reduceat(shape != np.repeat(whole, counts, axis=0), first)
    extent = np.where(split, whole.astype(float) + 1, 1.0).prod(axis=1)
    num_split = split.sum(axis=1)
    fits = (num_split <= MAX_SPLIT_DIMS) & (counts << np.minimum(num_split, 32) <= _MAX_CORNERS) & (extent < _MAX_INDEX)
    patterns = np.where(fits, split @ (1 << np.arange(split.shape[1])), -1)
    for pattern in np.unique(patterns[fits]):
        dims = [d for d in range(split.shape[1]) if pattern >> d & 1]
        some: list[int] = []
        used, space = 0, 0.0
        for index in np.flatnonzero(patterns == pattern):
            corners = int(counts[index]) << len(dims)
            if some and (used + corners > _MAX_CORNERS // 4 or space + extent[index] >= _MAX_INDEX):
                yield _keyed(some, dims, first, counts, whole, (tensor, offset, shape, sign))
                some, used, space = [], 0, 0.0
            some.append(int(index))
            used, space = used + corners, space + extent[index]
        yield _keyed(some, dims, first, counts, whole, (tensor, offset, shape, sign))


def _keyed(
    some: Sequence[int], dims: Sequence[int], first: Ints, counts: Ints, whole: Ints, boxes: tuple[Ints, ...]
) -> tuple[Ints, Ints, Ints]:
    """Return the corners, along `dims`, of the boxes of some tensors."""
    extent = whole[np.ix_(some, dims)] + 1
    stride = np.ones_like(extent)
    for d in range(len(dims) - 2, -1, -1):
        stride[:, d] = stride[:, d + 1] * extent[:, d + 1]
    size = stride[:, 0] * extent[:, 0] if dims else np.ones(len(some), dtype=np.int64)
    base = np.repeat(np.cumsum(size) - size, counts[some])
    stride = np.repeat(stride, counts[some], axis=0)
    rows = np.concatenate([np.arange(first[i], first[i] + counts[i]) for i in some])
    tensor, offset, shape, sign = (column[rows] for column in boxes)
    keys, signs = [], []
    for corner in itertools.product((0, 1), repeat=len(dims)):
        point = offset[:, dims] + shape[:, dims] * np.array(corner, dtype=np.int64)
        keys.append(base + (point * stride).sum(axis=1))
        signs.append(sign * (-1) ** sum(corner))
    return np.tile(tensor, len(keys)), np.concatenate(keys), np.concatenate(signs)


def _signed_boxes(slices: Slices, rows: Ints) -> tuple[Ints, Ints, Ints, Ints]:
    """Return boxes (tensor, offset, shape, sign), tensor by tensor, that add up to the slices less their tensors."""
    box = slices.box[rows]
    start, stop = slices.start[rows], slices.stop[rows]
    full = (start == 0) & (stop == box.prod(axis=1)) & (stop > 0)
    part = rows[~full & (start < stop)]
    tensor, index = np.unique(slices.tensor[rows], return_index=True)
    whole = slices.whole[rows[index]]
    found = [
        (slices.tensor[rows[full]], slices.offset[rows[full]], box[full], np.ones(int(full.sum()), dtype=np.int64)),
        (tensor, np.zeros_like(whole), whole, -np.ones(len(tensor), dtype=np.int64)),
    ]
    for end, sign in ((slices.stop, 1), (slices.start, -1)):
        found += [
            (slices.tensor[part][some], offset, shape, np.full(len(offset), sign, dtype=np.int64))
            for some, offset, shape in _prefix_boxes(slices.offset[part], slices.box[part], end[part])
        ]
    columns = [np.concatenate(column) for column in zip(*found, strict=True)]
    order = np.argsort(columns[0], kind="stable")
    return columns[0][order], columns[1][order], columns[2][order], columns[3][order]


def _prefix_boxes(offset: Ints, box: Ints, count: Ints) -> Iterator[tuple[Bools, Ints, Ints]]:
    """Yield the boxes of the first `count` elements, not 0 in all, of each box: which have one, offset, shape."""
    dims = box.shape[1]
    stride = np.ones_like(box)
    for d in range(dims - 2, -1, -1):
        stride[:, d] = stride[:, d + 1] * box[:, d + 1]
    corner, shape, left = offset.copy(), box.copy(), count.copy()
    for d in range(dims):
        digit, left = np.divmod(left, stride[:, d])
        some = digit > 0
        level = shape.copy()
        level[:, d] = digit
        yield some, corner[some], level[some]
        corner[:, d] += digit
        shape[:, d] = 1


def _corners(offset: Shape, shape: Shape, dims: Sequence[int], sign: int) -> dict[Shape, int]:
    """Return the signed corners of a box along `dims`."""
    found = {}
    for corner in itertools.product((0, 1), repeat=len(dims)):
        point = tuple(offset[d] + shape[d] * c for d, c in zip(dims, corner, strict=True))
        found[point] = sign * (-1) ** sum(corner)
    return found


def _overlap(boxes: Sequence[tuple[Shape, Shape]], split: Sequence[int], point: Shape) -> str | None:
    """Say which boxes both hold the element at `point` of the split dimensions; None if no two do."""
    found = [
        (offset, shape)
        for offset, shape in boxes
        if all(offset[d] <= p < offset[d] + shape[d] for d, p in zip(split, point, strict=True))
    ]
    if len(found) < 2:
        return None
    (other_offset, other_shape), (offset, shape) = found[:2]
    return (
        f"is held twice where the box at {list(offset)} of shape {list(shape)} "
        f"meets the one at {list(other_offset)} of shape {list(other_shape)}"
    )


def _flat_problem(total: int, regions: Sequence[Region]) -> str | None:
    position = 0
    for region in sorted(regions, key=lambda r: (r.start, r.stop)):
        if region.start > position:
            return f"has elements [{position}, {region.start}) of {total} held by no rank"
        if region.start < position and region.numel:
            return f"has elements [{region.start}, {min(position, region.stop)}) of {total} held twice"
        position = max(position, region.stop)
    return None if position == total else f"has elements [{position}, {total}) of {total} held by no rank"
