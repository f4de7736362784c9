"""The labelled benchmark's grid and its arithmetic."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist
from typing import Any
from zlib import crc32

import pytest

from faulttol.bench import Report
from faulttol.bench.labelled import _longest_grown, _parser, main, read
from faulttol.bench.labels import rivals
from faulttol.bench.labels.digest import code_digest
from faulttol.bench.labels.figures import at_most, judge, markdown, summary
from faulttol.bench.labels.grid import (
    EVERY,
    HELD_OUT_SEEDS,
    MAGNITUDES,
    SLOW,
    TUNED_SEEDS,
    Case,
    Verdict,
    cases,
    fault_of,
    watch_s,
)
from faulttol.bench.labels.jobs import Withdraw
from faulttol.bench.labels.parts import in_parts, parts_of, words_of
from faulttol.bench.labels.trial import DETECTOR, Sighting, running, settle, strike
from faulttol.bench.labels.version import code_version
from faulttol.bench.overhead import interval
from faulttol.finding import Finding, FindingKind
from faulttol.inject import KINDS, Fault
from faulttol.localize import explain
from faulttol.view import JobView
from tests.test_faulttol.scenes import Scene

WHOLE = cases(["ddp", "fsdp", "pipeline"], [4, 8], EVERY, MAGNITUDES, HELD_OUT_SEEDS)


def test_the_grid_has_every_kind_of_fault_that_this_machine_can_show() -> None:
    assert set(KINDS) - set(EVERY) == {"cpu_hog"}  # the emulated device does not feel it
    assert len({case.name for case in WHOLE}) == len(WHOLE) == 1400
    assert sum(case.truth == "none" for case in WHOLE) == 270
    per_kind = Counter((case.job, case.kind, case.magnitude) for case in WHOLE)
    assert set(per_kind.values()) == {10}
    on_four = Counter((case.job, case.kind, case.magnitude) for case in WHOLE if case.num_ranks == 4)
    assert set(on_four.values()) == {5}
    assert not set(HELD_OUT_SEEDS) & set(TUNED_SEEDS)
    assert len(HELD_OUT_SEEDS) == 10


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
    fault, culprit = fault_of(case, 0.02, 0.01)
    assert fault is not None
    assert (fault, culprit) == fault_of(case, 0.02, 0.01)
    assert fault.kind == kind
    if culprit.startswith("link"):
        assert abs(fault.rank - fault.to_rank) == 4  # the other stage
        assert culprit == f"link {fault.rank}->{fault.to_rank}"


def _made_by(part: Sequence[Case]) -> set[Case]:
    """What the process makes that is started for these trials, where nothing is made yet."""
    options = _parser().parse_args(words_of(part))
    return set(cases(options.jobs, options.ranks, options.kinds, options.magnitudes, options.seeds))


def test_a_part_makes_its_own_trials() -> None:
    parts = parts_of(WHOLE)
    assert len(parts) == 3 * 2 * 10
    assert sum(len(part) for part in parts) == len(WHOLE)
    for part in parts:
        assert len({(case.job, case.num_ranks, case.seed) for case in part}) == 1
        assert _made_by(part) == set(part)


@pytest.mark.parametrize(
    "is_missing",
    [
        lambda case: _number(case) % 3 == 0,
        lambda case: case.kind in SLOW and _number(case) % 5 == 0,
        lambda case: case.kind not in SLOW,
        lambda case: case.magnitude == 1.8,
    ],
    ids=["a third", "few slow ones", "none slow", "one magnitude"],
)
def test_a_part_of_what_is_missing_makes_it_and_nothing_outside_the_grid(is_missing: Callable[[Case], bool]) -> None:
    missing = [case for case in WHOLE if is_missing(case)]
    for part in parts_of(missing):
        assert set(part) <= _made_by(part) <= set(WHOLE)


def _number(case: Case) -> int:
    """A number that is the same in every run."""
    return crc32(case.name.encode())


@pytest.mark.parametrize("magnitudes", [[1.8], [3.0], [3.0, 1.2], [1.8, 3.0]])
def test_fewer_magnitudes_are_a_part_of_the_grid(magnitudes: list[float]) -> None:
    """Each where the whole grid has it, in whatever order they are given."""
    found = set(cases(["ddp", "fsdp", "pipeline"], [4, 8], EVERY, magnitudes, HELD_OUT_SEEDS))
    assert found == {case for case in WHOLE if case.kind not in SLOW or case.magnitude in magnitudes}


def test_a_trial_is_watched_for_as_long_as_it_needs() -> None:
    def watched_s(kind: str, usual_s: float) -> float:
        return watch_s(Case("ddp", 4, kind, 3.0, 0), usual_s)

    assert watched_s("kill", 0.01) == watched_s("kill", 10.0), "the end of a process is seen at once"
    assert watched_s("slow", 1.0) == watched_s("all_slow", 1.0) * 40 / 24
    assert watched_s("all_slow", 1.0) == 3 * watched_s("clean", 1.0)
    assert watched_s("slow", 1e-3) == watched_s("stuck_link", 1e-3) == watched_s("stuck_link", 10.0)
    assert watched_s("checkpoint_stall", 0.01) > watched_s("hang", 0.01)


def test_a_job_that_made_no_whole_step_has_grown_by_nothing() -> None:
    """An alarm may come in the first step, before it is over."""
    made = JobView(Scene(work_ms=lambda r, s: 30.0 if s == 3 else 10.0).run(8))
    assert _longest_grown(JobView({}), 0.0) == _longest_grown(JobView({}), 0.02) == 0.0
    assert _longest_grown(made, 0.0) == 0.0
    assert _longest_grown(made, 0.02) == pytest.approx(2 * _longest_grown(made, 0.04))
    assert _longest_grown(made, 0.02) > 1.4


def test_precision_recall_and_culprits_are_of_what_was_said() -> None:
    right = _verdict("ddp/4/hang/2/17", "hang", rivals={"Ray alone": ("none", "")})
    verdicts = [
        *[right] * 6,
        *[replace(right, named="rank 2")] * 2,
        replace(right, said="none"),
        replace(right, said="crash"),
        *[replace(right, truth="none", said="none")] * 9,
        replace(right, truth="none", said="hang", said_kind="hang"),
        replace(right, truth="none", said="slow", said_kind="communication_slow", named="link 1->0"),
        replace(right, truth="none", said="slow", said_kind="communication_slow", named="rank 1"),
        replace(right, truth="slow", said="none", grown=1.2),
        *[replace(right, truth="slow", said="slow", grown=1.7)] * 40,
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
    assert gates["alarms in clean and benign runs"] == (3, False)
    assert gates["actions in clean and benign runs"] == (2, False)  # a slow link is only told
    assert gates["hang: found within threshold + 1 s"] == (1.0, True)
    assert gates["crash: recall"] == (1.0, True)  # of tuned seeds, where there is nothing else
    assert report.median("benign, held out", "trials") == 12
    assert report.median("hang, tuned", "recall") == 0
    assert "hang, held out  10      0.889      0.8     0.75" in summary(report)
    assert "| hang, held out | 10 | 0.889 | 0.8 | 0.75 | 1.10, 1.10 |" in markdown(report)
    assert "| benign, held out | 12 | 3 | 2 | 0.527 |" in markdown(report)
    assert "| hang: precision | 0.889 | 0.99 | missed |" in markdown(report)


def test_lines_of_other_rules_count_for_nothing(tmp_path: Path) -> None:
    """Without time for new trials the lines alone are told: of all jobs, and of this code only."""
    runs, told, shown = tmp_path / "runs.jsonl", tmp_path / "told.json", tmp_path / "table.md"
    own = _verdict("fsdp/8/kill/2/17", "crash", version=code_version(), machine="2 CPUs")
    other = _verdict("ddp/4/kill/2/17", "crash", said="none", version="of yesterday")
    oldest = {key: value for key, value in _verdict("ddp/4/exit/2/17", "crash").line().items() if key != "version"}
    runs.write_text("".join(json.dumps(line) + "\n" for line in (own.line(), other.line(), oldest)))
    assert read(runs) == ({own.name: own}, 2)
    words = ["--jobs=ddp", "--budget-s=-1", f"--runs={runs}", f"--json={told}", f"--markdown={shown}"]
    assert main(words) == 0
    document = json.loads(told.read_text())
    assert document["parameters"]["trials"] == 1
    assert document["parameters"]["trials by layout"] == {"fsdp/8": 1}
    assert document["parameters"]["trials by machine"] == {"2 CPUs": 1}
    assert document["parameters"]["version"] == code_version()
    assert "1 of 1400 trials" in shown.read_text()
    assert main([*words, "--seeds=16"]) == 0
    assert json.loads(told.read_text())["parameters"]["trials"] == 0, "it is of another seed"
    assert len(runs.read_text().splitlines()) == 3  # nothing is thrown away, and nothing made


def test_a_version_is_of_what_code_does(tmp_path: Path) -> None:
    source = 'def f(x):\n    """Doc."""\n    return x + 1  # why\n'
    others = {
        "told": 'def f(x):\n    """Other."""\n    # because\n    return (x\n        + 1)\n',
        "done": source.replace("1", "2"),
    }
    digests = {}
    for name, text in {"plain": source, **others}.items():
        path = tmp_path / f"{name}.py"
        path.write_text(text, encoding="utf-8")
        digests[name] = code_digest([path])
    assert digests["told"] == digests["plain"] != digests["done"]
    assert code_digest([tmp_path / "plain.py"], "more") != digests["plain"]
    assert digests["plain"] == "1342f49f8dd0d3f7", "whatever Python reads it"
    assert len(code_version()) == 16


def _verdict(name: str, truth: str, **more: Any) -> Verdict:
    values: dict[str, Any] = {
        "name": name,
        "truth": truth,
        "kind": name.split("/")[2],
        "magnitude": 2.0,
        "said": truth,
        "said_kind": truth,
        "named": "rank 1",
        "culprit": "rank 1",
        "after_s": 1.1,
        "grown": 1.0,
        "suspicions": 0,
        "rivals": {},
        "summary": "",
    }
    return Verdict(**(values | more))


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


def test_a_probe_is_waited_for_while_the_job_gets_on() -> None:
    """Steps and payloads take long over a slow link, each less than the patience; a job that stands has none."""
    with running("ddp", 2) as job:
        healthy = job.links(20.0)
        assert strike(
            job, Fault(kind="slow_link", rank=0, to_rank=1, step=0, rate_bytes_per_s=3_000_000), watch_s=0.1
        ).struck_s
        begun_s = time.monotonic()
        slow = job.links(1.0)
        assert time.monotonic() > begun_s + 1.0
        assert healthy is not None
        assert slow is not None
        (found,) = explain(slow, replace(DETECTOR, link_floor_s=0.03), usual=healthy)  # above noise
        assert [str(suspect) for suspect in found.suspects] == ["link 0->1"]
        assert strike(job, Fault(kind="freeze", rank=1, step=0), watch_s=0.1).struck_s
        assert job.links(0.5) is None


def test_what_is_seen_while_a_probe_is_waited_for_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A suspicion of slow communication comes first; the probe that it asks for waits for a rank that is frozen."""
    with running("ddp", 2) as job:
        suspicion = Finding(kind=FindingKind.COMMUNICATION_SLOW, suspects=(), summary="steps grew", evidence={})

        def locate(finding: Finding) -> Finding:
            until_s = time.monotonic() + 2.5
            while time.monotonic() < until_s:
                time.sleep(0.05)
                job.look()
            return finding

        def suspect() -> list[Sighting]:
            new = look()
            job.findings = (suspicion, *job.findings)
            return new

        look = job.look
        monkeypatch.setattr(job, "locate", locate)
        monkeypatch.setattr(job, "look", suspect)
        outcome = strike(job, Fault(kind="freeze", rank=1, step=0), watch_s=2.0)
    assert outcome.struck_s
    assert [one.finding.kind for one in outcome.alarms][:1] == [FindingKind.FREEZE]
    assert outcome.alarms[0].at_s < outcome.struck_s + 2.0


