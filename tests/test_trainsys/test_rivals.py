"""What the benchmark of rivals takes from their words."""

from __future__ import annotations

import pytest

from faulttol.bench import Report
from faulttol.bench.labels.grid import Case, fault_of
from faulttol.bench.labels.rivals import NOTHING
from trainsys.bench.rivals import judge, markdown, told_class


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("RuntimeError: [gloo/transport/tcp/unbound_buffer.cc:84] Timed out waiting 2000ms for recv operation", "hang"),
        ("RuntimeError: [gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4711", "crash"),
        ("RuntimeError: [enforce fail at gloo/transport/tcp/pair.cc:450] op.preamble.length <= op.nbytes", "desync"),
        ("faulttol.errors.InjectedFault: injected at step 7 of rank 1", None),
        ("", None),
    ],
)
def test_a_groups_error_is_taken_for_the_class_that_its_words_are_of(line: str, expected: str | None) -> None:
    assert told_class(f"Traceback (most recent call last):\n{line}\n") == expected


def test_a_rival_is_right_only_with_the_class_and_named_only_with_the_rank() -> None:
    case = Case("ddp", 4, "kill", 2.0, 5)
    culprit = fault_of(case, 0.025, 0.015)[1]
    report = Report("trainsys.rivals", {})
    told = [(case, (("crash", culprit), 0.1)), (case, (("crash", "rank 9"), 0.2)), (case, (("hang", ""), 2.0))]
    clean = [(Case("ddp", 4, "clean", 2.0, 5), (NOTHING, 0.0))]
    judge(report, {("Ray alone", "crash"): [*told, (case, (NOTHING, 0.0))], ("Ray alone", "none"): clean})
    figures = {(name, metric): values for (name, metric, _), values in report.samples.items()}
    assert figures["Ray alone, crash", "recall"] == [0.5]
    assert figures["Ray alone, crash", "something is wrong"] == [0.75]
    assert figures["Ray alone, crash", "culprit"] == [0.25]
    assert figures["Ray alone, crash", "told after"] == [0.1, 0.2, 2.0]
    assert figures["Ray alone, benign", "alarms"] == [0]
    assert "| Ray alone, crash | 4 | 0.5 | 0.75 | 0.25 | 0.20 (0.10 to 2.00) |" in markdown(report).splitlines()
    assert "| Ray alone, benign | 1 |  | 0 |  |  |" in markdown(report).splitlines()
