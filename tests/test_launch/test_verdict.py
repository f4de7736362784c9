"""Which rank is to blame, decided on values alone."""

from __future__ import annotations

from dataclasses import replace

import pytest

from launch.entry import Outcome, Raised, Returned
from launch.verdict import (
    Exit,
    Fault,
    Limits,
    Pulse,
    RankReport,
    RankStatus,
    blame,
    completed,
    describe,
    ended_badly,
    judge_silence,
    observe,
)

LIMITS = Limits(
    start_timeout_s=60.0,
    frozen_timeout_s=30.0,
    hang_timeout_s=600.0,
    exit_timeout_s=20.0,
    heartbeat_interval_s=0.5,
)
GLOO_LOSS = (
    "RuntimeError: [gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:33699. "
    "This is typically caused by a remote worker crashing."
)
GLOO_TIMEOUT = "RuntimeError: [gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 10000ms for recv operation"
NCCL_LOSS = "DistBackendError: NCCL error: remote process exited or there was a network error, NCCL version 2.27.3"
STORE_LOSS = "DistNetworkError: failed to recv, got 0 bytes"


def pulse(step: int = 0, phase: str = "forward", alive: int = 1, progress: int = 1) -> Pulse:
    return Pulse(alive_count=alive, progress_count=progress, step=step, phase=phase)


def running(rank: int, *, step: int = 5, alive_at_s: float = 0.0, progress_at_s: float = 0.0) -> RankStatus:
    return RankStatus(rank=rank, pulse=pulse(step, progress=step), alive_at_s=alive_at_s, progress_at_s=progress_at_s)


def raised(*messages: str, at_s: float = 0.0) -> Raised:
    return Raised(traceback="", messages=messages, at_s=at_s)


def failed(rank: int, *messages: str, seen_at_s: float = 1.0, at_s: float = 0.0) -> RankStatus:
    return replace(running(rank), outcome=raised(*messages, at_s=at_s), outcome_at_s=seen_at_s)


def dead(rank: int, seen_at_s: float = 1.0, **exit: int) -> RankStatus:
    return replace(running(rank), exit=Exit(**exit), exit_at_s=seen_at_s)


def returned(rank: int, exit_code: int | None = 0) -> RankStatus:
    ended = None if exit_code is None else Exit(code=exit_code)
    return replace(running(rank), outcome=Returned(None), exit=ended, outcome_at_s=1.0, exit_at_s=1.0)


# ---- what is seen


def test_a_sign_of_life_is_dated_by_the_observer_when_its_count_changes() -> None:
    status = observe(RankStatus(rank=0), RankReport(pulse(alive=1)), 5.0)
    status = observe(status, RankReport(pulse(alive=1)), 9.0)
    assert (status.alive_at_s, status.progress_at_s) == (5.0, 5.0)
    status = observe(status, RankReport(pulse(alive=2)), 12.0)
    assert (status.alive_at_s, status.progress_at_s) == (12.0, 5.0)


def test_progress_is_a_sign_of_life() -> None:
    status = observe(RankStatus(rank=0), RankReport(pulse(alive=1, progress=1)), 5.0)
    status = observe(status, RankReport(pulse(alive=1, progress=2)), 7.0)
    assert (status.alive_at_s, status.progress_at_s) == (7.0, 7.0)


def test_what_was_known_stays_known_when_it_is_no_longer_reported() -> None:
    status = observe(RankStatus(rank=0), RankReport(pulse(), Returned(1), Exit(code=0)), 3.0)
    assert observe(status, RankReport(), 4.0) == status


def test_a_first_end_is_not_overwritten_by_a_later_one() -> None:
    status = observe(RankStatus(rank=0), RankReport(exit=Exit(code=3)), 3.0)
    assert observe(status, RankReport(exit=Exit(code=0)), 4.0).exit == Exit(code=3)


# ---- has it ended, and how


@pytest.mark.parametrize(
    ("status", "bad"),
    [
        (running(0), False),
        (returned(0), False),
        (returned(0, exit_code=None), False),
        (returned(0, exit_code=1), True),
        (dead(0, code=0), True),
        (dead(0, signal=9), True),
        (failed(0, "ValueError: x"), True),
    ],
)
def test_a_rank_ended_badly_unless_it_returned_and_its_process_ended_well(status: RankStatus, bad: bool) -> None:
    assert ended_badly([returned(1), status]) is bad


