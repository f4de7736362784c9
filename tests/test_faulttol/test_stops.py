"""What stops a job is told apart, with the rank that did it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from faulttol.config import DetectorConfig, HealthConfig
from faulttol.events import RankRecord
from faulttol.finding import Finding, FindingKind
from faulttol.health import Condition, Vitals, assess
from faulttol.rules.stop import stops
from faulttol.rules.waiting import chains
from faulttol.unrecorded import without_unrecorded
from faulttol.view import JobView
from tests.test_faulttol.scenes import MS, Scene, after, all_reduce, message, proven, with_vitals

CONFIG, HEALTH = DetectorConfig(hang_after_s=10.0), HealthConfig(stalled_after_s=10.0)
STEPS = 10
NEXT = 2 * STEPS + 1
FOUR = range(4)


def found(view: JobView) -> list[Finding]:
    return proven(stops(view, CONFIG, HEALTH))


def only(view: JobView) -> Finding:
    (finding,) = found(view)
    return finding


@pytest.fixture(scope="module")
def records() -> dict[int, RankRecord]:
    return Scene().run(STEPS)


@pytest.mark.parametrize(
    ("vitals", "condition"),
    [
        (Vitals(rank=0), Condition.RUNNING),
        (Vitals(rank=0, process_alive=False, report_age_s=99.0), Condition.DEAD),
        (Vitals(rank=0, report_age_s=6.0), Condition.LOST),
        (Vitals(rank=0, process_state="T", python_age_s=0.1), Condition.FROZEN),
        (Vitals(rank=0, native_age_s=2.0, python_age_s=9.0), Condition.FROZEN),
        (Vitals(rank=0, native_age_s=0.1, python_age_s=9.0), Condition.STUCK),
        (Vitals(rank=0, native_age_s=0.1, python_age_s=9.0, phase="checkpoint"), Condition.RUNNING),
        (Vitals(rank=0, native_age_s=0.1, python_age_s=90.0, phase="checkpoint"), Condition.STUCK),
        (Vitals(rank=0, python_age_s=9.0, process_state="D"), Condition.FROZEN),
        (Vitals(rank=0, native_age_s=0.1, python_age_s=0.1, progress_age_s=11.0), Condition.STALLED),
        (Vitals(rank=0, native_age_s=0.1, python_age_s=0.1, progress_age_s=1.0), Condition.RUNNING),
    ],
)
def test_vitals_prove_a_condition(vitals: Vitals, condition: Condition) -> None:
    assert assess(vitals, HEALTH).condition is condition


def test_who_has_not_entered_is_the_one_that_hangs(records: dict[int, RankRecord]) -> None:
    waiting = [all_reduce(rank, FOUR, seq=NEXT, step=STEPS) for rank in (0, 1, 3)]
    finding = only(after(records, waiting, 11.0))
    assert (finding.kind, finding.culprits) == (FindingKind.HANG, (2,))
    assert finding.evidence["ranks that wait"] == 3
    assert finding.evidence["open for, s"] == pytest.approx(11.0)
    assert finding.sequence == NEXT


def test_a_rank_that_takes_part_and_records_nothing_is_not_accused(records: dict[int, RankRecord]) -> None:
    def accused(view: JobView) -> list[tuple[int, ...]]:
        return [finding.culprits for finding in without_unrecorded(view, found(view))]

    rest = {rank: record for rank, record in records.items() if rank != 1}
    waiting = [all_reduce(rank, FOUR, seq=NEXT, step=STEPS) for rank in (0, 3)]
    assert accused(after(rest, waiting, 11.0)) == [(2,)], "rank 1 may well have entered"
    assert not accused(after(rest, [*waiting, all_reduce(2, FOUR, seq=NEXT, step=STEPS)], 11.0))
    # Before they have met once, a rank without a record may be one that never began.
    fresh = {rank: replace(record, events=(), marks=()) for rank, record in rest.items()}
    first = [all_reduce(rank, FOUR, seq=1) for rank in (0, 2, 3)]
    assert accused(after(fresh, first, 99.0)) == [(1,)]
    assert accused(after(records, [*waiting, all_reduce(1, FOUR, seq=NEXT, step=STEPS)], 11.0)) == [(2,)]


def test_nothing_hangs_before_the_threshold(records: dict[int, RankRecord]) -> None:
    waiting = [all_reduce(rank, FOUR, seq=NEXT, step=STEPS) for rank in (0, 1, 3)]
    assert not found(after(records, waiting, 9.0))


def test_the_threshold_grows_with_what_is_usual() -> None:
    slow = Scene(transfer_ms=lambda step: 4000.0).run(STEPS)
    waiting = [all_reduce(rank, FOUR, seq=NEXT, step=STEPS) for rank in (0, 1, 3)]
    assert not found(after(slow, waiting, 19.0))
    assert only(after(slow, waiting, 21.0)).culprits == (2,)


@pytest.mark.parametrize("phase", ["checkpoint", "probe"])
def test_a_rank_in_a_phase_that_may_last_has_more_time(records: dict[int, RankRecord], phase: str) -> None:
    waiting = [all_reduce(rank, FOUR, seq=NEXT, step=STEPS) for rank in (0, 1, 3)]
    view = after(records, waiting, 60.0)
    marks = (*view.records[2].marks[:-1], replace(view.records[2].marks[-1], phase=phase))
    patient = JobView({**view.records, 2: replace(view.records[2], marks=marks)})
    assert only(view).culprits == (2,)
    assert not found(patient)


@pytest.mark.parametrize("marks_steps", [True, False])
def test_a_rank_in_its_first_step_may_compile(marks_steps: bool) -> None:
    """Others wait for it; who marks no steps has no first one, and a later step is none."""
    records = Scene().run(0)
    if not marks_steps:
        records = {rank: replace(record, marks=()) for rank, record in records.items()}
    waiting = [all_reduce(rank, FOUR, seq=1, step=0) for rank in (0, 1, 3)]
    health = HealthConfig(stalled_after_s=100.0)  # after which a launcher gives it up

    def told(age_s: float) -> list[tuple[int, ...]]:
        return [finding.culprits for finding in stops(after(records, waiting, age_s), CONFIG, health)]

    assert told(49.0) == ([] if marks_steps else [(2,)])
    assert told(51.0) == [(2,)]


def test_communication_hangs_in_a_first_step_as_in_any() -> None:
    everybody = [all_reduce(rank, FOUR, seq=1, step=0) for rank in FOUR]
    assert only(after(Scene().run(0), everybody, 11.0)).kind is FindingKind.COMMUNICATION_HANG


def test_the_culprit_is_found_across_groups(records: dict[int, RankRecord]) -> None:
    """0 waits for 1 in one group, 1 for 3 in another, 3 works."""
    waiting = [
        all_reduce(0, (0, 1), seq=5, group="a", step=STEPS),
        all_reduce(1, (1, 3), seq=5, group="b", step=STEPS),
        message(2, "recv", 0, step=STEPS),
    ]
    finding = only(after(records, waiting, 11.0))
    assert (finding.kind, finding.culprits) == (FindingKind.HANG, (3,))
    assert finding.evidence["ranks that wait"] == 3


def test_a_send_that_left_does_not_make_its_rank_wait(records: dict[int, RankRecord]) -> None:
    """2 has an unawaited send to 1 open and works; 1 waits for 2: no circle."""
    waiting = [
        message(2, "send", 1, step=STEPS),
        *(all_reduce(rank, FOUR, seq=NEXT, step=STEPS) for rank in (0, 1, 3)),
    ]
    (chain,) = chains(after(records, waiting, 11.0))
    assert (chain.kind, chain.ranks, chain.num_waiting) == ("sink", (2,), 3)


@pytest.mark.parametrize("is_stray", [True, False])
def test_a_stage_that_sends_to_one_that_left_its_order_does_not_hang(is_stray: bool) -> None:
    """0 sends to 1 in every step. In the last one 1 is in a broadcast that nobody else makes; or it does something."""
    records = {}
    for rank, kind in ((0, "send"), (1, "recv")):
        events = tuple(
            message(
                rank, kind, 1 - rank, seq=1 + step, step=step, state="ended", begin_ns=MS * step, end_ns=MS * step + 1
            )
            for step in range(STEPS)
        )
        record = Scene(num_ranks=2).run(1)[rank]
        records[rank] = replace(record, events=events, now_ns=MS * STEPS)
    waiting = [message(0, "send", 1, seq=STEPS + 1, step=STEPS)]
    if is_stray:
        waiting.append(all_reduce(1, (0, 1), seq=1, kind="broadcast", peer=0, step=STEPS))
    finding = only(after(records, waiting, 11.0))
    assert finding.kind is (FindingKind.DESYNC if is_stray else FindingKind.HANG)
    assert finding.culprits[0] == 1


def test_all_in_and_no_end_is_communication(records: dict[int, RankRecord]) -> None:
    waiting = [all_reduce(rank, FOUR, seq=NEXT, step=STEPS) for rank in FOUR]
    finding = only(after(records, waiting, 11.0))
    assert finding.kind is FindingKind.COMMUNICATION_HANG
    assert set(finding.culprits) == set(FOUR)


def test_a_message_on_its_way_accuses_its_link(records: dict[int, RankRecord]) -> None:
    sent = message(1, "send", 2, step=STEPS)
    view = after(records, [message(2, "recv", 1, step=STEPS), sent], 11.0)
    events = view.records[1].events
    done = replace(events[-1], state="ended", end_ns=events[-1].begin_ns + MS)
    view = JobView({**view.records, 1: replace(view.records[1], events=(*events[:-1], done))})
    finding = only(view)
    assert finding.kind is FindingKind.COMMUNICATION_HANG
    assert [str(suspect) for suspect in finding.suspects] == ["link 1->2"]


def test_groups_entered_in_different_orders_are_a_desync(records: dict[int, RankRecord]) -> None:
    waiting = [
        all_reduce(0, (0, 1), seq=5, group="a", step=STEPS),
        all_reduce(1, (0, 1), seq=5, group="b", step=STEPS),
    ]
    finding = only(after(records, waiting, 11.0))
    assert (finding.kind, set(finding.culprits)) == (FindingKind.DESYNC, {0, 1})


@pytest.mark.parametrize(
    "odd", [{"kind": "broadcast", "peer": 0}, {"bytes": 12}, {"dtype": "int16"}, {"kind": "barrier"}], ids=str
)
def test_another_operation_in_the_same_place_is_a_desync(
    records: dict[int, RankRecord], odd: dict[str, object]
) -> None:
    waiting = [all_reduce(rank, FOUR, seq=NEXT, step=STEPS, **(odd if rank == 1 else {})) for rank in FOUR]
    finding = only(after(records, waiting, 0.1))
    assert (finding.kind, finding.culprits) == (FindingKind.DESYNC, (1,))


def test_of_two_ranks_the_one_unlike_its_earlier_steps_is_odd() -> None:
    records = Scene(num_ranks=2).run(STEPS)
    waiting = [
        all_reduce(0, (0, 1), seq=NEXT, step=STEPS),
        all_reduce(1, (0, 1), seq=NEXT, step=STEPS, bytes=64),
    ]
    finding = only(after(records, waiting, 0.1))
    assert (finding.kind, finding.culprits) == (FindingKind.DESYNC, (1,))


def test_uneven_kinds_may_differ_in_size(records: dict[int, RankRecord]) -> None:
    waiting = [all_reduce(rank, FOUR, seq=NEXT, step=STEPS, kind="all_to_all_single", bytes=64 * rank) for rank in FOUR]
    assert not found(after(records, waiting, 0.1))


def test_a_collective_left_out_shows_in_the_counts_of_the_steps(records: dict[int, RankRecord]) -> None:
    """Rank 2 leaves the second all-reduce of step 4 out; all later ones are of the same size and go on."""

    def shifted(record: RankRecord) -> RankRecord:
        events = [e for e in record.events if not (e.step == 4 and e.seq == 10)]
        return replace(record, events=tuple(replace(e, seq=e.seq - (e.seq > 10)) for e in events))

    finding = only(JobView({**records, 2: shifted(records[2])}))
    assert (finding.kind, finding.culprits) == (FindingKind.DESYNC, (2,))
    assert not found(JobView(records))


def test_a_rank_that_left_its_order_and_is_waited_for_is_out_of_step(records: dict[int, RankRecord]) -> None:
    """Rank 2 is in a receipt from nobody's send instead of the all-reduce: a circle, and 2 is unlike itself."""
    waiting = [
        *(all_reduce(rank, FOUR, seq=NEXT, step=STEPS) for rank in (0, 1, 3)),
        message(2, "recv", 0, step=STEPS),
    ]
    finding = only(after(records, waiting, 11.0))
    assert finding.kind is FindingKind.DESYNC
    assert finding.culprits[0] == 2


