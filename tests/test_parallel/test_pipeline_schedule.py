"""Schedules do everything once, in an order without deadlock, with the bubbles and activations that they claim."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.errors import PipelineError
from parallel.pipeline import Action, Costs, Kind, Schedule, build, check, forward_only, num_stages, predict
from parallel.pipeline.messages import Message, gives, needs, neighbours, plan, sender
from parallel.pipeline.schedule import in_flight_bound, most_kept, order

KINDS: tuple[Kind, ...] = get_args(Kind)
times = st.integers(1, 9)


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    kind = draw(st.sampled_from(KINDS))
    num_ranks, per_rank = draw(st.integers(1, 8)), draw(st.integers(2, 4))
    num_micro_batches = draw(st.integers(1, 24))
    if kind == "interleaved":
        num_micro_batches = num_ranks * draw(st.integers(1, 4))
    elif kind == "dualpipev":
        num_micro_batches += 2 * num_ranks - 1
    return build(kind, num_ranks, num_micro_batches, per_rank=per_rank)


@st.composite
def costs_of(draw: st.DrawFn, schedule: Schedule) -> Costs:
    n = schedule.num_stages
    lists = [draw(st.lists(times, min_size=n, max_size=n)) for _ in range(3)]
    return Costs(forward=lists[0], backward_input=lists[1], backward_weight=lists[2], latency=draw(st.integers(0, 3)))


@given(schedules())
def test_every_schedule_is_complete_without_deadlock_and_within_its_bound(schedule: Schedule) -> None:
    check(schedule)


@given(st.data())
def test_a_replay_starts_nothing_before_what_it_needs_and_one_thing_at_a_time(
    data: st.DataObject,
) -> None:
    schedule = data.draw(schedules())
    costs = data.draw(costs_of(schedule))
    found = predict(schedule, costs)
    ends = {action: end for spans in found.spans for action, _, end in spans}
    for rank, spans in enumerate(found.spans):
        for (_, _, before), (_, start, _) in itertools.pairwise(spans):
            assert start >= before
        for action, start, _ in spans:
            message = needs(action, schedule.rank_of)
            if message is not None:
                content, stage, i = message
                source = stage - 1 if content == "input" else stage + 1
                made = [a for a in ends if a.stage == source and a.micro_batch == i and gives(a, schedule.rank_of)]
                assert start >= min(ends[a] for a in made if gives(a, schedule.rank_of) == message) + costs.latency
                assert sender(message, schedule.rank_of) != rank
    assert found.makespan >= max(found.busy)
    assert all(0 <= bubble < 1 for bubble in found.bubble)


@given(schedules(), st.integers(0, 5))
def test_messages_are_posted_in_the_order_of_sending_and_before_they_are_needed(schedule: Schedule, ahead: int) -> None:
    plans = [plan(schedule, rank, ahead) for rank in range(schedule.num_ranks)]
    for rank, made in enumerate(plans):
        posted: list[tuple[int, Message]] = []
        for action, now in zip(schedule.actions[rank], made.receives, strict=True):
            posted += now
            message = needs(action, schedule.rank_of)
            assert message is None or (sender(message, schedule.rank_of), message) in posted
        for peer in {peer for peer, _ in posted}:
            given_ = [gives(action, schedule.rank_of) for action in schedule.actions[peer]]
            sent = [m for m in given_ if m is not None and schedule.rank_of[m.stage] == rank]
            assert [m for source, m in posted if source == peer] == sent
    pairs = {(rank, peer) for rank, made in enumerate(plans) for now in made.receives for peer, _ in now}
    assert {(min(pair), max(pair)) for pair in pairs} == set(neighbours(schedule.rank_of))


@given(schedules())
def test_what_counts_as_settled_was_received_before(schedule: Schedule) -> None:
    position = {entry: index for index, entry in enumerate(order(schedule))}
    for rank in range(schedule.num_ranks):
        for received, settled in plan(schedule, rank, 1).settled.items():
            peer = sender(received, schedule.rank_of)
            (made,) = (a for a in schedule.actions[peer] if gives(a, schedule.rank_of) == received)
            for message in settled:
                (used,) = (a for a in schedule.actions[peer] if needs(a, schedule.rank_of) == message)
                assert position[peer, used] <= position[peer, made]


@given(schedules(), st.integers(1, 10))
def test_forward_only_schedules_are_complete(schedule: Schedule, num_micro_batches: int) -> None:
    check(forward_only(schedule.rank_of, num_micro_batches))


@given(st.sampled_from(["gpipe", "1f1b"]), st.integers(1, 8), st.integers(1, 20), times, times, times)
def test_the_bubble_of_gpipe_and_1f1b_is_that_of_the_formula(
    kind: Kind, p: int, m: int, forward: int, inputs: int, weights: int
) -> None:
    found = predict(build(kind, p, m), Costs.even(p, forward, inputs, weights))
    assert found.makespan == (m + p - 1) * (forward + inputs + weights)


@given(st.integers(1, 8), st.integers(1, 4), st.integers(2, 4), times, times, times)
def test_the_bubble_of_interleaved_is_that_of_the_formula(
    p: int, groups: int, v: int, forward: int, inputs: int, weights: int
) -> None:
    schedule = build("interleaved", p, groups * p, per_rank=v)
    found = predict(schedule, Costs.even(p * v, forward, inputs, weights))
    assert found.makespan - found.busy[0] == (p - 1) * (forward + inputs + weights)  # times of a stage, 1 / v of a rank


@given(st.integers(1, 8), st.integers(0, 12), times, times)
def test_the_bubble_of_zb_h1_is_that_of_the_formula(p: int, more: int, forward: int, weights: int) -> None:
    inputs = max(forward, weights)  # as the paper assumes: no rank then waits for more than the first micro-batch
    found = predict(build("zb-h1", p, 2 * p + more), Costs.even(p, forward, inputs, min(weights, forward)))
    assert found.makespan - found.busy[0] == (p - 1) * (forward + inputs - min(weights, forward))


@given(st.sampled_from(["zbv", "dualpipev"]), st.integers(1, 8), st.integers(0, 12))
def test_the_bubble_of_the_v_schedules_is_a_rank_less_one_forwards_of_a_stage(kind: Kind, p: int, more: int) -> None:
    found = predict(build(kind, p, 2 * p + more), Costs.even(2 * p))
    assert found.makespan - found.busy[0] == p - 1


def test_zero_bubble_schedules_wait_less_and_keep_no_more_than_1f1b() -> None:
    p, m = 4, 12
    plain = predict(build("1f1b", p, m), Costs.even(p))
    late = predict(build("zb-h1", p, m), Costs.even(p))
    halves = replace(Costs.even(2 * p, 0.5, 0.5, 0.5), kept=(0.5,) * 2 * p)
    v = predict(build("zbv", p, m), halves)
    assert v.makespan < late.makespan < plain.makespan
    assert max(v.peak_kept) == max(late.peak_kept) == max(plain.peak_kept) == p


def test_a_rank_keeps_the_bound_of_its_schedule() -> None:
    for kind in KINDS:
        schedule = build(kind, 4, 16)
        most = [most_kept(actions) for actions in schedule.actions]
        assert most == [in_flight_bound(schedule, rank) for rank in range(4)], kind


def test_latency_is_paid_between_ranks_alone() -> None:
    one = predict(build("1f1b", 1, 3), replace(Costs.even(1), latency=5.0))
    two = predict(build("1f1b", 2, 1), replace(Costs.even(2), latency=5.0))
    assert (one.makespan, two.makespan) == (9.0, 2 * 3 + 2 * 5.0)


@pytest.mark.parametrize(
    ("kind", "num_ranks", "m", "per_rank", "message"),
    [
        ("interleaved", 4, 6, 2, "in groups of 4 .pipeline., which does not divide 6; allowed: a multiple of 4"),
        ("interleaved", 4, 8, 1, r"per_rank: 1 stages on a rank leave nothing to interleave; at least 2"),
        ("dualpipev", 3, 5, 2, r"5 micro-batches are too few; at least 6"),
        ("1f1b", 2, 0, 2, "a step of 0 micro-batches has nothing to schedule; at least 1"),
        ("1f1b", 0, 1, 2, r"parallel.pipeline: 0 ranks cannot share the layers"),
        ("2f2b", 2, 2, 2, r"parallel.stages.schedule: there is no '2f2b'; allowed: gpipe, 1f1b"),
    ],
)
def test_numbers_without_a_schedule_are_refused(
    kind: Kind, num_ranks: int, m: int, per_rank: int, message: str
) -> None:
    with pytest.raises(PipelineError, match=message):
        build(kind, num_ranks, m, per_rank=per_rank)


def test_all_reasons_are_given_at_once() -> None:
    with pytest.raises(PipelineError) as error:
        build("interleaved", 2, 3, per_rank=1)
    assert len(str(error.value).splitlines()) == 2


def _swapped(schedule: Schedule, rank: int, first: int, second: int) -> Schedule:
    actions = [list(own) for own in schedule.actions]
    actions[rank][first], actions[rank][second] = actions[rank][second], actions[rank][first]
    return replace(schedule, actions=tuple(map(tuple, actions)))


def test_a_check_finds_what_is_wrong() -> None:
    good = build("1f1b", 2, 2)
    f, b = Action("forward", 0, 0), Action("backward", 0, 0)
    cases = [
        (replace(good, actions=(good.actions[0][1:], good.actions[1])), "micro-batch 0: 0 forwards"),
        (replace(good, actions=((*good.actions[0], b), good.actions[1])), "1 forwards, 2 backwards"),
        (replace(good, actions=((*good.actions[0], f._replace(micro_batch=7)), good.actions[1])), "not there"),
        (replace(good, actions=((*good.actions[0], f._replace(stage=1)), good.actions[1])), "is not its stage"),
        (_swapped(good, 1, 0, 1), "wait for each other: rank 0 at .*; rank 1 at"),
        (replace(good, actions=(good.actions[0], build("gpipe", 2, 2).actions[1])), "rank 1: keeps .* 2 .* at most 1"),
    ]
    for schedule, message in cases:
        with pytest.raises(PipelineError, match=message):
            check(schedule)


def test_costs_of_other_stages_are_refused() -> None:
    with pytest.raises(PipelineError, match="input: 3 numbers for 2 stages; one each\ncosts: backward_weight"):
        predict(build("1f1b", 2, 2), replace(Costs.even(3), kept=(1.0,) * 3))


def test_stages_lie_in_a_loop_or_a_v() -> None:
    assert build("interleaved", 2, 2, per_rank=3).rank_of == (0, 1, 0, 1, 0, 1)
    assert build("zbv", 3, 3).rank_of == (0, 1, 2, 2, 1, 0)
    assert [num_stages(kind, 3, 4) for kind in KINDS] == [3, 3, 12, 3, 6, 6]
