"""Regions against brute force: NumPy index arithmetic on small tensors."""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from checkpoint.coverage import coverage_problem
from checkpoint.region import Region, intersect, row_major
from checkpoint.reshard import view


@st.composite
def regions(draw: st.DrawFn, shape: tuple[int, ...]) -> Region:
    """A region inside a tensor of `shape`."""
    offset, box = [], []
    for n in shape:
        start = draw(st.integers(0, n))
        stop = draw(st.integers(start, n))
        offset.append(start)
        box.append(stop - start)
    numel = math.prod(box)
    first = draw(st.integers(0, numel))
    return Region(tuple(offset), tuple(box), first, draw(st.integers(first, numel)))


shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)
shape_and_two = shapes.flatmap(lambda s: st.tuples(st.just(s), regions(s), regions(s)))


def positions(region: Region, shape: tuple[int, ...]) -> np.ndarray:
    """Positions, in the flattened whole, of a region's elements in order."""
    whole = np.arange(math.prod(shape)).reshape(shape)
    box = whole[tuple(slice(o, o + n) for o, n in zip(region.offset, region.shape, strict=True))]
    return box.reshape(-1)[region.start : region.stop]


@given(shape_and_two)
def test_the_boxes_of_a_region_are_its_elements_in_order(case):
    shape, region, _ = case
    boxes = [positions(Region.box(*box), shape) for box in region.boxes()]
    found = np.concatenate(boxes) if boxes else np.empty(0, int)
    assert found.tolist() == positions(region, shape).tolist()


@given(shape_and_two)
def test_an_intersection_is_every_common_element_once(case):
    shape, a, b = case
    common = [p for box in intersect(a, b) for p in positions(Region.box(*box), shape)]
    assert sorted(common) == sorted(set(positions(a, shape)) & set(positions(b, shape)))


@given(shape_and_two)
def test_views_of_both_sides_of_an_intersection_are_the_same_elements(case):
    shape, a, b = case
    whole = torch.arange(math.prod(shape)).reshape(shape)
    held = [torch.from_numpy(positions(r, shape).copy()) for r in (a, b)]
    for offset, box in intersect(a, b):
        expected = whole[tuple(slice(o, o + n) for o, n in zip(offset, box, strict=True))]
        assert torch.equal(view(held[0], a, offset, box), expected)
        assert torch.equal(view(held[1], b, offset, box), expected)


@given(shape_and_two)
def test_a_part_of_a_region_is_a_slice_of_its_elements(case):
    shape, region, _ = case
    half = region.numel // 2
    assert positions(region.part(half, region.numel), shape).tolist() == positions(region, shape)[half:].tolist()


@given(shapes.flatmap(lambda s: st.tuples(st.just(s), st.lists(regions(s), max_size=4))))
def test_coverage_is_complained_about_exactly_when_an_element_is_not_held_once(case):
    shape, held = case
    counts = np.zeros(math.prod(shape), int)
    for region in held:
        counts[positions(region, shape)] += 1
    whole_and_once = bool((counts == 1).all()) and (bool(held) or counts.size > 0)
    assert (coverage_problem(shape, held) is None) == whole_and_once


@given(shapes.flatmap(lambda s: st.tuples(st.just(s), st.data())))
def test_any_cut_into_flat_ranges_covers(case):
    shape, data = case
    total = math.prod(shape)
    cuts = sorted(data.draw(st.lists(st.integers(0, total), max_size=5)))
    whole = Region.whole(shape)
    held = [whole.part(a, b) for a, b in zip([0, *cuts], [*cuts, total], strict=True)]
    assert coverage_problem(shape, held) is None


def test_a_view_of_a_whole_box_follows_the_strides_of_the_tensor():
    transposed = torch.arange(12).reshape(3, 4).T
    region = Region.whole((4, 3))
    view(transposed, region, (1, 1), (2, 2)).fill_(-1)
    assert (transposed[1:3, 1:3] == -1).all()
    assert int((transposed == -1).sum()) == 4


def test_a_view_of_a_flat_range_follows_the_stride_of_the_tensor():
    every_other = torch.zeros(20)[::2]
    view(every_other, Region((0, 0), (4, 5), 3, 13), (1, 0), (1, 5)).fill_(1)
    assert every_other.tolist() == [0, 0, 1, 1, 1, 1, 1, 0, 0, 0]


def test_problems_of_regions_are_named():
    assert Region((0,), (3,), 0, 3).problem((3, 1)) == "has 1 dimensions, its tensor 2"
    assert "leaves shape [3]" in str(Region((1,), (3,), 0, 3).problem((3,)))
    assert "range [0, 4) leaves its 3 elements" in str(Region((0,), (3,), 0, 4).problem((3,)))
    assert Region((), (), 0, 1).problem(()) is None


def test_row_major_strides_are_those_of_a_contiguous_tensor():
    for shape in [(), (3,), (2, 3, 4), (2, 1, 5)]:
        assert row_major(shape) == torch.empty(shape).stride()
