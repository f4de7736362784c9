"""How a job that outlives its ranks is looked after, with members that only the test moves."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from faulttol import fence
from faulttol.finding import Finding, FindingKind, Suspect
from faulttol.health import Vitals
from faulttol.recovery import Standing
from faulttol.run import recoveries
from launch import LaunchError, RankFailed, elastic, isolation, roster, slowness
from launch.entry import Raised
from launch.fleet import MemberReport, member_log
from launch.job import Job
from launch.verdict import Exit, Pulse
from tests.test_launch.scripted import Deaf, Fleet, care_of, losses_of, supervise


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(entry="nothing:runs", world_size=2, log_dir=tmp_path, name="job")


class _Records:
    """What a `Diagnosis` is to the supervisor; `current` is what the test lets it find, `last` what it has not seen."""

    def __init__(self) -> None:
        self.current: tuple[Finding, ...] = ()
        self.last: tuple[Finding, ...] = ()

    def begin(self, generation: int, world_size: int) -> None:
        self.current = ()

    def look(self, vitals: object, *, at_once: bool = False) -> Sequence[Finding]:
        if at_once:
            self.current, self.last = self.last, ()
        return ()


_OUTLIER = Finding(
    kind=FindingKind.NUMERIC,
    suspects=(Suspect(1, 1.0),),
    summary="its norm is 1e9",
    evidence={"gradient norm before the reduction of rank 1": 1e9},
    step=7,
)


def _distrusting(care: elastic.Care, records: _Records, distrust: Callable[[int, str], object]) -> elastic.Care:
    """Care that acts on outliers."""
    recovery = replace(care.recovery, acts_on_outliers=True, distrust=distrust)
    return replace(care, recovery=recovery, diagnosis=cast(Any, records))


def test_a_stop_before_all_are_ready_is_no_completion(job: Job, tmp_path: Path) -> None:
    def script(fleet: Fleet) -> None:
        if fleet.num_looks == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    fleet = Fleet(job, 2, script)
    assert supervise(fleet, job, care_of(tmp_path)) == "stopped"
    assert not fleet.orders, "nobody got a place"


def test_a_spare_that_dies_during_the_pause_takes_no_place(job: Job, tmp_path: Path) -> None:
    at: dict[str, int] = {}

    def script(fleet: Fleet) -> None:
        fleet.be_ready(*range(len(fleet.standings)))
        if fleet.generation == 0 and fleet.num_looks > 3:
            fleet.end(1)  # the spare takes its place at once
        elif fleet.generation == 1:
            fleet.end(0)  # got no further: there is a pause now
            at.setdefault("paused", fleet.num_looks)
            if fleet.num_looks == at["paused"] + 5:
                fleet.end(3)  # the spare that would step in
        elif fleet.generation == 2:
            fleet.finish()

    fleet = Fleet(job, 3, script)
    assert supervise(fleet, job, care_of(tmp_path, backoff_s=2.0, shrink=False)) == "completed"
    placed = [member for member, order in fleet.orders if order["order"] == "assign" and order["generation"] == 2]
    assert placed == [4, 2]


def test_a_loss_while_a_generation_loads_makes_no_earlier_recovery_fruitless(job: Job, tmp_path: Path) -> None:
    saved = [-1]

    def script(fleet: Fleet) -> None:
        fleet.be_ready(*range(len(fleet.standings)))
        working = [i for i, s in enumerate(fleet.standings) if s is not None and s.state == "working"]
        if fleet.generation == 6:
            fleet.finish()
        elif working and len(fleet.ended) == fleet.generation:
            # Every other generation gets far and saves; those between are lost while they load.
            step = 0 if fleet.generation % 2 else 10 * (fleet.generation + 1)
            fleet.pulse = Pulse(fleet.num_looks, fleet.num_looks, step, "train" if step else "load")
            saved[0] = max(saved[0], step)
            fleet.end(max(i for i in working if i not in fleet.ended))

    fleet = Fleet(job, 4, script)
    care = care_of(tmp_path, lambda: saved[0], backoff_s=0.01, no_progress_limit=2, restarts_per_hour=100)
    assert supervise(fleet, job, care) == "completed"


def test_a_spare_that_fails_at_its_start_is_replaced_but_not_in_haste(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roster, "_REFILL_S", 0.3)
    added_s: list[float] = []

    def script(fleet: Fleet) -> None:
        added_s.extend([time.monotonic()] * (len(fleet.standings) - 2 - len(added_s)))
        fleet.be_ready(0, 1, *range(5, len(fleet.standings)))
        for spare in range(2, min(len(fleet.standings), 5)):
            fleet.end(spare)  # it never gets ready
        if fleet.generation == 0 and fleet.num_looks > 3:
            fleet.end(1)
        elif fleet.generation == 1:
            fleet.finish()

    fleet = Fleet(job, 2, script)
    assert supervise(fleet, job, care_of(tmp_path, shrink=False)) == "completed"
    assert len(added_s) == 4
    assert all(later - earlier > 0.25 for earlier, later in itertools.pairwise(added_s))


def test_a_spare_that_ends_while_the_ranks_work_is_replaced(job: Job, tmp_path: Path) -> None:
    def script(fleet: Fleet) -> None:
        fleet.be_ready(*range(len(fleet.standings)))
        if fleet.generation == 0 and fleet.num_looks > 3:
            fleet.end(2)
        if len(fleet.standings) > 3:
            fleet.finish()

    fleet = Fleet(job, 3, script)
    assert supervise(fleet, job, care_of(tmp_path)) == "completed"
    assert len(fleet.standings) == 4


def test_a_member_that_raised_but_lingers_is_ended_before_its_successor_starts(job: Job, tmp_path: Path) -> None:
    def script(fleet: Fleet) -> None:
        fleet.be_ready(*range(len(fleet.standings)))
        if fleet.generation == 0 and fleet.num_looks > 3:
            fleet.pulse = Pulse(1, 1, 5, "train")
            fleet.outcomes[1] = Raised("", ("OSError: gone",), 0.0)
        elif fleet.generation == 1:
            fleet.finish()

    fleet = Fleet(job, 2, script)
    assert supervise(fleet, job, care_of(tmp_path, shrink=False)) == "completed"
    assert fleet.most_alive == 2


def test_the_record_ends_with_why_a_run_was_given_up(job: Job, tmp_path: Path) -> None:
    def script(fleet: Fleet) -> None:
        fleet.be_ready(*range(len(fleet.standings)))
        fleet.pulse = Pulse(1, 1, 5, "train")
        for member, standing in enumerate(fleet.standings):
            if member == 1 and standing is not None and standing.state == "working" and fleet.num_looks > 3:
                fleet.standings[1] = replace(standing, state="failed", messages=("KeyError: 'bad sample'",))

    care = care_of(tmp_path)
    with pytest.raises(RankFailed, match="KeyError in step 5, 2 times"):
        supervise(Fleet(job, 3, script), job, care)
    first, last = recoveries(tmp_path)
    loss = "step 5: rank 1 raised: KeyError: 'bad sample' -> "
    assert first.startswith(f"{loss}generation 1, after ")
    assert last.startswith(f"{loss}recovery is given up (user error): KeyError in step 5, 2 times")


def test_two_ranks_lost_at_once_are_both_replaced_though_one_spare_is_still_to_start(job: Job, tmp_path: Path) -> None:
    def script(fleet: Fleet) -> None:
        fleet.be_ready(*range(len(fleet.standings)))
        if fleet.generation == 0 and fleet.num_looks > 3:
            fleet.end(0)
            fleet.end(1)
        elif fleet.generation == 1:
            fleet.finish()

    fleet, care = Fleet(job, 3, script), care_of(tmp_path, shrink=False)
    assert supervise(fleet, job, care) == "completed"
    assert losses_of(care) == [[(0, "dead"), (1, "dead")]]


def test_a_survivor_that_dies_while_its_generation_ends_is_replaced_as_well(job: Job, tmp_path: Path) -> None:
    def script(fleet: Fleet) -> None:
        fleet.be_ready(*range(len(fleet.standings)))
        if fleet.generation == 0 and fleet.num_looks > 3:
            fleet.end(1)
            if fleet.orders[-1][1]["order"] == "abort":
                fleet.end(0)
        elif fleet.generation == 1:
            fleet.finish()

    fleet, care = Fleet(job, 4, script), care_of(tmp_path, shrink=False)
    assert supervise(fleet, job, care) == "completed"
    assert [member for member, order in fleet.orders if order["order"] == "assign"][2:] == [2, 3]


def test_a_rank_that_the_records_name_for_a_hang_is_ended_as_soon_as_all_others_have_left(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(isolation, "_LAGGARD_S", 1e9)  # what one gets whom nothing names
    records = _Records()

    def script(fleet: Deaf) -> None:
        fleet.be_ready(*range(len(fleet.standings)))
        if fleet.generation == 0 and fleet.num_looks > 3:
            records.current = (Finding(kind=FindingKind.HANG, suspects=(Suspect(1, 1.0),), summary="it sleeps"),)
        elif fleet.generation == 1:
            fleet.finish()

    care = replace(care_of(tmp_path, abort_timeout_s=1e9), diagnosis=cast(Any, records))
    assert supervise(Deaf(job, 3, script, 1), job, care) == "completed"
    assert losses_of(care) == [[(1, "hung")]]


def test_how_a_process_went_is_told_though_it_was_seen_to_be_gone_before_it_was_reaped(
    job: Job, tmp_path: Path
) -> None:
    class Watched(Fleet):
        def look(self) -> list[MemberReport]:
            reports = super().look()
            if self.generation == 0 and self.num_looks > 3:
                reports[1] = replace(reports[1], vitals=Vitals(rank=1, process_alive=False))
            return reports

        def end(self, member: int) -> None:
            self.ended.setdefault(member, Exit(signal=signal.SIGSEGV))

    def script(fleet: Fleet) -> None:
        fleet.be_ready(*range(len(fleet.standings)))
        if fleet.generation == 1:
            fleet.finish()

    care = care_of(tmp_path)
    assert supervise(Watched(job, 3, script), job, care) == "completed"
    (loss,) = json.loads(care.recovery.record.read_text())["losses"]
    assert (loss["kind"], loss["detail"]) == ("dead", "killed by SIGSEGV (signal 11)")


def test_a_stop_that_a_lost_rank_keeps_from_saving_says_so(job: Job, tmp_path: Path) -> None:
    def script(fleet: Fleet) -> None:
        fleet.be_ready(*range(len(fleet.standings)))
        if fleet.generation == 0 and fleet.num_looks == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        elif fleet.num_looks == 7:
            fleet.ended[1] = Exit(signal=signal.SIGKILL)

    told: list[bytes] = []
    fleet = Fleet(job, 3, script)
    result = elastic.supervise(fleet, job, care_of(tmp_path), stop_grace_s=1e9, on_output=told.append)
    assert (result.outcome, result.killed) == ("stopped", [0])
    assert b"asked to stop, but rank 1 dead: killed by SIGKILL (signal 9); the others cannot save" in b"".join(told)


@pytest.mark.parametrize(("accused", "expected"), [((1,), [(1, "numeric")]), ((), [])])
def test_a_rank_with_wrong_numbers_is_ended_whoever_tells_of_it_and_nobody_where_none_can_be_named(
    job: Job, tmp_path: Path, accused: tuple[int, ...], expected: list[tuple[int, str]]
) -> None:
    def script(fleet: Fleet) -> None:
        fleet.be_ready(*range(len(fleet.standings)))
        if fleet.generation == 0 and fleet.standings[0] == Standing(0, "working"):
            told = Standing(0, "failed", ("Corrupted: a bit",), "", accused)
            fleet.standings[0] = Standing.from_json(told.to_json())
        elif fleet.generation == 1:
            fleet.finish()

    fleet, care = Fleet(job, 3, script), care_of(tmp_path)
    assert supervise(fleet, job, care) == "completed"
    assert losses_of(care) == [expected]
    assert (1 in fleet.ended and fleet.ended[1].detail == "ended") == bool(accused)


def test_a_gradient_unlike_the_others_replaces_its_rank_from_before_that_step(job: Job, tmp_path: Path) -> None:
    records, distrusted = _Records(), []
    loss = Finding(kind=FindingKind.NUMERIC, suspects=(Suspect(0, 1.0),), summary="its loss is nan", step=5)

    def script(fleet: Fleet) -> None:
        fleet.be_ready(*range(len(fleet.standings)))
        if fleet.generation == 0 and fleet.num_looks > 3:
            records.current = (loss, _OUTLIER)
        elif fleet.generation == 1:
            fleet.finish()

    fleet = Fleet(job, 3, script)

    def distrust(step: int, why: str) -> None:
        assert fleet.orders[-1][1]["order"] == "abort", "not yet while a rank may write the same"
        distrusted.append((step, why))

    care = _distrusting(care_of(tmp_path), records, distrust)
    assert supervise(fleet, job, care) == "completed"
    assert losses_of(care) == [[(1, "numeric")]]
    assert distrusted == [(6, "its norm is 1e9")]


@pytest.mark.parametrize("outcome", ["completed", "stopped"])
def test_an_outlier_that_only_the_last_records_tell_of_is_neither_exported_nor_gone_on_from(
    job: Job, tmp_path: Path, outcome: str
) -> None:
    records, distrusted = _Records(), list[int]()

    def script(fleet: Fleet) -> None:
        fleet.be_ready(*range(len(fleet.standings)))
        if fleet.generation == 0 and fleet.num_looks == 4:
            records.last = (_OUTLIER,)
            if outcome == "stopped":
                os.kill(os.getpid(), signal.SIGTERM)
        if fleet.num_looks > 4:
            fleet.finish()

    fleet = Fleet(job, 3, script)
    care = _distrusting(care_of(tmp_path), records, lambda step, why: distrusted.append(step))
    assert supervise(fleet, job, care) == outcome
    assert distrusted == [6]
    assert fleet.generation == (1 if outcome == "completed" else 0), "a run that is not to stop does those steps again"


def test_an_outlier_that_cannot_be_written_down_ends_the_job_with_what_to_do(job: Job, tmp_path: Path) -> None:
    records = _Records()

    def script(fleet: Fleet) -> None:
        fleet.be_ready(*range(len(fleet.standings)))
        records.current = (_OUTLIER,) if fleet.num_looks > 3 else ()

    def distrust(step: int, why: str) -> None:
        raise OSError(errno.ENOSPC, "no room")

    with pytest.raises(LaunchError, match="no checkpoint after step 6 is to be gone on from"):
        supervise(Fleet(job, 3, script), job, _distrusting(care_of(tmp_path), records, distrust))


def test_a_slow_rank_is_borne_then_isolated_at_the_next_checkpoint(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slowness, "_LOOK_S", 0.0)
    records, saved, seen = _Records(), [100], dict[str, int]()
    slow = Finding(kind=FindingKind.STRAGGLER, suspects=(Suspect(1, 1.0),), summary="late", slowdown=3.0, step=20)

    def script(fleet: Fleet) -> None:
        fleet.be_ready(*range(len(fleet.standings)))
        looks = fleet.num_looks
        if fleet.generation == 0:
            # 200 steps since the checkpoint, 20 ms each: to do them again costs far more than a recovery.
            fleet.pulse = Pulse(looks, looks, 300 + looks, "train")
            records.current = (slow,) if looks > 4 else ()
            if looks == 60:
                saved[0] = 360
        elif fleet.generation == 1:
            seen.setdefault("replaced", looks)
            fleet.finish()

    care: Any = care_of(tmp_path, lambda: saved[0], recovery_cost_s=0.3)
    care = replace(care, recovery=replace(care.recovery, total_steps=100_000), diagnosis=records)
    assert supervise(Fleet(job, 3, script), job, care) == "completed"
    assert losses_of(care) == [[(1, "slow")]]
    assert 60 <= seen["replaced"] < 70, "not before the checkpoint, and at once after it"


def test_a_later_launch_begins_above_the_generations_of_earlier_ones(job: Job, tmp_path: Path) -> None:
    fence.publish(tmp_path / "fence", 4)
    zombie = fence.Fence(tmp_path / "fence", 4)

    def script(fleet: Fleet) -> None:
        fleet.be_ready(*range(len(fleet.standings)))
        if fleet.generation == 5:
            fleet.finish()

    fleet, care = Fleet(job, 2, script), care_of(tmp_path)
    care = replace(care, recovery=replace(care.recovery, first_generation=5))
    assert supervise(fleet, job, care) == "completed"
    with pytest.raises(fence.Fenced, match="generation 4 is over, the job is in generation 5"):
        zombie.check()


def test_a_record_that_cannot_be_written_ends_no_job_but_a_fence_does(
    job: Job, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "full").touch()  # no folder: nothing can be written in it, as on a full disk

    def script(fleet: Fleet) -> None:
        fleet.be_ready(*range(len(fleet.standings)))
        if fleet.generation == 0 and fleet.num_looks > 3:
            fleet.end(1)
        elif fleet.generation == 1:
            fleet.finish()

    care = care_of(tmp_path)
    unrecorded = replace(care, recovery=replace(care.recovery, record=tmp_path / "full" / "recoveries.jsonl"))
    assert supervise(Fleet(job, 3, script), job, unrecorded) == "completed"
    assert "recoveries.jsonl: could not be written" in caplog.text
    unfenced = replace(care, recovery=replace(care.recovery, fence=tmp_path / "full" / "fence"))
    with pytest.raises(LaunchError, match="cannot fence generation 0"):
        supervise(Fleet(job, 3, script), job, unfenced)


def test_meeting_the_fence_of_ones_own_launch_is_no_fault_and_that_of_another_ends_the_run(
    job: Job, tmp_path: Path
) -> None:
    fenced = ("Fenced: generation 0 is over",)

    def script(fleet: Fleet, at_once: bool, published: int) -> None:
        fleet.be_ready(*range(len(fleet.standings)))
        if fleet.generation == 0 and fleet.num_looks > 3:
            if not at_once:
                fleet.end(1)
            elif published:
                fence.publish(tmp_path / "fence", published)
            if at_once != (fleet.orders[-1][1]["order"] == "abort"):
                fleet.standings[0] = Standing(0, "failed" if at_once else "quiesced", fenced)
        elif fleet.generation == 1:
            fleet.finish()

    care = care_of(tmp_path)
    assert supervise(Fleet(job, 3, lambda fleet: script(fleet, False, 0)), job, care) == "completed"
    assert losses_of(care) == [[(1, "dead")]]
    # A disk that hiccups, or shows what it once held: the number there is still this launch's.
    (tmp_path / "fence").unlink()
    assert supervise(Fleet(job, 3, lambda fleet: script(fleet, True, 0)), job, care) == "completed"
    assert losses_of(care)[1:] == [[]]
    (tmp_path / "fence").unlink()
    with pytest.raises(RankFailed, match="raised: Fenced: generation 0 is over"):
        supervise(Fleet(job, 3, lambda fleet: script(fleet, True, 7)), job, care)
    assert len(losses_of(care)) == 2, "it did not fight for the run"
    assert fence.current_generation(tmp_path / "fence") == 7


def test_what_a_disk_that_hiccups_does_not_tell_ends_no_job(job: Job, tmp_path: Path) -> None:
    saved = [3]

    def script(fleet: Fleet) -> None:
        fleet.be_ready(*range(len(fleet.standings)))
        if fleet.generation == 0 and fleet.num_looks == 4:
            member_log(job, 0).unlink()
            saved.clear()
            fleet.end(1)
        elif fleet.generation == 1:
            fleet.finish()

    def saved_step() -> int:
        if not saved:
            raise OSError(errno.ESTALE, "Stale file handle")
        return saved[0]

    care, said = care_of(tmp_path, saved_step), list[bytes]()
    result = elastic.supervise(Fleet(job, 3, script), job, care, stop_grace_s=1.0, on_output=said.append)
    assert result.outcome == "completed"
    assert losses_of(care) == [[(1, "dead")]]
    assert b"".join(said).count(b"cannot tell what is saved, and takes it for as much as before: [Errno 116]") == 1


def test_a_launch_that_another_has_overtaken_does_not_take_the_run_back(job: Job, tmp_path: Path) -> None:
    def script(fleet: Fleet) -> None:
        fleet.be_ready(*range(len(fleet.standings)))
        if fleet.generation == 0 and fleet.num_looks > 3:
            fence.publish(tmp_path / "fence", 7)
            fleet.end(1)  # of whatever: none of its ranks has met the fence

    with pytest.raises(RankFailed, match="Fenced: generation 0 is over: another launch has the run"):
        supervise(Fleet(job, 3, script), job, care_of(tmp_path))
    assert fence.current_generation(tmp_path / "fence") == 7


@pytest.mark.parametrize("fails", [False, True])
def test_a_process_that_stays_changes_nothing_of_how_the_job_went(job: Job, tmp_path: Path, fails: bool) -> None:
    class Staying(Fleet):
        def kill(self) -> None:
            raise LaunchError("process 7 still there")

    def script(fleet: Fleet) -> None:
        fleet.be_ready(*range(len(fleet.standings)))
        if fails:
            fleet.ended[0] = fleet.ended[1] = Exit(code=3)
        elif fleet.generation == 0:
            fleet.finish()

    said: list[bytes] = []
    with pytest.raises(RankFailed, match="exit code 3") if fails else contextlib.nullcontext():
        elastic.supervise(Staying(job, 2, script), job, care_of(tmp_path), stop_grace_s=1.0, on_output=said.append)
    assert b"[job] process 7 still there\n" in said


def test_a_launch_does_not_begin_where_a_later_one_has_begun_meanwhile(job: Job, tmp_path: Path) -> None:
    fence.publish(tmp_path / "fence", 0)  # both had found none before
    with pytest.raises(LaunchError, match="generation 0 of the run has begun, and this launch was to begin with 0"):
        supervise(Fleet(job, 2, lambda fleet: None), job, care_of(tmp_path))
