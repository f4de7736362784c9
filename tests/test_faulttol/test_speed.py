"""A slow rank, a slow transfer and uneven work are told apart by what each rank does with its time."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from faulttol.config import DetectorConfig, HealthConfig
from faulttol.detector import Memory, observe
from faulttol.events import RankRecord
from faulttol.finding import Finding, FindingKind
from faulttol.rules.pace import paces, period
from faulttol.rules.speed import slow
from faulttol.rules.window import Baseline, Window, usual, window
from faulttol.view import CpuWaits, JobView
from tests.test_faulttol.scenes import Scene, proven

CONFIG, HEALTH = DetectorConfig(window_least_s=0.15), HealthConfig()
"""Most scenes have steps of 12 ms."""
LASTING = DetectorConfig()
HEALTHY, TOTAL = 80, 120


def judge(scene: Scene, *, learnt: bool = True) -> list[Finding]:
    """What the last window of a job says; the first steps were healthy, if it learnt from them."""
    records = scene.run(TOTAL)
    found = window(JobView(records), 0, CONFIG, HEALTH)
    before = window(JobView(scene.run(HEALTHY)), 0, CONFIG, HEALTH)
    assert found is not None
    assert before is not None
    return proven(slow(found, before.baseline() if learnt else None, CONFIG))


def faulty(step: int) -> bool:
    return step >= HEALTHY


def noise(rank: int, step: int, share: float = 0.1) -> float:
    return 1 + share * random.Random(1000 * rank + step).random()


def test_time_divides_into_work_and_collectives() -> None:
    record = Scene(work_ms=lambda rank, step: 10.0 + 5 * (rank == 1)).run(5)
    assert paces(record[1])[2].local_s == pytest.approx(0.015)
    assert paces(record[0])[2].local_s == pytest.approx(0.010)
    assert paces(record[0])[2].span_s == pytest.approx(0.017)
    assert paces(record[0])[2].communication_s == pytest.approx(0.007)


def test_steps_are_found_without_marks_by_the_period() -> None:
    record = replace(Scene().run(12)[0], marks=())
    found = paces(replace(record, events=tuple(replace(e, bytes=64 << (e.seq % 2)) for e in record.events)))
    assert len(found) >= 10
    assert {round(pace.span_s, 6) for pace in found.values()} == {0.012}
    assert period("abcabcabcabc") == 3
    assert period("aaaa") == 1
    assert period("abcdefgh") == 0


@pytest.mark.parametrize("learnt", [True, False])
@pytest.mark.parametrize("factor", [1.5, 2.0, 4.0])
def test_a_rank_that_works_longer_is_a_straggler(factor: float, learnt: bool) -> None:
    scene = Scene(work_ms=lambda r, s: 10 * noise(r, s) * (factor if r == 2 and faulty(s) else 1))
    (finding,) = judge(scene, learnt=learnt)
    assert (finding.kind, finding.culprits) == (FindingKind.STRAGGLER, (2,))
    assert finding.slowdown == pytest.approx(factor, rel=0.15)


@pytest.mark.parametrize("learnt", [True, False])
def test_a_rank_that_lost_its_lead_where_all_became_slower_is_no_straggler(learnt: bool) -> None:
    """A false alarm of the benchmark: rank 3 had been faster than the others and worked 1 % longer than they then."""

    def work_ms(rank: int, step: int) -> float:
        return (21.2 if rank == 3 else 21.0) if faulty(step) else (7.5 if rank == 3 else 10.5)

    found = judge(Scene(work_ms=lambda r, s: work_ms(r, s) * noise(r, s, 0.02)), learnt=learnt)
    assert not [finding for finding in found if finding.kind.is_fault]


def test_both_ranks_of_a_slow_machine_are_named() -> None:
    scene = Scene(num_ranks=8, work_ms=lambda r, s: 10 * noise(r, s) * (2 if r in (4, 5) and faulty(s) else 1))
    (finding,) = judge(scene)
    assert set(finding.culprits) == {4, 5}


def test_of_two_ranks_the_one_that_changed_is_named() -> None:
    scene = Scene(num_ranks=2, work_ms=lambda r, s: (10 + 5 * r) * noise(r, s) * (2 if r == 0 and faulty(s) else 1))
    (finding,) = judge(scene)
    assert finding.culprits == (0,)


def test_a_transfer_that_takes_longer_is_no_straggler() -> None:
    (finding,) = judge(Scene(transfer_ms=lambda step: 12.0 if faulty(step) else 2.0))
    assert finding.kind is FindingKind.COMMUNICATION_SLOW
    assert finding.slowdown == pytest.approx(22 / 12)
    assert finding.evidence["operation"] == "all_reduce"


@pytest.mark.parametrize(
    "scene",
    [
        Scene(work_ms=lambda r, s: 10 * noise(r, s)),
        Scene(work_ms=lambda r, s: 20.0 if faulty(s) else 10.0),
        Scene(work_ms=lambda r, s: 200.0 if (r, s) == (1, 110) else 10.0),
        Scene(work_ms=lambda r, s: 200.0 if r == 1 and s % 20 == 0 else 10.0),
        Scene(work_ms=lambda r, s: 10.0 + r),
        Scene(
            work_ms=lambda r, s: 500.0 if r == 0 and s % 4 == 0 else 10.0,
            phase=lambda r, s: "checkpoint" if r == 0 and s % 4 == 0 else "train",
        ),
    ],
    ids=["noise", "all slower", "one pause", "pauses", "unequal by a tenth", "checkpoints of one rank"],
)
def test_benign_differences_are_no_findings(scene: Scene) -> None:
    assert not judge(scene)


def test_ranks_that_are_late_in_turn_are_uneven_work_and_no_fault() -> None:
    (finding,) = judge(Scene(work_ms=lambda r, s: 10.0 + (15 if (r + s) % 2 and faulty(s) else 0)))
    assert finding.kind is FindingKind.DATA_IMBALANCE
    assert not finding.kind.is_fault


def test_tokens_explain_a_rank_that_is_always_late() -> None:
    tokens = {0: 1000, 1: 1000, 2: 2000, 3: 1000}
    scene = Scene(
        work_ms=lambda r, s: 0.01 * (tokens[r] if faulty(s) else 1000) * noise(r, s),
        tokens=lambda r, s: tokens[r] if faulty(s) else 1000,
    )
    (finding,) = judge(scene)
    assert (finding.kind, finding.culprits) == (FindingKind.DATA_IMBALANCE, (2,))


def test_tokens_do_not_excuse_a_rank_that_is_slow_besides() -> None:
    def tokens(rank: int, step: int) -> int:
        return 900 + 200 * random.Random(7 * rank + 31 * step).randrange(2)

    scene = Scene(
        work_ms=lambda r, s: 0.01 * tokens(r, s) * (2 if r == 1 and faulty(s) else 1),
        tokens=tokens,
    )
    (finding,) = judge(scene)
    assert (finding.kind, finding.culprits) == (FindingKind.STRAGGLER, (1,))


def test_nothing_is_judged_before_the_window_is_full() -> None:
    assert window(JobView(Scene().run(CONFIG.window_steps + CONFIG.warmup_steps - 1)), 0, CONFIG, HEALTH) is None


def test_a_detector_learns_what_is_usual_and_tells_when_it_changes() -> None:
    """Views every 4 steps: the baseline comes from healthy ones, and stays while a rank is slow."""
    scene = Scene(work_ms=lambda r, s: 30.0 if r == 3 and faulty(s) else 10.0)
    memory, seen = Memory(), list[tuple[int, Finding]]()
    for steps in range(20, 140, 4):
        memory, findings = observe(memory, JobView(scene.run(steps)), CONFIG, HEALTH)
        seen += [(steps, finding) for finding in findings]
    first, finding = seen[0]
    assert HEALTHY + 12 <= first <= HEALTHY + 20
    assert {finding.kind for _, finding in seen} == {FindingKind.STRAGGLER}
    assert finding.culprits == (3,)
    assert memory.baseline is not None
    assert memory.baseline.local_s[3] == pytest.approx(0.010)


def test_a_finding_needs_a_second_window_that_agrees() -> None:
    scene = Scene(work_ms=lambda r, s: 30.0 if r == 3 and faulty(s) else 10.0)
    memory, view = Memory(), JobView(scene.run(HEALTHY + 16))
    memory, _ = observe(memory, JobView(scene.run(HEALTHY)), CONFIG, HEALTH)
    for _ in range(3):
        memory, findings = observe(memory, view, CONFIG, HEALTH)
        assert not findings  # the same window again is no confirmation
    _, findings = observe(memory, JobView(scene.run(HEALTHY + 17)), CONFIG, HEALTH)
    assert [finding.culprits for finding in findings] == [(3,)]


def told(num_steps: int, scene: Scene) -> list[Finding]:
    """What is said so many steps after the healthy ones."""
    before = window(JobView(scene.run(HEALTHY)), 0, LASTING, HEALTH)
    found = window(JobView(scene.run(HEALTHY + num_steps)), 0, LASTING, HEALTH)
    assert before is not None
    assert found is not None
    return slow(found, before.baseline(), LASTING)


def test_what_is_much_slower_is_told_from_fewer_steps() -> None:
    scene = Scene(work_ms=lambda r, s: (400.0 if r == 1 and faulty(s) else 100.0) * noise(r, s))
    assert not told(LASTING.fast_steps - 1, scene)
    assert [finding.culprits for finding in told(LASTING.fast_steps, scene)] == [(1,)]
    mild = Scene(work_ms=lambda r, s: (150.0 if r == 1 and faulty(s) else 100.0) * noise(r, s))
    assert not told(LASTING.fast_steps, mild)
    link = Scene(work_ms=lambda r, s: 100.0, transfer_ms=lambda s: 400.0 if faulty(s) else 20.0)
    assert [finding.kind for finding in told(LASTING.fast_steps, link)] == [FindingKind.COMMUNICATION_SLOW]


def test_a_third_of_a_second_without_a_processor_is_no_straggler() -> None:
    """A false alarm of the benchmark, by its figures: ranks late in turn, one of them held up by others' load.

    It worked for 55 ms a step then, the others for 24 ms, 12 or 36 ms in turn.
    """

    def work_ms(held_up: int, rank: int, step: int) -> float:
        own = 12.0 + 24.0 * (faulty(step) and (step + rank) % 2)
        return own + 31.0 * (rank == 3 and HEALTHY + 3 <= step < HEALTHY + 3 + held_up)

    moment = Scene(work_ms=lambda r, s: work_ms(7, r, s))
    assert not [finding for num in range(1, 40) for finding in told(num, moment) if finding.kind.is_fault]
    lasting = Scene(work_ms=lambda r, s: work_ms(100, r, s))
    assert [finding.culprits for finding in told(25, lasting)] == [(3,)]


def test_what_holds_up_all_ranks_in_some_steps_hides_no_tokens() -> None:
    """A false alarm of the benchmark: rank 3 had twice the tokens from the fourth step on, while others' load came."""
    rows = (
        (66, 90, 43, 11, 87, 14, 23, 10, 15, 17, 19, 13, 32, 18, 37, 19),
        (202, 259, 53, 14, 80, 14, 19, 17, 22, 26, 20, 15, 37, 16, 34, 17),
        (57, 95, 23, 32, 68, 17, 18, 19, 19, 18, 17, 15, 16, 12, 15, 16),
        (73, 346, 52, 64, 84, 80, 56, 56, 55, 50, 44, 53, 59, 53, 50, 51),
    )
    scene = Scene(
        work_ms=lambda r, s: float(rows[r][s - HEALTHY]) if faulty(s) else 18.0,
        tokens=lambda r, s: 8192 if r == 3 and s >= HEALTHY + 3 else 4096,
    )
    (finding,) = told(16, scene)
    assert (finding.kind, finding.culprits[0]) == (FindingKind.DATA_IMBALANCE, 3)


