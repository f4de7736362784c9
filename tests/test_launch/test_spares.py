"""Processes without a place: they are looked after too, and what befalls them ends no job that goes well."""

from __future__ import annotations

import errno
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from faulttol.health import Vitals
from faulttol.recovery import Standing
from launch import RankFailed, elastic, member, roster
from launch.job import Job
from launch.verdict import Exit, Pulse
from tests.test_launch.scripted import Deaf, Fleet, care_of, losses_of, supervise

_FROZEN = Vitals(rank=0, native_age_s=60.0)


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    monkeypatch.setattr(member, "UNFIT_S", 0.3)
    return Job(entry="nothing:runs", world_size=2, log_dir=tmp_path, name="job")


def _told(fleet: Fleet, job: Job, care: elastic.Care) -> str:
    """What the supervisor says of a job that completes."""
    said: list[bytes] = []
    assert elastic.supervise(fleet, job, care, stop_grace_s=1.0, on_output=said.append).outcome == "completed"
    return b"".join(said).decode()


def test_a_spare_that_freezes_is_replaced_while_the_ranks_work(job: Job, tmp_path: Path) -> None:
    def script(fleet: Fleet) -> None:
        fleet.be_ready(*range(len(fleet.standings)))
        if fleet.generation == 0:
            fleet.vitals[2] = _FROZEN
        if len(fleet.standings) > 3:
            fleet.finish()

    fleet = Fleet(job, 3, script)
    told = _told(fleet, job, care_of(tmp_path))
    assert fleet.ended[2].detail == "ended"
    assert "[job] spare0: frozen: no answer from its process for 60.0 s" in told
    assert fleet.most_alive == 3


def test_a_spare_that_is_stopped_for_a_moment_is_none(job: Job, tmp_path: Path) -> None:
    def script(fleet: Fleet) -> None:
        fleet.be_ready(*range(len(fleet.standings)))
        fleet.vitals[2] = Vitals(rank=2, process_state="T" if fleet.num_looks % 10 == 0 else "S")
        if fleet.num_looks > 60:
            fleet.finish()

    fleet = Fleet(job, 3, script)
    assert supervise(fleet, job, care_of(tmp_path)) == "completed"
    assert len(fleet.standings) == 3


@pytest.mark.parametrize("is_frozen", [False, True])
def test_a_replacement_that_never_gets_ready_is_replaced_itself(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_frozen: bool
) -> None:
    monkeypatch.setattr(roster, "_REFILL_S", 0.2)

    def script(fleet: Fleet) -> None:
        fleet.be_ready(0, 1, *range(3, len(fleet.standings)))
        fleet.vitals[2] = _FROZEN if is_frozen else Vitals(rank=2)
        if fleet.generation == 0 and fleet.num_looks > 3:
            fleet.end(1)
        elif fleet.generation == 1:
            fleet.finish()

    fleet = Fleet(job, 2, script)
    care = care_of(tmp_path, shrink=False)
    told = _told(fleet, job, replace(care, limits=replace(care.limits, start_timeout_s=1.0)))
    assert "spare0: frozen: " in told if is_frozen else "spare0: hung: it is not ready 1 s after its start" in told
    assert [member for member, order in fleet.orders if order["order"] == "assign"][2:] == [0, 3]


def test_what_has_no_process_yet_is_waited_for(job: Job, tmp_path: Path) -> None:
    began_s: list[float] = []

    def script(fleet: Fleet) -> None:  # as on a cluster that has no room: nothing is seen of member 2
        fleet.be_ready(0, 1)
        if fleet.generation == 0 and fleet.num_looks > 3:
            fleet.end(1)
            began_s[:] = began_s or [time.monotonic()]
            if time.monotonic() > began_s[0] + 1.0:
                fleet.be_ready(2)
        elif fleet.generation == 1:
            fleet.finish()

    fleet = Fleet(job, 2, script)
    care = care_of(tmp_path, shrink=False)
    assert supervise(fleet, job, replace(care, limits=replace(care.limits, start_timeout_s=0.5))) == "completed"
    assert len(fleet.standings) == 3


