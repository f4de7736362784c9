"""The labelled benchmark's grid and its arithmetic."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import replace
from statistics import NormalDist

import pytest

from faulttol.bench import Report
from faulttol.bench.labelled import at_most, judge, summary
from faulttol.bench.labels import rivals
from faulttol.bench.labels.grid import (
    BENIGN,
    ENDING,
    HELD_OUT_SEEDS,
    MAGNITUDES,
    NUMERIC,
    SLOW,
    STANDING,
    TUNED_SEEDS,
    Case,
    Verdict,
    cases,
    fault_of,
)
from faulttol.bench.overhead import interval
from faulttol.inject import KINDS
from faulttol.view import JobView
from tests.test_faulttol.scenes import Scene

EVERY = (*BENIGN, *SLOW, *STANDING, *NUMERIC, *ENDING)
WHOLE = cases(["ddp", "fsdp", "pipeline"], [4, 8], EVERY, MAGNITUDES, range(10))


def test_the_grid_has_every_kind_of_fault_that_this_machine_can_show() -> None:
    assert set(KINDS) - set(EVERY) == {"cpu_hog"}  # the emulated device does not feel it
    assert len({case.name for case in WHOLE}) == len(WHOLE) == 2860
    assert sum(case.truth == "none" for case in WHOLE) == 480
    assert not set(HELD_OUT_SEEDS) & set(TUNED_SEEDS)
    assert set(HELD_OUT_SEEDS) | set(TUNED_SEEDS) == set(range(10))


@pytest.mark.parametrize(
    "key",
    [
        lambda case: (case.job, case.num_ranks),
        lambda case: case.kind,
        lambda case: (case.kind, case.magnitude),
        lambda case: case.truth,
    ],
    ids=["layouts", "kinds", "magnitudes", "classes"],
)
def test_every_beginning_of_the_grid_is_balanced(key: Callable[[Case], Hashable]) -> None:
    whole, seen = Counter(map(key, WHOLE)), Counter[Hashable]()
    for num, case in enumerate(WHOLE, 1):
        seen[key(case)] += 1
        assert all(abs(seen[one] - whole[one] * num / len(WHOLE)) < 6 for one in whole)


@pytest.mark.parametrize("kind", [kind for kind in EVERY if kind != "clean"])
def test_a_case_is_one_fault_and_the_same_each_time(kind: str) -> None:
    case = Case("pipeline", 8, kind, 2.0, 3)
    fault, culprit = fault_of(case, 0.02)
    assert fault is not None
    assert (fault, culprit) == fault_of(case, 0.02)
    assert fault.kind == kind
    if culprit.startswith("link"):
        assert abs(fault.rank - fault.to_rank) == 4  # the other stage
        assert culprit == f"link {fault.rank}->{fault.to_rank}"


def test_precision_recall_and_culprits_are_of_what_was_said() -> None:
    right = Verdict(
        name="ddp/4/hang/2/7",
        truth="hang",
        kind="hang",
        magnitude=2.0,
        said="hang",
        said_kind="hang",
        named="rank 1",
        culprit="rank 1",
        after_s=1.1,
        grown=1.0,
        suspicions=0,
        rivals={"Ray alone": ("none", "")},
        summary="",
    )
    verdicts = [
        *[right] * 6,
        *[replace(right, named="rank 2")] * 2,
        replace(right, said="none"),
        replace(right, said="crash"),
        *[replace(right, truth="none", said="none")] * 9,
        replace(right, truth="none", said="hang"),
        replace(right, truth="slow", said="none", grown=1.2),
        replace(right, truth="slow", said="slow", grown=1.7),
        replace(right, name="ddp/4/hang/2/0", said="none"),
        replace(right, name="ddp/4/kill/2/0", truth="crash", said="crash"),
    ]
    report = Report("faulttol.labelled", {})
    judge(report, verdicts)
    gates = {gate.name: (gate.value, gate.ok) for gate in report.gates}
    assert gates["hang: precision"] == (8 / 9, False)
    assert gates["hang: recall"] == (8 / 10, False)
    assert gates["hang: culprit"] == (6 / 8, False)
    assert gates["slow: recall"] == (1.0, True)  # what made steps less than 1.5 times as long is not gated
    assert gates["alarms in clean and benign runs"] == (1, False)
    assert gates["hang: found within threshold + 1 s"] == (1.0, True)
    assert gates["crash: recall"] == (1.0, True)  # of tuned seeds, where there is nothing else
    assert report.median("benign, held out", "trials") == 10
    assert report.median("hang, tuned", "recall") == 0
    assert "hang, held out  10      0.889      0.8     0.75" in summary(report)


def test_no_alarm_in_few_trials_promises_little() -> None:
    assert at_most(0, 10) == pytest.approx(1 - 0.05 ** (1 / 10), abs=1e-5)
    assert at_most(0, 100) == pytest.approx(0.0295, abs=1e-4)
    assert at_most(5, 10) == pytest.approx(0.7776, abs=1e-4)


def test_rivals_judge_the_same_records() -> None:
    slow = JobView(Scene(work_ms=lambda r, s: 30.0 if r == 2 else 10.0).run(40))
    even = JobView(Scene().run(40))
    before = dict.fromkeys(range(4), 0.010)
    assert rivals.section_score(slow, before, 5) == ("slow", "rank 2")
    assert rivals.section_score(even, before, 5) == rivals.NOTHING
    assert rivals.show_straggler(slow, 5) == ("slow", "rank 2")
    assert rivals.show_straggler(even, 5) == rivals.NOTHING
    link = JobView(Scene(transfer_ms=lambda step: 40.0).run(40))
    assert rivals.section_score(link, before, 5) == rivals.show_straggler(link, 5) == rivals.NOTHING
    everybody = JobView(Scene(work_ms=lambda r, s: 30.0).run(40))
    assert rivals.section_score(everybody, before, 5) == ("slow", "rank 0")  # a false alarm: all became slower


def test_an_interval_holds_the_cost_that_a_few_bad_pairs_do_not_move() -> None:
    spread = NormalDist(0.5, 2.0)
    samples = [spread.inv_cdf((i + 0.5) / 400) for i in range(400)] + [50.0, -49.0] * 10
    low, middle, high = interval(samples)
    assert middle == pytest.approx(0.5)
    assert low < middle < high
    assert 0.3 < high - low < 1.0