def starving(
    waits: dict[int, float], *, before: dict[int, float] | None = None, num_steps: int = 24, factor: float = 1.0
) -> list[Finding]:
    """What is said of steps of 14 ms that became 34 while ranks wait for a CPU for so many milliseconds a step.

    With `factor` all of it takes so many times as long.
    """
    scene = Scene(work_ms=lambda r, s: 10.0 * factor, transfer_ms=lambda s: factor * (24.0 if faulty(s) else 4.0))
    usual_ms = before or dict.fromkeys(range(4), 1.0)

    def seen(total: int) -> Window:
        records = scene.run(total)
        moments = moments_of(
            {rank: records[rank] for rank in waits},
            lambda r, s: factor * (waits if faulty(s) else usual_ms)[r] / 1e3,
        )
        found = window(JobView(records, cpu_waits=moments), 0, CONFIG, HEALTH)
        assert found is not None
        return found

    return proven(slow(seen(HEALTHY + num_steps), seen(HEALTHY).baseline(), CONFIG))


def test_who_waits_for_a_cpu_while_the_steps_grow_is_the_straggler() -> None:
    """Its peers see slow transfers."""
    (finding,) = starving({0: 1.0, 1: 20.0, 2: 2.0, 3: 1.0})
    assert (finding.kind, finding.culprits) == (FindingKind.STRAGGLER, (1,))
    assert finding.evidence["wait for a CPU, s"] == pytest.approx(0.020)
    assert finding.evidence["usual wait for a CPU, s"] == pytest.approx(0.001)
    assert "rank 1 waits 20.0 ms a step for a CPU, others 1.0 ms" in finding.summary
    usually_waits = {0: 1.0, 1: 7.0, 2: 1.0, 3: 1.0}
    assert starving({0: 1.0, 1: 27.0, 2: 1.0, 3: 1.0}, before=usually_waits)[0].culprits == (1,)


