"""Coverage of all tensors of a table at once, against counting elements one by one."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoint.coverage import MAX_SPLIT_DIMS, coverage_problem
from checkpoint.format import chunk_count
from checkpoint.manifest import SHARED, SavedSlice, SliceTable
from checkpoint.region import Region
from tests.test_checkpoint.test_region import positions, regions, shapes


@st.composite
def cuts(draw: st.DrawFn, offset: tuple[int, ...], box: tuple[int, ...]) -> list[Region]:
    """A box cut into regions: guillotine cuts first, then ranges."""
    dims = [d for d, n in enumerate(box) if n > 1]
    if not dims or draw(st.booleans()):
        middle = draw(st.integers(0, math.prod(box)))
        whole = Region.box(offset, box)
        return [whole.part(0, middle), whole.part(middle, whole.stop)] if draw(st.booleans()) else [whole]
    d = draw(st.sampled_from(dims))
    n = draw(st.integers(1, box[d] - 1))
    first, second = (*box[:d], n, *box[d + 1 :]), (*box[:d], box[d] - n, *box[d + 1 :])
    return draw(cuts(offset, first)) + draw(cuts((*offset[:d], offset[d] + n, *offset[d + 1 :]), second))


@st.composite
def tensors(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Region]]:
    """A shape and slices of it: often a partition, sometimes with one slice too many or too few."""
    shape = draw(shapes)
    held = draw(cuts((0,) * len(shape), shape) if draw(st.integers(0, 3)) else st.lists(regions(shape), max_size=4))
    change = draw(st.sampled_from(["none", "none", "more", "less"]))
    if change == "more":
        held = [*held, draw(regions(shape))]
    elif change == "less":
        held = held[1:]
    return shape, draw(st.permutations(held))


def row_of(name: str, shape: tuple[int, ...], region: Region, **other: int) -> SavedSlice:
    """A sound row."""
    digests = (0,) * chunk_count(region.numel * 4)
    return SavedSlice(name, SHARED, "F32", shape, region, "r", other.get("byte_start", 0), digests)


def is_partition(shape: tuple[int, ...], held: list[Region]) -> bool:
    counts = np.zeros(math.prod(shape), int)
    for region in held:
        counts[positions(region, shape)] += 1
    return bool((counts == 1).all())


@given(st.lists(tensors(), max_size=4))
def test_exactly_the_tensors_that_are_no_partition_are_complained_about(cases):
    rows = [row_of(str(i), shape, region) for i, (shape, held) in enumerate(cases) for region in held]
    table = SliceTable.of(rows, {})
    expected = [repr(str(i)) for i, (shape, held) in enumerate(cases) if held and not is_partition(shape, held)]
    assert sorted(problem.split()[0] for problem in table.problems()) == sorted(expected)
    for i, (shape, held) in enumerate(cases):
        if held:
            assert table.problem(str(i)) == coverage_problem(shape, held)


@given(tensors())
def test_rows_that_touch_a_region_hold_all_of_it(case):
    shape, held = case
    table = SliceTable.of([row_of("w", shape, region) for region in held], {})
    if held and table.problem("w") is None:
        for wanted in held:
            found = [row.region for row in table.rows("w", touching=wanted)]
            here = set(positions(wanted, shape).tolist())
            assert here <= {p for region in found for p in positions(region, shape).tolist()}


PINWHEEL = [
    Region.box((0, 0), (1, 2)),
    Region.box((0, 2), (2, 1)),
    Region.box((2, 1), (1, 2)),
    Region.box((1, 0), (2, 1)),
]


def test_boxes_that_no_straight_cut_separates_are_a_partition():
    assert coverage_problem((3, 3), [*PINWHEEL, Region.box((1, 1), (1, 1))]) is None
    assert coverage_problem((3, 3), PINWHEEL) == "has 1 of its 9 elements held by no rank"


def test_a_hole_and_an_overlap_of_the_same_size_do_not_cancel():
    held = [Region.box((0, 1), (2, 2)), Region.box((1, 0), (1, 1)), Region.box((1, 1), (1, 1))]
    assert coverage_problem((2, 3), held) == "has the element at [0, 0] held by no rank"
    overlapping = [Region.box((0, 0), (2, 2)), Region.box((0, 1), (1, 2))]
    expected = "is held twice where the box at [0, 1] of shape [1, 2] meets the one at [0, 0] of shape [2, 2]"
    assert coverage_problem((2, 3), overlapping) == expected


def test_two_hundred_thousand_slices_are_checked_in_one_go():
    """As Python objects, or each against each, this would take minutes."""
    side, parts = 1000, 10
    rows = [
        row_of(f"layer.{i}.weight", (side, side), Region.box((r * 100, c * 100), (100, 100)))
        for i in range(20)
        for r in range(parts)
        for c in range(parts)
    ]
    many = SliceTable.of(rows, {})
    table = SliceTable.merge([rename(many, k) for k in range(100)])
    assert len(table) == 200_000
    assert len(table.keys()) == 2_000
    assert table.problems() == []


def rename(table: SliceTable, k: int) -> SliceTable:
    """The same slices of other tensors."""
    names = [f"{k}.{name}" for name in table._table.column("name").to_pylist()]
    return SliceTable(table._table.set_column(0, "name", [names]), {}, "renamed")


def test_more_than_can_be_checked_is_refused_at_once():
    shape = (2,) * (MAX_SPLIT_DIMS + 1)
    corners = [Region.box(tuple(map(int, f"{i:06b}")), (1,) * 6) for i in range(64)]
    assert "is cut into 64 boxes along 6 dimensions" in str(coverage_problem(shape, corners))
    flat = [Region.whole((1,) * 64)] * 100_000
    thin = [Region((0,) * 64, (1,) * 63 + (0,), 0, 0), *flat]
    assert "more than can be checked" in str(coverage_problem((1,) * 64, thin))


@pytest.mark.parametrize(("start", "message"), [(0, None), (2, "shared"), (20, None)])
def test_rows_share_all_their_bytes_or_none(start: int, message: str | None):
    one = row_of("a", (5,), Region.whole((5,)))
    two = dataclasses.replace(one, name="b", byte_start=start)
    assert (SliceTable.of([one, two], {}).places().shared() is not None) == (message is not None)