@pytest.mark.parametrize("steps_ago", [1, 2, 3, 4])
def test_who_hangs_soon_after_a_step_in_which_all_did_more_has_left_no_order(
    records: dict[int, RankRecord], steps_ago: int
) -> None:
    """In one step all ranks compare replicas too; rank 2 then hangs, and the others are a step ahead of it."""

    def verified(record: RankRecord) -> RankRecord:
        extra = all_reduce(record.rank, FOUR, seq=1, group="v", step=STEPS - steps_ago, state="ended", end_ns=1)
        return replace(record, events=tuple(sorted((*record.events, extra), key=lambda event: event.step)))

    waiting = [all_reduce(rank, FOUR, seq=NEXT, step=STEPS) for rank in (0, 1, 3)]
    finding = only(after({rank: verified(record) for rank, record in records.items()}, waiting, 11.0))
    assert (finding.kind, finding.culprits) == (FindingKind.HANG, (2,))


def test_what_is_dead_frozen_or_stuck_explains_who_waits(records: dict[int, RankRecord]) -> None:
    waiting = [all_reduce(rank, FOUR, seq=NEXT, step=STEPS) for rank in (0, 1, 3)]
    view = after(records, waiting, 11.0)
    for vitals, kind in (
        (Vitals(rank=2, process_alive=False), FindingKind.CRASH),
        (Vitals(rank=2, report_age_s=60.0), FindingKind.CRASH),
        (Vitals(rank=2, process_state="T"), FindingKind.FREEZE),
        (Vitals(rank=2, native_age_s=0.0, python_age_s=8.0), FindingKind.STUCK),
    ):
        finding = only(with_vitals(view, vitals))
        assert (finding.kind, finding.culprits) == (kind, (2,))