def test_a_start_that_the_machine_refuses_ends_no_job_and_is_tried_again(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roster, "_REFILL_S", 0.2)
    refused: list[float] = []

    class Full(Fleet):
        def add(self) -> None:
            if len(self.standings) >= 3 and len(refused) < 3:
                refused.append(time.monotonic())
                raise OSError(errno.ENOSPC, "No space left on device")
            super().add()

    def script(fleet: Fleet) -> None:
        fleet.be_ready(*range(len(fleet.standings)))
        if fleet.generation == 0 and fleet.num_looks > 3:
            fleet.end(2)
        if len(fleet.standings) > 3:
            fleet.finish()

    told = _told(Full(job, 3, script), job, care_of(tmp_path))
    assert told.count("cannot start a process: [Errno 28] No space left on device; tries again after") == 3
    assert refused[1] - refused[0] > 0.1
    assert refused[2] - refused[1] > 0.2


def test_starts_that_come_to_nothing_are_told_of_and_tried_ever_more_rarely(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roster, "_REFILL_S", 0.3)
    monkeypatch.setattr(roster, "_LONGEST_REFILL_S", 0.7)
    added_s: list[float] = []

    def script(fleet: Fleet) -> None:
        added_s.extend([time.monotonic()] * (len(fleet.standings) - 2 - len(added_s)))
        fleet.be_ready(0, 1)
        for spare in range(2, len(fleet.standings)):
            fleet.ended.setdefault(spare, Exit(code=1))
        if len(fleet.standings) > 7:
            fleet.finish()

    told = _told(Fleet(job, 3, script), job, care_of(tmp_path))
    for index, pause_s in enumerate((0.3, 0.3, 0.6, 0.7, 0.7)):
        assert f"spare{index}: was never ready: exit code 1; starts are at least {pause_s:g} s apart now (log: " in told
        if 0 < index < 4:
            assert added_s[index + 1] - added_s[index] > 0.5 * pause_s


def test_a_run_that_waits_for_a_process_ends_when_none_gets_ready(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roster, "_REFILL_S", 0.02)

    def script(fleet: Fleet) -> None:
        fleet.be_ready(0, 1)
        for spare in range(2, len(fleet.standings)):
            fleet.ended.setdefault(spare, Exit(code=1))
        if fleet.generation == 0 and fleet.num_looks > 3:
            fleet.end(1)

    fleet = Fleet(job, 2, script)
    with pytest.raises(RankFailed, match=r"given up \(no spare\): 1 of 2 .*in 3 attempts in a row to"):
        supervise(fleet, job, care_of(tmp_path, shrink=False, failed_starts_limit=3))
    assert len(fleet.standings) == 5


def test_starts_that_failed_before_a_loss_do_not_count_and_one_under_way_is_waited_for(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roster, "_REFILL_S", 0.02)
    lost_at: list[int] = []

    def script(fleet: Fleet) -> None:
        fleet.be_ready(0, 1)
        num = len(fleet.standings)
        if fleet.generation == 0 and num < 7:
            for spare in range(2, num):
                fleet.ended.setdefault(spare, Exit(code=1))  # all of them, in the background
        elif fleet.generation == 0:
            lost_at[:] = lost_at or [fleet.num_looks]
            fleet.end(1)
            if fleet.num_looks > lost_at[0] + 50:
                fleet.be_ready(*range(6, num))
        elif fleet.generation == 1:
            fleet.finish()

    care = care_of(tmp_path, shrink=False, failed_starts_limit=2, spare_wait_s=0.1)
    assert supervise(Fleet(job, 3, script), job, care) == "completed"


