"""What chance or uneven work makes late is no straggler, whoever it hits; and what is slow from the start is found."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from faulttol.config import DetectorConfig, HealthConfig
from faulttol.detector import Memory, observe
from faulttol.finding import Finding, FindingKind
from faulttol.rules.chance import all_of, at_least
from faulttol.rules.pace import Pace
from faulttol.rules.speed import slow
from faulttol.rules.window import Window, usual
from faulttol.view import JobView
from tests.test_faulttol.scenes import Scene

CONFIG, HEALTH = DetectorConfig(), HealthConfig()
STEPS = 48
WORK_S, TRANSFER_S = 0.020, 0.015
Load = Callable[[int, int], float]
"""Of a rank in a step, in multiples of its usual work."""


def test_chances_are_exact() -> None:
    assert at_least(0, 5, 0.3) == pytest.approx(1.0)
    assert at_least(16, 16, 0.25) == pytest.approx(0.25**16)
    assert at_least(2, 3, 0.5) == pytest.approx(0.5)
    assert all_of(2, 2, 4) == pytest.approx(1 / 6)
    assert all_of(2, 3, 4) == pytest.approx(1 / 2)
    assert all_of(3, 2, 4) == 0


def judged(
    load: Load, seed: int, *, num_ranks: int = 4, num_roles: int = 1, tokens: Load = lambda r, s: 1.0
) -> list[Finding]:
    """What is said of a job on a loaded machine: its ranks' names in any order, one step of seven held up for long."""
    chance = random.Random(seed)
    names = list(range(num_ranks))
    chance.shuffle(names)

    def work(rank: int, many: float) -> float:
        held_up = 0.5 * min(20.0, chance.paretovariate(1.3)) if chance.random() < 0.15 else 0.0
        return WORK_S * (many + 0.1 * chance.random() + held_up)

    def window(load: Load) -> Window:
        work_s = {r: [work(r, load(names[r], s)) for s in range(STEPS)] for r in range(num_ranks)}
        spans = [max(row) + TRANSFER_S for row in zip(*work_s.values(), strict=True)]
        paces = {
            r: {
                s: Pace(
                    step=s,
                    span_s=spans[s],
                    local_s=work_s[r][s],
                    tokens=round(1000 * tokens(names[r], s)),
                    phases=frozenset(),
                    role=r % num_roles,
                )
                for s in range(STEPS)
            }
            for r in range(num_ranks)
        }
        return Window(tuple(range(STEPS)), paces, {})

    before = usual([window(lambda r, s: 1.0).baseline()])
    findings = slow(window(load), before, CONFIG)
    return [
        finding
        if finding.kind is not FindingKind.STRAGGLER
        else Finding(
            kind=finding.kind, suspects=finding.suspects, summary=str([names[rank] for rank in finding.culprits])
        )
        for finding in findings
        if finding.kind.is_fault
    ]


def in_turn(rank: int, step: int) -> float:
    return 1.0 + 1.7 * ((rank + step) % 2)


def at_random(rank: int, step: int) -> float:
    return 1.0 + 1.7 * random.Random(97 * rank + step).randrange(2)


@pytest.mark.parametrize("layout", [(2, 1), (2, 2), (4, 1), (4, 2), (8, 1)], ids=str)
@pytest.mark.parametrize(
    ("load", "tokens"),
    [
        (lambda r, s: 1.0, lambda r, s: 1.0),
        (lambda r, s: 3.0, lambda r, s: 1.0),
        (in_turn, lambda r, s: 1.0),
        (at_random, lambda r, s: 1.0),
        (lambda r, s: 3.0 if r == 0 else 1.0, lambda r, s: 2.0 if r == 0 else 1.0),
    ],
    ids=["even", "all slower", "late in turn", "late at random", "more tokens"],
)
def test_load_and_uneven_work_make_no_straggler(load: Load, tokens: Load, layout: tuple[int, int]) -> None:
    num_ranks, num_roles = layout
    for seed in range(12):
        assert not judged(load, seed, num_ranks=num_ranks, num_roles=num_roles, tokens=tokens)


@pytest.mark.parametrize("layout", [(2, 2), (4, 1), (4, 2), (8, 1)], ids=str)
@pytest.mark.parametrize(("load", "least"), [(lambda r, s: 1.0, 4.0), (in_turn, 6.0)], ids=["even", "late in turn"])
def test_a_slow_rank_is_told_beside_load_and_uneven_work(load: Load, least: float, layout: tuple[int, int]) -> None:
    num_ranks, num_roles = layout
    found = [
        judged(lambda r, s: load(r, s) + (least - 1 if r == 1 else 0), seed, num_ranks=num_ranks, num_roles=num_roles)
        for seed in range(8)
    ]
    assert sum([finding.summary for finding in findings] == ["[1]"] for findings in found) >= 7


def first_told(scene: Scene, num_steps: int = 100) -> tuple[int, Finding] | None:
    """After how many steps a detector that is there from the beginning tells of a fault."""
    memory, config = Memory(), DetectorConfig(window_least_s=0.15)  # steps of 12 ms
    for steps in range(8, num_steps, 4):
        memory, findings = observe(memory, JobView(scene.run(steps)), config, HEALTH)
        for finding in findings:
            if finding.kind.is_fault:
                return steps, finding
    return None


@pytest.mark.parametrize("begin", [0, 8, 12, 16, 20])
def test_a_rank_that_is_slow_from_the_first_window_on_is_found(begin: int) -> None:
    told = first_told(Scene(work_ms=lambda r, s: 30.0 if r == 2 and s >= begin else 10.0))
    assert told is not None
    steps, finding = told
    assert steps <= max(begin, 5) + 28
    assert (finding.kind, finding.culprits) == (FindingKind.STRAGGLER, (2,))
    assert finding.slowdown == pytest.approx(3.0)  # what it costs is not measured by its own slow past


@pytest.mark.parametrize("begin", [14, 18, 22])
def test_a_transfer_that_becomes_slow_within_the_first_window_is_found(begin: int) -> None:
    told = first_told(Scene(transfer_ms=lambda s: 12.0 if s >= begin else 2.0))
    assert told is not None
    assert told[1].kind is FindingKind.COMMUNICATION_SLOW


def test_the_quicker_windows_are_what_is_usual() -> None:
    """A job that was slow at first, as while files are read the first time, is not measured by that for long."""
    slow_one, quick_one = (
        Window(
            tuple(range(16)),
            {r: {s: Pace(s, work_s + 0.002, work_s, None, frozenset(), 0) for s in range(16)} for r in range(2)},
            {},
        ).baseline()
        for work_s in (0.030, 0.010)
    )
    learnt = usual([slow_one, quick_one])
    assert learnt is not None
    assert learnt.local_s == {0: 0.010, 1: 0.010}
    assert learnt.span_s == pytest.approx(0.012)
    assert usual([]) is None