def test_who_died_of_another_is_no_culprit(records: dict[int, RankRecord]) -> None:
    waiting = [all_reduce(rank, FOUR, seq=NEXT, step=STEPS, state="failed") for rank in (0, 1)]
    dead = [Vitals(rank=rank, process_alive=False) for rank in (0, 1, 2)]
    finding = only(with_vitals(after(records, waiting, 0.1), *dead))
    assert (finding.kind, finding.culprits) == (FindingKind.CRASH, (2,))
    assert finding.evidence["ranks of the class"] == 3


def test_who_died_of_another_is_accused_only_once_that_one_had_time_to_go(records: dict[int, RankRecord]) -> None:
    """A machine without a free CPU takes a killed process apart more slowly than its peers die of it."""
    failed = [all_reduce(rank, FOUR, seq=NEXT, step=STEPS, state="failed") for rank in (0, 1, 3)]
    view = after(records, failed, 0.1)

    def gone(age_s: float, *ranks: int) -> JobView:
        return with_vitals(view, *(Vitals(rank=rank, process_alive=False, gone_age_s=age_s) for rank in ranks))

    assert not found(gone(0.1, 0, 3))
    assert only(gone(0.0, 0, 2, 3)).culprits == (2,)
    assert only(gone(0.6, 0, 3)).culprits == (0, 3)
    alone = with_vitals(after(records, [], 0.1), Vitals(rank=1, process_alive=False, gone_age_s=0.0))
    assert only(alone).culprits == (1,), "it died by itself"
    odd = [all_reduce(0, FOUR, seq=NEXT, step=STEPS, kind="broadcast", state="failed")]
    refused = after(records, odd, 0.1)
    assert not found(with_vitals(refused, Vitals(rank=0, process_alive=False, gone_age_s=0.1)))
    late = with_vitals(refused, Vitals(rank=0, process_alive=False, gone_age_s=0.6))
    assert only(late).kind is FindingKind.DESYNC