def test_a_job_is_complete_only_when_every_process_has_ended() -> None:
    assert completed([returned(0), returned(1)])
    assert not completed([returned(0), returned(1, exit_code=None)])
    assert not completed([returned(0), running(1)])


# ---- silence


def test_nobody_is_at_fault_within_the_limits() -> None:
    statuses = [running(0, alive_at_s=71.0), RankStatus(rank=1)]
    assert judge_silence(statuses, LIMITS, 60.0) is None
    assert judge_silence([running(0, alive_at_s=70.0, progress_at_s=70.0)], LIMITS, 100.0) is None


def test_the_first_rank_that_is_missing_never_joined() -> None:
    statuses = [running(0, alive_at_s=60.0), RankStatus(rank=1), RankStatus(rank=2)]
    assert judge_silence(statuses, LIMITS, 60.1) == Fault(1, "never joined")


def test_a_rank_that_died_before_it_joined_is_not_awaited() -> None:
    statuses = [replace(RankStatus(rank=0), outcome=Returned(None), exit=Exit(code=0))]
    assert judge_silence(statuses, LIMITS, 1000.0) is None


def test_the_longest_silent_rank_is_frozen() -> None:
    statuses = [
        running(0, alive_at_s=90.0, progress_at_s=90.0),
        running(1, alive_at_s=60.0, progress_at_s=60.0),
        running(2, alive_at_s=55.0, progress_at_s=60.0),
    ]
    assert judge_silence(statuses, LIMITS, 100.0) == Fault(2, "frozen")


def test_a_rank_that_loads_for_long_before_it_joins_is_not_frozen() -> None:
    assert judge_silence([RankStatus(rank=0)], LIMITS, 59.0) is None


def test_the_rank_furthest_behind_is_the_one_that_hangs() -> None:
    statuses = [
        running(0, step=8, alive_at_s=1000.0, progress_at_s=395.0),
        running(1, step=7, alive_at_s=1000.0, progress_at_s=401.0),
        running(2, step=8, alive_at_s=1000.0, progress_at_s=395.0),
    ]
    assert judge_silence(statuses, LIMITS, 1000.0) == Fault(1, "hung")


def test_a_slow_rank_that_moves_is_not_blamed_for_one_that_stands() -> None:
    statuses = [
        running(0, step=8, alive_at_s=1000.0, progress_at_s=395.0),
        running(1, step=2, alive_at_s=1000.0, progress_at_s=999.0),
    ]
    assert judge_silence(statuses, LIMITS, 1000.0) == Fault(0, "hung")


def test_in_one_step_the_rank_with_fewer_beats_hangs() -> None:
    ahead = replace(running(0, alive_at_s=1000.0), pulse=pulse(5, "backward", progress=12))
    behind = replace(running(1, alive_at_s=1000.0), pulse=pulse(5, "forward", progress=11))
    assert judge_silence([ahead, behind], LIMITS, 1000.0) == Fault(1, "hung")


def test_ranks_that_stand_level_are_said_to_stand_level() -> None:
    statuses = [running(rank, alive_at_s=1000.0) for rank in range(3)]
    fault = judge_silence(statuses, LIMITS, 1000.0)
    assert fault == Fault(0, "hung")
    line = describe(statuses, 0, fault, LIMITS, 1000.0)
    assert line.endswith("no further behind than rank 1, 2: compare their stacks")


def test_a_process_that_stays_after_its_entry_returned_hangs() -> None:
    statuses = [returned(0), returned(1, exit_code=None)]
    assert judge_silence(statuses, LIMITS, 21.0) is None
    fault = judge_silence(statuses, LIMITS, 21.1)
    assert fault == Fault(1, "hung")
    assert "its entry returned, but its process has not ended" in describe(statuses, 1, fault, LIMITS, 21.1)


# ---- who caused it


@pytest.mark.parametrize("loss", [GLOO_LOSS, GLOO_TIMEOUT, NCCL_LOSS, STORE_LOSS])
def test_a_rank_with_an_error_of_its_own_comes_before_one_that_lost_a_peer(loss: str) -> None:
    statuses = [failed(0, loss, seen_at_s=1.0), failed(1, "ValueError: boom", seen_at_s=1.9)]
    assert blame(statuses, LIMITS, 2.0) == Fault(1, "raised")