@pytest.mark.parametrize(
    ("waits", "before"),
    [
        ({0: 1.0, 1: 10.0, 2: 2.0, 3: 1.0}, None),
        ({0: 50.0, 1: 70.0, 2: 50.0, 3: 50.0}, None),
        (dict.fromkeys(range(4), 20.0), None),
        ({0: 1.0, 1: 25.0, 2: 2.0, 3: 1.0}, {0: 1.0, 1: 20.0, 2: 1.0, 3: 1.0}),
        ({0: 1.0, 1: 19.0, 2: 1.0, 3: 1.0}, dict.fromkeys(range(4), 20.0)),
        ({0: 1.0, 1: 20.0, 2: 2.0}, None),
        ({}, None),
    ],
    ids=["little", "uneven waits", "all wait", "it always did", "all wait less", "one is not known", "nothing known"],
)
def test_steps_that_waiting_for_a_cpu_does_not_explain_are_slow_communication(
    waits: dict[int, float], before: dict[int, float] | None
) -> None:
    assert [finding.kind for finding in starving(waits, before=before)] == [FindingKind.COMMUNICATION_SLOW]


@pytest.mark.parametrize("num_steps", range(4, 20))
def test_waiting_for_a_cpu_is_held_against_the_steps_that_grew(num_steps: int) -> None:
    """A window that is slow in its last few steps only: a small difference in waiting explains nothing of them."""
    kinds = {one.kind for one in starving({0: 1.0, 1: 5.0, 2: 1.0, 3: 1.0}, num_steps=num_steps, factor=10.0)}
    assert FindingKind.STRAGGLER not in kinds
    assert num_steps < CONFIG.fast_steps or kinds == {FindingKind.COMMUNICATION_SLOW}