def test_who_died_of_a_desync_is_no_crash(records: dict[int, RankRecord]) -> None:
    odd = [all_reduce(rank, FOUR, seq=NEXT, step=STEPS, bytes=8 if rank == 3 else 64, state="failed") for rank in FOUR]
    dead = [Vitals(rank=rank, process_alive=False) for rank in FOUR]
    finding = only(with_vitals(after(records, odd, 0.1), *dead))
    assert (finding.kind, finding.culprits) == (FindingKind.DESYNC, (3,))


def test_who_died_of_what_the_backend_refused_has_left_its_order(records: dict[int, RankRecord]) -> None:
    stray = all_reduce(2, FOUR, seq=1, group="stray", step=STEPS, dtype="int16", state="failed")
    rest = [all_reduce(rank, FOUR, seq=NEXT, step=STEPS, state="failed") for rank in (0, 1, 3)]
    dead = [Vitals(rank=rank, process_alive=False) for rank in FOUR]
    for ended in (dead[2:3], dead):
        finding = only(with_vitals(after(records, [stray, *rest], 0.1), *ended))
        assert (finding.kind, finding.culprits) == (FindingKind.DESYNC, (2,))
        assert "rank 2 died of an operation that it never made before" in finding.summary
    # It may as well have failed because another is gone, as the barrier at the end of a run does.
    killed = with_vitals(after(records, [stray], 0.1), dead[1], dead[2])
    assert [(each.kind, each.culprits) for each in found(killed)] == [(FindingKind.CRASH, (1,))]


