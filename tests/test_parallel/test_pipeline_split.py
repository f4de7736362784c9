"""Layers are cut so that the slowest stage is as fast as can be."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.errors import PipelineError
from parallel.pipeline import Layer, Memory, check_layers, split


def _layers(*times: float) -> list[Layer]:
    return [Layer(time=time) for time in times]


@given(st.data(), st.lists(st.integers(1, 20), min_size=1, max_size=8), st.integers(0, 30), st.integers(0, 30))
def test_no_cut_has_a_faster_slowest_stage(data: st.DataObject, times: list[int], embedding: int, head: int) -> None:
    num_stages = data.draw(st.integers(1, len(times)))

    def slowest(sizes: Sequence[int]) -> int:
        ends = list(itertools.accumulate(sizes))
        sums = [sum(times[end - size : end]) for size, end in zip(sizes, ends, strict=True)]
        sums[0] += embedding
        sums[-1] += head
        return max(sums)

    found = split(_layers(*times), num_stages, embedding=Layer(time=embedding), head=Layer(time=head))
    assert sum(found) == len(times)
    assert min(found) >= 1
    n = len(times)
    every = (itertools.pairwise((0, *cuts, n)) for cuts in itertools.combinations(range(1, n), num_stages - 1))
    assert slowest(found) == min(slowest([end - first for first, end in cuts]) for cuts in every)


def test_an_expensive_head_takes_layers_off_the_last_stage() -> None:
    assert split(_layers(*[1.0] * 8), 2, head=Layer(time=2.0)) == [5, 3]
    assert split(_layers(*[1.0] * 7), 2) in ([3, 4], [4, 3])


def test_of_equal_cuts_the_most_even_is_taken() -> None:
    assert split(_layers(6, 1, 1, 1, 1, 1, 1), 4) == [1, 2, 2, 2]


def test_memory_moves_the_cut_and_is_refused_when_nothing_fits() -> None:
    layers = [Layer(time=1.0, state_bytes=10.0, kept_bytes=5.0)] * 6
    assert split(layers, 2, memory=Memory(limit_bytes=60, in_flight=(2, 1))) == [3, 3]
    assert split(layers, 2, memory=Memory(limit_bytes=60, in_flight=(4, 1))) == [2, 4]
    with pytest.raises(PipelineError, match="no cut of 6 layers into 2 stages fits 40 bytes"):
        split(layers, 2, memory=Memory(limit_bytes=40, in_flight=(2, 1)))


def test_fewer_layers_than_stages_are_refused() -> None:
    with pytest.raises(PipelineError, match="4 stages for 3 layers; each stage needs a layer: 1 to 3 stages"):
        split(_layers(1, 1, 1), 4)


def test_explicit_layers_are_checked_for_everything_at_once() -> None:
    check_layers([3, 4], 2, 7)
    with pytest.raises(PipelineError) as error:
        check_layers([3, 0, 3], 2, 7)
    assert len(str(error.value).splitlines()) == 3