@pytest.mark.parametrize("how", ["hang", "die"])
def test_attempts_count_where_several_processes_are_missing(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """They come to nothing one after the other, each when another attempt is already under way."""
    monkeypatch.setattr(roster, "_REFILL_S", 0.05)
    seen_s: dict[int, float] = {}

    def script(fleet: Fleet) -> None:
        fleet.be_ready(0, 1, 2, 3)
        for spare in range(4, len(fleet.standings)):
            fleet.vitals[spare] = Vitals(rank=spare)
            seen_s.setdefault(spare, time.monotonic())
            if how == "die" and time.monotonic() > seen_s[spare] + 0.1 * (1 + spare % 2):
                fleet.ended.setdefault(spare, Exit(code=1))
        if fleet.generation == 0 and fleet.num_looks > 3:
            fleet.end(2)
            fleet.end(3)

    job = replace(job, world_size=4)
    fleet, care = Fleet(job, 4, script), care_of(tmp_path, shrink=False, failed_starts_limit=3, spare_wait_s=0.1)
    with pytest.raises(RankFailed, match=r"given up \(no spare\)"):
        supervise(fleet, job, replace(care, limits=replace(care.limits, start_timeout_s=0.3)))
    assert len(fleet.standings) < 16


def test_many_that_die_one_after_another_are_few_attempts(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a machine whose disk is away for a while: it comes back before the run is given up."""
    monkeypatch.setattr(roster, "_REFILL_S", 0.2)
    seen_s: dict[int, float] = {}

    def script(fleet: Fleet) -> None:
        fleet.be_ready(*range(8))
        now_s = time.monotonic()
        for spare in range(8, len(fleet.standings)):
            seen_s.setdefault(spare, now_s)
            if now_s > seen_s[8] + 1.2 and spare not in fleet.ended:
                fleet.be_ready(spare)
            elif now_s > seen_s[spare] + 0.3 + 0.03 * (spare % 8) and fleet.standings[spare] is None:
                fleet.ended.setdefault(spare, Exit(code=1))
        if fleet.generation == 0 and fleet.num_looks > 3:
            for rank in range(1, 8):
                fleet.end(rank)
        elif fleet.generation == 1:
            fleet.finish()

    job = replace(job, world_size=8)
    assert supervise(Fleet(job, 8, script), job, care_of(tmp_path, shrink=False, spare_wait_s=0.1)) == "completed"


def test_spares_that_get_ready_and_die_are_told_of_and_replaced_in_no_haste(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roster, "_REFILL_S", 0.3)
    ready_s: dict[int, float] = {}

    def script(fleet: Fleet) -> None:
        fleet.be_ready(*range(len(fleet.standings)))
        for spare in range(2, len(fleet.standings)):
            ready_s.setdefault(spare, time.monotonic())
            if time.monotonic() > ready_s[spare] + 0.05 * (1 + spare % 2):
                fleet.ended.setdefault(spare, Exit(signal=signal.SIGKILL))
        if fleet.generation == 0 and time.monotonic() > ready_s[2] + 1.5:
            fleet.finish()

    fleet = Fleet(job, 4, script)
    told = _told(fleet, job, care_of(tmp_path))
    assert len(fleet.standings) <= 4 + 2 * 6
    assert "spare0: ended while it waited for a place: killed by SIGKILL (signal 9); starts are" in told


def test_a_start_that_takes_longer_to_fail_than_the_pause_counts_before_the_next(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roster, "_REFILL_S", 0.02)

    def script(fleet: Fleet) -> None:
        fleet.be_ready(0, 1)
        for spare in range(2, len(fleet.standings)):
            fleet.vitals[spare] = Vitals(rank=spare)  # it hangs in its start
        if fleet.generation == 0 and fleet.num_looks > 3:
            fleet.end(1)

    fleet, care = Fleet(job, 2, script), care_of(tmp_path, shrink=False, failed_starts_limit=2, spare_wait_s=0.1)
    with pytest.raises(RankFailed, match=r"given up \(no spare\)"):
        supervise(fleet, job, replace(care, limits=replace(care.limits, start_timeout_s=0.3)))
    assert len(fleet.standings) == 4


def test_processes_that_die_together_are_one_failed_attempt(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roster, "_REFILL_S", 0.1)

    def script(fleet: Fleet) -> None:
        fleet.be_ready(0, 1, 2, 3, *range(7, len(fleet.standings)))
        if fleet.generation == 0 and fleet.num_looks > 3:
            for rank in (1, 2, 3):
                fleet.end(rank)
            for spare in range(4, min(7, len(fleet.standings))):
                fleet.ended.setdefault(spare, Exit(code=1))
        elif fleet.generation == 1:
            fleet.finish()

    job = replace(job, world_size=4)
    told = _told(Fleet(job, 4, script), job, care_of(tmp_path, shrink=False, failed_starts_limit=2))
    assert told.count("was never ready: exit code 1; starts are at least 0.1 s apart now") == 3


def test_a_spare_that_dies_while_the_job_starts_does_not_fail_it(job: Job, tmp_path: Path) -> None:
    def script(fleet: Fleet) -> None:
        if fleet.num_looks == 3:
            fleet.ended[0] = Exit(code=1)
        if fleet.num_looks > 5:
            fleet.be_ready(*range(1, len(fleet.standings)))
        if fleet.generation == 0 and len(fleet.standings) > 3:
            fleet.finish()

    fleet = Fleet(job, 3, script)
    assert "rank0: was never ready: exit code 1" in _told(fleet, job, care_of(tmp_path))
    assert [member for member, order in fleet.orders if order["order"] == "assign"] == [1, 2]


def test_a_job_fails_at_its_start_when_fewer_are_left_than_it_takes(job: Job, tmp_path: Path) -> None:
    def script(fleet: Fleet) -> None:
        if fleet.num_looks > 3:
            fleet.ended[0] = fleet.ended[2] = Exit(code=3)

    with pytest.raises(RankFailed, match="exit code 3"):
        supervise(Fleet(job, 3, script), job, care_of(tmp_path))


@pytest.mark.parametrize(
    ("pulse", "is_waited_for"),
    [(Pulse(9, 9, 7, "load"), True), (Pulse(9, 9, 7, "train"), True), (Pulse(9, 9, 8, "train"), False)],
)
def test_a_survivor_that_loads_or_compiles_gets_the_time_for_it(
    job: Job, tmp_path: Path, pulse: Pulse, is_waited_for: bool
) -> None:
    def script(fleet: Deaf) -> None:
        fleet.be_ready(*range(len(fleet.standings)))
        fleet.pulse, fleet.vitals[0] = Pulse(1, 1, 0, "standby"), Vitals(rank=0, phase=pulse.phase)
        if fleet.generation == 0:
            fleet.pulse, fleet.pulses[0] = Pulse(9, 9, 6, "data"), pulse
        if fleet.generation == 0 and fleet.num_looks > 3:
            fleet.end(1)
            if fleet.told_s and time.monotonic() > fleet.told_s[0] + 1.0 and 0 not in fleet.ended:
                fleet.standings[0] = Standing(0, "quiesced")
        elif fleet.generation == 1:
            fleet.finish()

    care = care_of(tmp_path, shrink=False, abort_timeout_s=0.2)
    told = _told(Deaf(job, 4, script), job, care)
    assert losses_of(care) == [[(1, "dead")] if is_waited_for else [(1, "dead"), (0, "hung")]]
    said = f"waits for rank 0 ({pulse.phase}) to leave, 2.4 s at most"
    assert (said in told) == is_waited_for


def test_nobody_is_waited_for_with_patience_once_the_job_is_to_stop(job: Job, tmp_path: Path) -> None:
    def script(fleet: Deaf) -> None:
        fleet.be_ready(*range(len(fleet.standings)))
        fleet.pulses[0] = Pulse(1, 1, 7, "load")
        if fleet.generation == 0 and fleet.num_looks > 3:
            fleet.end(1)
            if len(fleet.told_s) == 1:
                fleet.told_s.append(time.monotonic())
                os.kill(os.getpid(), signal.SIGTERM)

    began_s = time.monotonic()
    assert supervise(Deaf(job, 3, script), job, care_of(tmp_path, abort_timeout_s=1.0)) == "stopped"
    assert time.monotonic() - began_s < 6.0, "patience is twelve times as long"


def test_the_first_step_is_the_first_that_a_generation_shows_wherever_it_resumed(job: Job, tmp_path: Path) -> None:
    def script(fleet: Deaf) -> None:  # as resumed from memory, in which more is saved than on the disk
        fleet.be_ready(*range(len(fleet.standings)))
        beats = [(96, "standby"), (0, "load"), (96, "data"), (97, "train")]
        fleet.pulse = Pulse(fleet.num_looks, fleet.num_looks, *beats[min(fleet.num_looks, 6) // 2])
        if fleet.generation == 0 and fleet.num_looks > 6:
            fleet.end(1)
            if fleet.told_s and time.monotonic() > fleet.told_s[0] + 1.0:
                fleet.standings[0] = Standing(0, "quiesced")
        elif fleet.generation == 1:
            fleet.finish()

    care = care_of(tmp_path, lambda: 50, shrink=False, abort_timeout_s=0.2)
    assert supervise(Deaf(job, 3, script), job, care) == "completed"
    assert losses_of(care) == [[(1, "dead")]]


def test_an_error_after_the_order_to_end_is_told_where_nobody_is_at_fault(job: Job, tmp_path: Path) -> None:
    def script(fleet: Fleet) -> None:
        fleet.be_ready(*range(len(fleet.standings)))
        fleet.pulse = Pulse(1, 1, 5, "train")
        for index, standing in enumerate(fleet.standings):
            if standing == Standing(fleet.generation, "working") and fleet.num_looks % 5 == 0 and index == 1:
                fleet.standings[1] = replace(standing, state="failed", messages=("RuntimeError: closed by peer",))
            elif standing == Standing(fleet.generation, "quiesced") and index == 0:
                mine = ("KeyError: 'bad sample'",)
                fleet.standings[0] = replace(standing, messages=mine, traceback="the whole of it", was_aborted=True)

    care = care_of(tmp_path, backoff_s=0.01, no_progress_limit=1)
    said: list[bytes] = []
    with pytest.raises(RankFailed, match="no progress") as caught:
        elastic.supervise(Fleet(job, 2, script), job, care, stop_grace_s=1.0, on_output=said.append)
    assert b"the ranks lost one another; rank 0 said KeyError: 'bad sample'" in b"".join(said)
    assert "the whole of it" in str(caught.value)


def test_an_error_that_came_of_being_broken_off_is_not_the_ranks_own(job: Job, tmp_path: Path) -> None:
    given_up = ("SaveFailed: given up",)

    def script(fleet: Fleet) -> None:
        fleet.be_ready(*range(len(fleet.standings)))
        fleet.pulse = Pulse(1, 1, 5, "train")
        if fleet.generation < 2 and fleet.num_looks > 3:
            victim = (
                max(i for i, s in enumerate(fleet.standings) if s == Standing(fleet.generation, "working"))
                if fleet.orders[-1][1]["order"] == "assign"
                else -1
            )
            if victim >= 0:
                fleet.end(victim)
            for member, standing in enumerate(fleet.standings):
                if standing is not None and standing.state == "quiesced":
                    fleet.standings[member] = replace(standing, messages=given_up, was_aborted=True)
        elif fleet.generation == 2:
            fleet.finish()

    care = care_of(tmp_path, backoff_s=0.01)
    assert supervise(Fleet(job, 4, script), job, care) == "completed"
    assert [[kind for _, kind in losses] for losses in losses_of(care)] == [["dead"], ["dead"]]
