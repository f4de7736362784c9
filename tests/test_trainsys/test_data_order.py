"""The order of samples: bijective for every size, even, another by seed and epoch, cheap at any position."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainsys.data import Order


@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_an_epoch_is_a_permutation_for_every_size_up_to_600(epoch: int) -> None:
    for size in range(1, 600):
        samples = Order(size, seed=size).samples(epoch * size, size)
        assert np.array_equal(np.sort(samples), np.arange(size)), size


@pytest.mark.parametrize("size", [1 << 16, (1 << 16) + 1, 100_003, (1 << 18) - 1])
def test_an_epoch_is_a_permutation_for_large_sizes(size: int) -> None:
    assert np.array_equal(np.sort(Order(size, seed=3).samples(0, size)), np.arange(size))


@given(st.integers(1, 10**15), st.integers(-(2**70), 2**70), st.integers(0, 10**18), st.integers(1, 40))
def test_samples_at_any_position_are_in_range_and_those_of_one_by_one(
    size: int, seed: int, position: int, count: int
) -> None:
    order = Order(size, seed)
    samples = order.samples(position, count)
    assert ((samples >= 0) & (samples < size)).all()
    assert samples.tolist() == [order.sample(position + i) for i in range(count)]
    within = np.arange(position, position + count) // size == position // size
    assert len(set(samples[within].tolist())) == within.sum()


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_every_permutation_of_a_few_samples_is_equally_frequent(size: int) -> None:
    permutations = list(itertools.permutations(range(size)))
    per_permutation = 50
    seen = Counter(
        tuple(Order(size, seed).samples(0, size).tolist()) for seed in range(per_permutation * len(permutations))
    )
    chi_squared = sum((seen[p] - per_permutation) ** 2 / per_permutation for p in permutations)
    assert chi_squared < _chi_squared_limit(len(permutations) - 1)


@pytest.mark.parametrize("size", [7, 24, 33])
def test_every_sample_is_equally_frequent_at_every_position(size: int) -> None:
    per_cell = 50
    counts = np.zeros((size, size))
    order = Order(size, seed=11)
    for epoch in range(per_cell * size):
        counts[np.arange(size), order.samples(epoch * size, size)] += 1
    chi_squared = ((counts - per_cell) ** 2 / per_cell).sum()
    assert chi_squared < _chi_squared_limit((size - 1) ** 2)


def test_neighbours_in_the_data_are_not_neighbours_in_the_order() -> None:
    size = 200_000
    samples = Order(size, seed=5).samples(0, size)
    steps = np.diff(samples)
    assert abs(np.corrcoef(samples[:-1], samples[1:])[0, 1]) < 5 / size**0.5
    # Two of a random order follow each other once in a whole epoch, on average.
    assert (steps == 1).sum() < 12


def test_seeds_and_epochs_are_unrelated_orders() -> None:
    size = 4096
    orders = [Order(size, seed).samples(epoch * size, size) for seed in range(6) for epoch in range(6)]
    for first, second in itertools.combinations(orders, 2):
        # A fixed point of two random permutations: one on average.
        assert (first == second).sum() < 12


def test_the_order_is_the_same_in_every_version_of_the_toolkit() -> None:
    assert Order(1000, seed=0).samples(0, 6).tolist() == PINNED


def test_a_position_far_on_costs_what_the_first_costs() -> None:
    order = Order(10**12, seed=1)
    calls = {position: _mixing_calls(order, position) for position in (0, 10**17)}
    assert max(calls.values()) < 20


@pytest.mark.parametrize("wrong", [0, -1])
def test_no_samples_have_no_order(wrong: int) -> None:
    with pytest.raises(ValueError, match="at least 1 sample"):
        Order(wrong, seed=0)


def test_a_negative_position_is_refused() -> None:
    with pytest.raises(ValueError, match="position: -1"):
        Order(3, seed=0).sample(-1)


def _mixing_calls(order: Order, position: int) -> int:
    """How often cycle walking encrypts for eight samples at `position`."""
    encrypt, calls = order._encrypted, 0

    class Counting(Order):
        def _encrypted(self, index, keys):  # type: ignore[no-untyped-def]
            nonlocal calls
            calls += 1
            return encrypt(index, keys)

    Counting(order.num_samples, order.seed).samples(position, 8)
    return calls


def _chi_squared_limit(degrees: int) -> float:
    """Exceeded by chance once in a million (Wilson and Hilferty's normal approximation, 4.75 deviations)."""
    return float(degrees * (1 - 2 / (9 * degrees) + 4.75 * (2 / (9 * degrees)) ** 0.5) ** 3)


PINNED = [988, 987, 478, 941, 164, 644]
