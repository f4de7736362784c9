"""Plans and predictions: pure, so tried on hundreds of machines and models."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.bench import iteration
from offload.errors import SpecError
from offload.rounds import Backlog, Round, Task, Verdict
from offload.schedule import STATE_BYTES, Budget, Mode, Rates, Subgroup, cut, plan, predict
from offload.schedule import Path as Way

_H200 = Rates(cpu=5.0e9, device=1.2e11, up=55e9, down=55e9, both=101e9)
_MODES: tuple[Mode, ...] = get_args(Mode)


@given(
    groups=st.lists(st.lists(st.integers(0, 50), min_size=1, max_size=6), min_size=1, max_size=3),
    numel=st.integers(1, 40),
)
@settings(deadline=None, max_examples=300)
def test_subgroups_cover_every_element_once_and_keep_to_one_group(groups: list[list[int]], numel: int) -> None:
    subgroups = cut(groups, numel)
    sizes = [size for group in groups for size in group]
    group_of = [index for index, group in enumerate(groups) for _ in group]
    seen: dict[int, list[tuple[int, int]]] = {}
    for position, subgroup in enumerate(subgroups):
        assert subgroup.index == position
        assert 0 < subgroup.count <= numel
        offset = 0
        for piece in subgroup.pieces:
            assert piece.offset == offset
            assert group_of[piece.parameter] == subgroup.group
            offset += piece.count
            seen.setdefault(piece.parameter, []).append((piece.start, piece.count))
        assert offset == subgroup.count
    for number, size in enumerate(sizes):
        parts = sorted(seen.get(number, []))
        assert sum(count for _, count in parts) == size
        assert all(start + count == after for (start, count), (after, _) in pairwise(parts))
    firsts = [(group.pieces[0].parameter, group.pieces[0].start) for group in subgroups]
    assert firsts == sorted(firsts)


def test_the_last_subgroups_of_a_group_alone_are_short() -> None:
    subgroups = cut([[100, 100], [30]], 64)
    assert [group.count for group in subgroups] == [64, 64, 64, 8, 30]


@pytest.mark.parametrize("interleave", [1, 2, 3, 4])
def test_every_kth_subgroup_is_streamed(interleave: int) -> None:
    found = plan([10] * 12, None, interleave=interleave, budget=Budget(device_bytes=3 * 120))
    streamed = [index for index, path in enumerate(found.paths) if path == "stream"]
    assert streamed == list(range(interleave - 1, 12, interleave))
    assert found.num_slots == 3


def test_the_first_are_resident_the_last_in_the_tier_and_the_budget_is_kept() -> None:
    random.seed(0)
    for _ in range(300):
        counts = [random.randint(1, 1000) for _ in range(random.randint(1, 40))]
        budget = Budget(
            device_bytes=random.randint(0, STATE_BYTES * sum(counts)),
            host_bytes=random.choice([None, random.randint(0, STATE_BYTES * sum(counts))]),
            num_slots=random.randint(1, 4),
        )
        found = plan(counts, _H200, interleave=random.choice(["auto", "cpu"]), budget=budget)
        paths = found.paths
        num_resident = paths.count("resident")
        assert all(path == "resident" for path in paths[:num_resident])
        on_device = STATE_BYTES * (sum(counts[:num_resident]) + found.num_slots * max(counts))
        assert on_device <= budget.device_bytes or not found.num_slots
        on_host = sum(STATE_BYTES * c for c, path in zip(counts, paths, strict=True) if path in ("cpu", "stream"))
        assert budget.host_bytes is None or on_host <= budget.host_bytes
        if "tier" in paths:
            assert all(path in ("tier", "cpu", "stream") for path in paths[paths.index("tier") :])


def test_auto_shares_by_the_rates_so_that_both_end_at_once() -> None:
    random.seed(1)
    for _ in range(200):
        rates = Rates(
            cpu=random.uniform(1e8, 1e10),
            device=1e11,
            up=random.uniform(5e9, 1e11),
            down=random.uniform(5e9, 1e11),
            both=random.uniform(5e9, 1.5e11),
            cpu_beside=random.uniform(1e8, 1e10),
            stream_beside=random.uniform(1e8, 1e10),
        )
        counts = [1_000_000] * 200
        found = plan(counts, rates, budget=Budget(device_bytes=3 * STATE_BYTES * 1_000_000))
        cpu, stream = rates.beside
        cpu_s = 1e6 * found.paths.count("cpu") / cpu
        stream_s = 1e6 * found.paths.count("stream") / stream
        assert abs(cpu_s - stream_s) <= 1e6 / min(cpu, stream) + 1e-9


def test_on_an_h200_auto_streams_about_two_fifths() -> None:
    counts = [1 << 24] * 122
    found = plan(counts, _H200, budget=Budget(device_bytes=1900 << 20))
    streamed = found.paths.count("stream") / 122
    assert 0.3 < streamed < 0.45
    assert found.paths.count("resident") == 6


@pytest.mark.parametrize("mode", _MODES)
def test_a_step_takes_no_less_than_its_parts_and_no_more_than_their_sum(mode: Mode) -> None:
    random.seed(2)
    for _ in range(200):
        counts = [random.randint(1, 100) * 10_000 for _ in range(random.randint(1, 60))]
        rates = Rates(cpu=random.uniform(1e8, 1e10), device=1e11, up=5e10, down=5e10, both=random.uniform(5e10, 1e11))
        forward_s, backward_s = random.uniform(0.001, 0.3), random.uniform(0.001, 0.6)
        device_bytes = random.randint(0, STATE_BYTES * sum(counts))
        paths = plan(counts, rates, budget=Budget(device_bytes=device_bytes)).paths
        told = predict(counts, paths, rates, forward_s=forward_s, backward_s=backward_s, mode=mode)
        busy_s = max(told.busy_s.values())
        lag_s = 2 * sum(counts) / rates.up
        assert told.step_s >= max(forward_s + backward_s, busy_s) - 1e-9
        assert told.step_s <= forward_s + backward_s + sum(told.busy_s.values()) + lag_s + 1e-9
        assert told.exposed_s == pytest.approx(told.step_s - forward_s - backward_s)


def test_earlier_starts_never_take_longer() -> None:
    random.seed(3)
    for _ in range(200):
        counts = [1_000_000] * random.randint(2, 60)
        rates = Rates(cpu=random.uniform(1e8, 1e10), device=1e11, up=5e10, down=5e10, both=1e11)
        paths = plan(counts, rates, interleave="cpu", budget=Budget(device_bytes=0)).paths
        times = [
            predict(counts, paths, rates, forward_s=0.05, backward_s=0.15, mode=mode).step_s
            for mode in ("sync", "defer", "stream")
        ]
        assert times[0] >= times[1] - 1e-9
        assert times[1] >= times[2] - 1e-9


def test_a_slow_update_is_hidden_as_far_as_there_is_time() -> None:
    counts = [1_000_000] * 100
    rates = Rates(cpu=1e9, device=1e11, up=1e12, down=1e12, both=2e12)  # 0.1 s of updates
    paths = ("cpu",) * 100

    def step_s(mode: Mode, forward_s: float, backward_s: float) -> float:
        return predict(counts, paths, rates, forward_s=forward_s, backward_s=backward_s, mode=mode).step_s

    assert step_s("sync", 0.2, 0.4) == pytest.approx(0.7, rel=0.01)
    assert step_s("defer", 0.2, 0.4) == pytest.approx(0.6, rel=0.01)
    assert step_s("stream", 0.0, 0.4) == pytest.approx(0.4, rel=0.01)
    assert step_s("defer", 0.01, 0.4) == pytest.approx(0.5, rel=0.01)


def test_rates_and_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(SpecError, match=r"cpu: 0; above 0(.|\n)*up: -1"):
        Rates(cpu=0, device=1, up=-1, down=1, both=1)
    with pytest.raises(SpecError, match="interleave: 0"):
        plan([1], None, interleave=0)
    with pytest.raises(SpecError, match="needs measured rates"):
        plan([1], None)
    with pytest.raises(SpecError, match="device_bytes: 10; a subgroup on its way through the device takes 1200"):
        plan([100], None, interleave=1, budget=Budget(device_bytes=10))
    with pytest.raises(SpecError, match="subgroup_numel: 0"):
        cut([[1]], 0)


def test_a_tier_is_as_fast_as_its_reads_and_writes_together() -> None:
    rates = Rates(cpu=5e9, device=1e11, up=5e10, down=5e10, both=1e11, tier_read=2e9, tier_write=1e9)
    assert rates.tier == pytest.approx(1 / (12 / 2e9 + 12 / 1e9))
    assert math.isinf(_H200.tier_read)
    assert _H200.tier == pytest.approx(_H200.cpu)


def test_what_the_cpu_updates_takes_its_part_of_the_link() -> None:
    rates = Rates(cpu=5e9, device=1e11, up=5e10, down=5e10, both=1e11, cpu_beside=3e9)
    assert rates.beside == (3e9, pytest.approx((5e10 - 2 * 3e9) / 12))
    assert replace(rates, stream_beside=3.5e9).beside == (3e9, 3.5e9)  # measured with it
    assert replace(rates, cpu_beside=30e9).beside[1] == pytest.approx(0.1 * 5e10 / 12)


def test_what_was_recorded_on_an_h200_is_told_within_15_percent() -> None:
    record = json.loads((Path(iteration.__file__).parent / "results" / "iteration-h200.json").read_text())
    rates = Rates(**{bound["metric"]: bound["value"] for bound in record["bounds"]})
    seconds = {(row["case"], row["metric"]): row["median"] for row in record["results"]}
    counts = [1 << 24] * 122 + [8_500_000]
    found = plan(counts, rates, budget=Budget(device_bytes=1900 << 20))
    assert found.reason in str(record["parameters"]["notes"])
    cases: list[tuple[str, Mode]] = [("defer clip", "defer"), ("stream", "stream")]
    for tokens in (8192, 32768, 65536):
        forward_s, backward_s = (seconds[f"resident clip {tokens}", phase] for phase in ("forward", "backward"))
        for case, mode in [*cases, *([("defer", cases[0][1])] if tokens == 8192 else [])]:
            streamed = [index for index, path in enumerate(found.paths) if path == "stream"]
            early = round(seconds[f"tiered {case} {tokens}", "came early"] / (1 << 24))
            told = predict(
                counts,
                found.paths,
                rates,
                forward_s=forward_s,
                backward_s=backward_s,
                mode=mode,
                prefetched=set(streamed[len(streamed) - early :]),  # whose gradients come first
            )
            measured_s = seconds[f"tiered {case} {tokens}", "iteration"]
            assert told.step_s == pytest.approx(measured_s, rel=0.15), (case, tokens)


class _Coming:
    """A gradient on its way."""

    def __init__(self, *, is_there: bool) -> None:
        self.is_there = is_there

    def wait(self) -> None: ...

    def done(self) -> bool:
        return self.is_there


def _backlog(mode: Mode, paths: Sequence[Way], *, arrived: int) -> tuple[Backlog, Round, list[_Coming]]:
    """Return a backlog of one task a path, of which the gradients of the last `arrived` are there."""
    coming = [_Coming(is_there=index >= len(paths) - arrived) for index in range(len(paths))]
    tasks = [Task(Subgroup(index, 0, index, 1, ()), path, tickets=[coming[index]]) for index, path in enumerate(paths)]
    round_ = Round(tasks, speculates=mode == "spec", is_early=mode in ("stream", "spec"), has_stepped=True)
    backlog = Backlog()
    for task in tasks:
        backlog.put(round_, task)
    return backlog, round_, coming


def _order(backlog: Backlog) -> list[int]:
    """Take everything; return the subgroups in the order in which it came."""
    return [taken[1].index for taken in iter(lambda: backlog.take(wait=False), None)]


def test_early_updates_take_what_is_there_and_then_what_comes_next() -> None:
    """Also once the step was asked for, which the host does long before the device has all gradients."""
    backlog, round_, coming = _backlog("stream", ["cpu"] * 6, arrived=3)
    round_.verdict.set_result(Verdict(1.0))
    assert [task.index for task in backlog.upcoming()] == [3, 4, 5, 2, 1, 0]
    taken = backlog.take(wait=False)
    assert taken is not None
    assert taken[1].index == 3
    coming[2].is_there = True
    assert _order(backlog) == [2, 4, 5, 1, 0]


def test_speculation_leaves_what_needs_the_verdict_to_the_end() -> None:
    paths: list[Way] = ["resident", "cpu", "cpu", "tier"]
    backlog, _, _ = _backlog("spec", paths, arrived=4)
    assert _order(backlog) == [1, 2, 0, 3]
    backlog, round_, _ = _backlog("spec", paths, arrived=4)
    round_.verdict.set_result(Verdict(1.0))
    assert _order(backlog) == [0, 1, 2, 3]


def test_deferred_updates_are_in_the_order_of_the_next_forward() -> None:
    assert _order(_backlog("defer", ["cpu"] * 4, arrived=1)[0]) == [0, 1, 2, 3]
