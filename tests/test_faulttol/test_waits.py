"""How long ranks waited for a CPU is kept for as far back as a window may go."""

from __future__ import annotations

import itertools

from faulttol.history import WaitHistory

SECOND_NS = 1_000_000_000


def test_moments_are_kept_apart_and_the_newest_always() -> None:
    history = WaitHistory()
    for tenth in range(11):
        kept = history.add(tenth * SECOND_NS // 10, tenth / 100)
    assert kept[0] == (0, 0.0)
    assert kept[-1] == (SECOND_NS, 0.1)
    gaps_ns = [later - earlier for (earlier, _), (later, _) in itertools.pairwise(kept)]
    assert all(gap >= SECOND_NS // 4 for gap in gaps_ns[:-1])


def test_an_hour_is_kept_in_few_moments() -> None:
    history = WaitHistory()
    for second in range(3600):
        kept = history.add(second * SECOND_NS, second / 10)
    assert kept[0] == (0, 0.0)
    assert kept[-1] == (3599 * SECOND_NS, 359.9)
    assert 250 < len(kept) <= 512
    assert list(kept) == sorted(kept)
    newest = [moment_ns for moment_ns, _ in kept[-250:]]
    assert newest == [second * SECOND_NS for second in range(3350, 3600)], "of late nothing is missing"


def test_a_count_that_begins_anew_is_another() -> None:
    """The agent of a machine was started again."""
    history = WaitHistory()
    history.add(0, 5.0)
    assert history.add(SECOND_NS, 6.0) == ((0, 5.0), (SECOND_NS, 6.0))
    assert history.add(2 * SECOND_NS, 0.5) == ((2 * SECOND_NS, 0.5),)
