"""Where the soak says that lost time went."""

from __future__ import annotations

import pytest

from trainsys.bench.soak import split


def test_the_parts_of_what_a_fault_cost_add_up_to_it() -> None:
    # Step 3 is struck at 2.5; noticed at 3, placed at 4; struck again at 4.5 before its end; noticed at 5, placed at 7.
    times = {1: 1.0, 2: 2.0, 3: 9.0, 4: 10.0}
    parts = split(times, [(3.0, 4.0), (5.0, 7.0)], [2.5, 4.5], usual_s=1.0)
    assert parts == {
        "lost": [6.0],
        "done again": [0.5],
        "detection": [0.5, 0.5],
        "recovery": [1.0, 2.0],
        "restore": [0.5, 1.0],
    }
    assert sum(parts.pop("lost")) == pytest.approx(sum(map(sum, parts.values())))


def test_a_recovery_that_nothing_struck_for_took_no_detection() -> None:
    parts = split({1: 1.0, 2: 4.0}, [(2.0, 2.5)], [0.5], usual_s=1.0)
    assert (parts["done again"], parts["detection"], parts["restore"]) == ([1.0], [0.0], [0.5])
