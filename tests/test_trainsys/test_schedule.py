"""The learning rate at every corner of a run."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainsys.config import ScheduleConfig
from trainsys.schedule import check, factor

COSINE = ScheduleConfig(kind="cosine", warmup_steps=4, final_ratio=0.1)
WSD = ScheduleConfig(kind="wsd", warmup_steps=4, decay_steps=5, final_ratio=0.1)
CONSTANT = ScheduleConfig(kind="constant", warmup_steps=4)


def curve(schedule: ScheduleConfig, steps: int) -> list[float]:
    return [factor(schedule, step, steps) for step in range(1, steps + 1)]


@pytest.mark.parametrize("schedule", [COSINE, WSD, CONSTANT])
def test_warm_up_is_linear_and_its_first_step_already_moves(schedule: ScheduleConfig) -> None:
    assert curve(schedule, 20)[:4] == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("schedule", [COSINE, WSD, CONSTANT])
def test_without_warm_up_the_first_step_is_at_most_the_peak(schedule: ScheduleConfig) -> None:
    assert factor(replace(schedule, warmup_steps=0), 1, 20) == pytest.approx(1, abs=0.01)


def test_cosine_ends_at_the_final_ratio_and_is_halfway_in_the_middle() -> None:
    values = curve(COSINE, 24)
    assert values[-1] == pytest.approx(0.1)
    assert values[13] == pytest.approx((1 + 0.1) / 2)
    assert values[4:] == sorted(values[4:], reverse=True)


def test_wsd_stays_until_its_last_steps_and_then_falls_evenly_to_the_final_ratio() -> None:
    values = curve(WSD, 20)
    assert values[3:15] == [1.0] * 12
    falls = [a - b for a, b in itertools.pairwise(values[14:])]
    assert falls == pytest.approx([0.9 / 5] * 5)
    assert values[-1] == pytest.approx(0.1)


def test_wsd_without_decay_steps_takes_a_fifth_of_the_run() -> None:
    schedule = replace(WSD, decay_steps=0)
    assert curve(schedule, 20) == curve(replace(WSD, decay_steps=4), 20)
    assert curve(replace(schedule, warmup_steps=0), 2) == pytest.approx([1.0, 0.1])


def test_constant_stays_at_the_peak() -> None:
    assert curve(CONSTANT, 10)[3:] == [1.0] * 7


@given(
    st.sampled_from([COSINE, WSD, CONSTANT]),
    st.integers(0, 30),
    st.integers(0, 30),
    st.floats(0, 1),
    st.integers(1, 30),
)
def test_what_check_accepts_stays_between_the_warm_up_and_the_peak(
    base: ScheduleConfig, warmup_steps: int, decay_steps: int, final_ratio: float, steps: int
) -> None:
    schedule = replace(base, warmup_steps=warmup_steps, decay_steps=decay_steps, final_ratio=final_ratio)
    if check(schedule, steps):
        return
    values = curve(schedule, steps)
    assert all(math.isfinite(value) and 0 <= value <= 1 for value in values)
    if warmup_steps:
        assert values[warmup_steps - 1] == 1
    if schedule.kind != "constant":
        assert values[-1] == pytest.approx(final_ratio)


@pytest.mark.parametrize(
    ("changes", "steps", "message"),
    [
        ({"warmup_steps": 20}, 20, "schedule.warmup_steps: 20 does not fit a cosine run of 20 steps; allowed: 0 to 19"),
        ({"kind": "constant", "warmup_steps": 21}, 20, "a constant run of 20 steps; allowed: 0 to 20"),
        ({"kind": "wsd", "warmup_steps": 17, "decay_steps": 4}, 20, "a wsd run of 20 steps; allowed: 0 to 16"),
        ({"kind": "wsd", "decay_steps": 21, "warmup_steps": 0}, 20, "schedule.decay_steps: 21 does not fit 20 steps"),
    ],
)
def test_a_schedule_that_does_not_fit_the_run_is_named(changes: dict[str, Any], steps: int, message: str) -> None:
    assert any(message in problem for problem in check(replace(COSINE, **changes), steps))


@pytest.mark.parametrize("schedule", [COSINE, WSD, CONSTANT])
def test_a_warm_up_that_just_fits_is_accepted_and_one_step_more_is_not(schedule: ScheduleConfig) -> None:
    longest = next(steps for steps in range(100) if check(replace(schedule, warmup_steps=steps), 20)) - 1
    assert longest == {"cosine": 19, "wsd": 15, "constant": 20}[schedule.kind]