def test_parts_that_are_made_at_a_time_meet_in_one_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = tmp_path / "runs.jsonl"
    words = ["--jobs=ddp,pipeline", "--ranks=4", "--kinds=kill", "--seeds=8", f"--runs={runs}"]
    assert main([*words, "--workers=2"]) == 0
    made, others = read(runs)
    assert (sorted(made), others) == (["ddp/4/kill/2/8", "pipeline/4/kill/2/8"], 0)
    told = capsys.readouterr().out
    assert "1/2 ok   " in told
    assert "2/2 ok   " in told
    assert told.count("FOUND AFTER") == 1, "the figures are told once"
    assert main([*words, "--workers=2", "--budget-s=0"]) == 0
    assert len(runs.read_text().splitlines()) == 2, "nothing is made twice"
    with pytest.raises(SystemExit):
        main(["--workers=2"])
    assert "give one" in capsys.readouterr().err


def test_a_part_that_fails_is_told_and_ends_no_other(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    case = Case("ddp", 4, "kill", 2.0, 8)
    with pytest.raises(RuntimeError, match=r"--part.*exit code 2"):
        in_parts([case, replace(case, job="fsdp")], 1, 60.0, ["--no-such-option"])
    assert capfd.readouterr().err.count("unrecognized arguments: --no-such-option") == 2


@pytest.mark.alone
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="the other rank needs a CPU of its own")
@pytest.mark.parametrize("name", ["ddp", "pipeline"])
def test_a_rank_that_finds_no_cpu_is_named(name: str) -> None:
    """Its peer sees slow communication, and its own work hardly grows."""
    with running(name, 2) as job:
        assert settle(job)
        outcome = strike(job, Fault(kind="shared_cpu", rank=1, step=0, factor=8.0), watch_s=20.0)
        job.order(Withdraw())
        job.links(20.0)  # which all ranks answer once they have taken the order
    first = outcome.alarms[0].finding
    assert (first.kind, first.culprits) == (FindingKind.STRAGGLER, (1,)), first