def test_a_loop_that_stands_without_a_collective_hangs(records: dict[int, RankRecord]) -> None:
    stalled = Vitals(rank=1, python_age_s=0.1, progress_age_s=30.0)
    finding = only(with_vitals(JobView(records), stalled))
    assert (finding.kind, finding.culprits) == (FindingKind.HANG, (1,))


def test_an_operation_that_is_over_for_others_holds_nobody_up(records: dict[int, RankRecord]) -> None:
    """A reduce-scatter that rank 0 has not waited for yet."""
    view = after(records, [all_reduce(rank, FOUR, seq=NEXT, step=STEPS) for rank in FOUR], 11.0)
    done = {
        rank: replace(
            record, events=(*record.events[:-1], replace(record.events[-1], state="ended", end_ns=record.now_ns))
        )
        for rank, record in view.records.items()
        if rank != 0
    }
    assert not found(JobView({**view.records, **done}))


def test_a_job_that_stood_before_is_not_allowed_to_stand_for_longer() -> None:
    stood = Scene(transfer_ms=lambda step: 60_000.0 if step in (7, 19) else 2.0).run(60)
    waiting = [all_reduce(rank, FOUR, seq=121, step=60) for rank in (0, 1, 3)]
    assert only(after(stood, waiting, 11.0)).culprits == (2,)
