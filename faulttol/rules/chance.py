"""How likely chance alone is to make what was seen: exact, since windows are short and the tails matter. Pure."""

from __future__ import annotations

from math import comb


def at_least(num: int, num_trials: int, share: float) -> float:
    """Return the probability that at least `num` of independent trials come true, each with probability `share`."""
    return sum(comb(num_trials, k) * share**k * (1 - share) ** (num_trials - k) for k in range(num, num_trials + 1))


def all_of(num: int, num_true: int, num_cells: int) -> float:
    """Return the probability that `num` chosen cells are all true, of so many of which `num_true` are, at random."""
    return comb(num_cells - num, num_true - num) / comb(num_cells, num_true) if num <= num_true else 0.0