def test_what_was_waited_between_steps_that_were_left_out_does_not_count() -> None:
    """A rank waits for a CPU while it writes a checkpoint, and for 2 ms in each of the other steps."""
    records = Scene(phase=lambda r, s: "checkpoint" if 30 <= s < 60 else "train").run(70)
    moments = moments_of(records, lambda r, s: 0.5 if 30 <= s < 60 else 0.002)
    found = window(JobView(records, cpu_waits=moments), 0, CONFIG, HEALTH)
    assert found is not None
    assert found.steps[0] < 30
    assert found.cpu_wait_s() == pytest.approx(dict.fromkeys(range(4), 0.002))
    late = {rank: own[-2:] for rank, own in moments.items()}
    assert replace(found, cpu_waits=late).cpu_wait_s() == {}, "nobody looked when they began"


def moments_of(records: dict[int, RankRecord], waits_s: Callable[[int, int], float]) -> dict[int, CpuWaits]:
    """What was waited until each step of each rank, of so many seconds in a step."""
    found = {}
    for rank, record in records.items():
        waited_s, own = 0.0, list[tuple[int, float]]()
        for step, pace in paces(record).items():
            own.append((pace.begin_ns, waited_s))
            waited_s += waits_s(rank, step)
        found[rank] = (*own, (record.now_ns, waited_s))
    return found


def test_a_burst_of_waiting_in_one_step_makes_no_straggler() -> None:
    """A link is slow meanwhile; and the threads of a rank wait for no longer than its steps take."""
    scene = Scene(transfer_ms=lambda s: 24.0 if faulty(s) else 4.0)
    findings = []
    for burst_step in range(HEALTHY + 8, HEALTHY + 24):
        records = scene.run(HEALTHY + 24)
        waits = moments_of(records, lambda r, s, at=burst_step: 3.0 if (r, s) == (2, at) else 0.001)  # type: ignore[misc]
        found = window(JobView(records, cpu_waits=waits), 0, CONFIG, HEALTH)
        before = window(JobView(scene.run(HEALTHY), cpu_waits=waits), 0, CONFIG, HEALTH)
        assert found is not None
        assert before is not None
        assert found.last(16).cpu_wait_s()[2] == pytest.approx(found.last(16).span_s)
        findings += slow(found, before.baseline(), CONFIG)
    assert {finding.kind for finding in findings} == {FindingKind.COMMUNICATION_SLOW}


def test_waiting_that_begins_within_a_window_does_not_become_what_is_usual() -> None:
    records = Scene().run(TOTAL)
    waits = moments_of(records, lambda r, s: 0.01 if r == 1 and s >= TOTAL - 20 else 0.001)
    found = window(JobView(records, cpu_waits=waits), 0, CONFIG, HEALTH)
    assert found is not None
    assert found.last(40).baseline().cpu_wait_s == pytest.approx(dict.fromkeys(range(4), 0.001))


def test_what_is_usual_is_of_the_windows_in_which_it_was_known() -> None:
    known, unknown = (Baseline({0: 1.0}, 1.0, 1.0, {}, waits) for waits in ({0: 0.25}, {}))
    assert usual((known, unknown)) == known
    assert usual((unknown, unknown)) == unknown