def test_a_lost_peer_that_was_wrapped_is_still_a_lost_peer() -> None:
    wrapped = failed(0, "StepError: step 7 failed", GLOO_LOSS)
    assert blame([wrapped, dead(1, signal=9)], LIMITS, 2.0) == Fault(1, "died")


def test_seen_at_once_a_death_comes_before_an_error() -> None:
    statuses = [failed(0, "RuntimeError: something odd", seen_at_s=1.0), dead(1, seen_at_s=1.0, signal=11)]
    assert blame(statuses, LIMITS, 2.0) == Fault(1, "died")


def test_an_error_that_was_seen_first_comes_before_a_later_death() -> None:
    statuses = [failed(0, "ValueError: boom", seen_at_s=1.0), dead(1, seen_at_s=1.4, signal=6)]
    assert blame(statuses, LIMITS, 2.0) == Fault(0, "raised")


def test_errors_seen_at_once_are_ordered_by_when_they_were_raised() -> None:
    statuses = [failed(0, "ValueError: late", at_s=10.5), failed(1, "ValueError: early", at_s=10.1)]
    assert blame(statuses, LIMITS, 2.0) == Fault(1, "raised")


def test_when_all_lost_a_peer_the_silent_rank_is_the_peer() -> None:
    statuses = [failed(0, GLOO_TIMEOUT), running(1, alive_at_s=9.9), running(2, alive_at_s=3.0)]
    assert blame(statuses, LIMITS, 10.0) == Fault(2, "frozen")


def test_when_all_lost_a_peer_and_none_is_silent_the_rank_behind_is_the_peer() -> None:
    statuses = [failed(0, GLOO_TIMEOUT), running(1, step=4, alive_at_s=9.9), failed(2, GLOO_TIMEOUT)]
    assert blame(statuses, LIMITS, 10.0) == Fault(1, "hung")


def test_when_all_lost_a_peer_and_no_peer_is_found_the_first_who_said_so_is_named() -> None:
    statuses = [failed(0, GLOO_LOSS, seen_at_s=1.0, at_s=5.0), failed(1, GLOO_LOSS, seen_at_s=1.0, at_s=4.0)]
    assert blame(statuses, LIMITS, 10.0) == Fault(1, "raised")


# ---- in words


@pytest.mark.parametrize(
    ("outcome", "ended", "line"),
    [
        (raised("ValueError: boom", "KeyError: 'a'"), None, "raised ValueError: boom"),
        (None, Exit(signal=9), "died: killed by SIGKILL (signal 9), at step 5 (forward)"),
        (None, Exit(signal=63), "died: killed by signal 63, at step 5 (forward)"),
        (None, Exit(code=3), "died: exit code 3, at step 5 (forward)"),
        (None, Exit(detail="its node was lost"), "died: its node was lost, at step 5 (forward)"),
        (Returned(None), Exit(signal=11), "died after its entry returned: killed by SIGSEGV (signal 11), "),
        (Returned(None), Exit(code=0), "returned"),
        (None, None, "running, at step 5 (forward), last progress 2.5 s ago"),
    ],
)
def test_each_end_has_its_words(outcome: Outcome | None, ended: Exit | None, line: str) -> None:
    status = replace(running(0, progress_at_s=7.5), outcome=outcome, exit=ended)
    assert describe([status], 0, Fault(1, "died"), LIMITS, 10.0).startswith(line)


def test_a_frozen_rank_is_described_by_its_silence() -> None:
    status = running(0, alive_at_s=60.0)
    assert describe([status], 0, Fault(0, "frozen"), LIMITS, 91.5) == (
        "frozen: no sign of life for 31.5 s, at step 5 (forward)"
    )


def test_a_missing_rank_is_described_by_what_it_missed() -> None:
    assert describe([RankStatus(rank=0)], 0, Fault(0, "never joined"), LIMITS, 61.0) == "never joined in 60 s"
    assert describe([RankStatus(rank=0)], 0, Fault(1, "raised"), LIMITS, 2.0) == "had not joined yet"
