"""What to do about lost and slow ranks, decided on values alone."""

from __future__ import annotations

import pytest

from faulttol.config import PolicyConfig
from faulttol.policy import (
    Decision,
    Incident,
    Loss,
    LossKind,
    Resume,
    Shrink,
    Situation,
    Slowness,
    Stop,
    Wait,
    decide,
    weigh,
)

CONFIG = PolicyConfig()


def incident(
    *, at_s: float = 100.0, step: int = 50, kind: LossKind | None = "dead", rank: int = 1, error: str = "OSError"
) -> Incident:
    return Incident(at_s, step, () if kind is None else (Loss(rank, kind, "detail", error),))


def situation(*, left: int = 3, ready: int = 0, starting: int = 0, now_s: float = 100.0) -> Situation:
    return Situation(
        now_s=now_s,
        full_size=4,
        ranks_left=left,
        spares_ready=ready,
        spares_starting=starting,
        smaller_sizes=(2, 1),
    )


def decided(now: Incident, *before: Incident, config: PolicyConfig = CONFIG, **there: float) -> Decision:
    return decide(now, before, situation(**there), config)  # type: ignore[arg-type]


def test_a_warm_spare_takes_the_place_of_a_lost_rank_at_once() -> None:
    assert decided(incident(), ready=1) == Resume(4, 1, 0.0)


def test_ranks_that_only_lost_one_another_go_on_as_they_were() -> None:
    assert decided(incident(kind=None), left=4, ready=2) == Resume(4, 0, 0.0)


def test_a_spare_that_is_about_to_be_ready_is_waited_for_but_not_for_ever() -> None:
    assert isinstance(decided(incident(), starting=1, now_s=105.0), Wait)
    assert decided(incident(), starting=1, now_s=100.0 + CONFIG.spare_wait_s) == Shrink(2, 0.0)


def test_without_spares_the_run_shrinks_to_the_largest_layout_that_fits() -> None:
    assert decided(incident()) == Shrink(2, 0.0)
    assert decided(incident(), left=1) == Shrink(1, 0.0)


def test_a_run_that_may_not_shrink_or_cannot_waits() -> None:
    assert isinstance(decided(incident(), config=PolicyConfig(shrink=False)), Wait)
    assert isinstance(decided(incident(), left=0), Wait)


def test_an_error_before_the_first_step_is_the_programs() -> None:
    stop = decided(incident(kind="raised", step=0), ready=1)
    assert isinstance(stop, Stop)
    assert stop.cause == "user error"
    later = decided(incident(kind="raised", step=0, at_s=200.0), incident(step=30), ready=1)
    assert isinstance(later, Resume), "an earlier generation trained: it can"


def test_the_same_error_in_the_same_step_is_the_programs_the_second_time() -> None:
    first = incident(kind="raised", at_s=10.0)
    assert isinstance(decided(first, ready=1), Resume)
    stop = decided(incident(kind="raised"), first, ready=1)
    assert isinstance(stop, Stop)
    assert stop.cause == "user error"
    assert "OSError in step 50, 2 times" in stop.summary
    assert isinstance(decided(incident(kind="raised", step=51), first, ready=1), Resume)
    assert isinstance(decided(incident(kind="raised", error="KeyError"), first, ready=1), Resume)
    assert isinstance(decided(incident(kind="dead"), first, ready=1), Resume), "a machine may fail twice in a step"


def test_ranks_that_called_different_collectives_are_not_restarted() -> None:
    stop = decided(incident(kind="desync"), ready=1)
    assert isinstance(stop, Stop)
    assert stop.cause == "user error"


def test_the_budget_counts_the_last_hour() -> None:
    before = [incident(at_s=100.0 * index, step=index) for index in range(6)]
    stop = decided(incident(at_s=700.0, step=9), *before, ready=1)
    assert isinstance(stop, Stop)
    assert stop.cause == "budget"
    assert isinstance(decided(incident(at_s=3700.0, step=9), *before, ready=1, now_s=3700.0), Resume)


def test_recoveries_that_get_no_further_pause_ever_longer_and_then_end() -> None:
    config = PolicyConfig(restarts_per_hour=100, backoff_s=2.0, backoff_limit_s=5.0, no_progress_limit=4)
    before = [incident(at_s=float(index)) for index in range(4)]
    pauses = [decided(incident(), *before[:count], ready=1, config=config) for count in range(5)]
    assert pauses[:4] == [Resume(4, 1, pause_s) for pause_s in (0.0, 2.0, 4.0, 5.0)]
    assert isinstance(pauses[4], Stop)
    assert pauses[4].cause == "no progress"


def test_a_step_further_makes_the_next_recovery_the_first_again() -> None:
    before = [incident(at_s=1.0), incident(at_s=2.0)]
    assert decided(incident(step=51), *before, ready=1) == Resume(4, 1, 0.0)


@pytest.mark.parametrize(
    ("since_s", "unsaved_s", "remaining_s", "remedy"),
    [
        (10.0, 100.0, 1e6, "log"),  # has cost 5 s, a recovery costs 10 s
        (21.0, 100.0, 1e6, "isolate at checkpoint"),
        (219.0, 100.0, 1e6, "isolate at checkpoint"),
        (221.0, 100.0, 1e6, "restart now"),  # has cost as much as a recovery and the unsaved steps
        (21.0, 0.0, 1e6, "restart now"),
        (1e6, 0.0, 9.0, "log"),  # the run is nearly over
        (1e6, 100.0, 50.0, "isolate at checkpoint"),
    ],
)
def test_a_rank_that_is_half_as_fast_is_borne_until_it_has_cost_its_removal(
    since_s: float, unsaved_s: float, remaining_s: float, remedy: str
) -> None:
    slowness = Slowness(slowdown=2.0, since_s=since_s, unsaved_s=unsaved_s, remaining_s=remaining_s)
    assert weigh(slowness, CONFIG) == remedy
