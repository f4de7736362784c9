"""The labelled benchmark's grid and its arithmetic."""

from __future__ import annotations

from dataclasses import replace

import pytest

from faulttol.bench import Report
from faulttol.bench.labelled import judge
from faulttol.bench.labels import rivals
from faulttol.bench.labels.grid import (
    BENIGN,
    ENDING,
    MAGNITUDES,
    NUMERIC,
    SLOW,
    STANDING,
    Case,
    Verdict,
    cases,
    fault_of,
)
from faulttol.inject import KINDS
from faulttol.view import JobView
from tests.test_faulttol.scenes import Scene

EVERY = (*BENIGN, *SLOW, *STANDING, *NUMERIC, *ENDING)


def test_the_grid_has_every_kind_of_fault_that_this_machine_can_show() -> None:
    assert set(KINDS) - set(EVERY) == {"cpu_hog"}  # the emulated device does not feel it
    whole = cases(["ddp", "fsdp", "pipeline"], [4, 8], EVERY, MAGNITUDES, range(10))
    assert len({case.name for case in whole}) == len(whole) == 2860
    assert sum(case.truth == "none" for case in whole) == 480


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
        name="",
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
    ]
    report = Report("faulttol.labelled", {})
    judge(report, verdicts)
    gates = {gate.name: (gate.value, gate.ok) for gate in report.gates}
    assert gates["hang: precision"] == (8 / 9, False)
    assert gates["hang: recall"] == (8 / 10, False)
    assert gates["hang: culprit"] == (6 / 8, False)
    assert gates["slow: recall"] == (1.0, True)  # what made steps less than 1.5 times as long is not gated
    assert gates["alarms in clean and benign runs"] == (1, False)
    assert gates["hang found after, s"] == (1.1, True)
    assert report.median("benign", "trials") == 10


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
