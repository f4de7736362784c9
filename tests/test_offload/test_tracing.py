"""Spans add up to what a step did, what hid under it and what it waited for; the trace opens in Chrome."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest

from offload import CpuTier
from offload.tracing import COMPUTE, STALL, Trace, memory_peaks, merged, shared_s
from tests.contracts.tier import spec


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.at_s = 0.0

    def __call__(self) -> float:
        return self.at_s


def test_a_step_tells_phases_stalls_bytes_and_what_was_hidden() -> None:
    clock = Clock()
    trace = Trace(now_s=clock)
    with CpuTier(spec()) as tier:
        tier.allocate(1000)
        trace.watch(tier)
        trace.add("forward", COMPUTE, 0.0, 2.0)
        trace.add("backward", COMPUTE, 2.0, 6.0)
        trace.add("t", STALL, 5.0, 6.0)
        trace.add("layer 1", "cpu to gpu", 1.0, 3.0, 500)
        trace.add("layer 2", "cpu to gpu", 2.0, 4.0, 500)  # at once with the first
        trace.add("layer 3", "nvme write", 5.0, 9.0, 70)
        clock.at_s = 10.0
        first = trace.step()
        trace.add("forward", COMPUTE, 10.0, 11.0)
        clock.at_s = 11.0
        second = trace.step()
    assert first.phases_s == {"forward": 2.0, "backward": 4.0}
    assert first.stalls_s == {"t": 1.0}
    assert first.moved_bytes == {"cpu to gpu": 1000, "nvme write": 70}
    assert first.busy_s == {"cpu to gpu": 3.0, "nvme write": 4.0}
    assert first.hidden == {"cpu to gpu": 1.0, "nvme write": 0.0}  # the second from 5 to 6, which was waited for
    assert first.held_bytes == {"t": 1024}
    assert (first.wall_s, second.wall_s, second.index) == (10.0, 1.0, 1)
    assert second.phases_s == {"forward": 1.0}
    assert not second.moved_bytes
    assert trace.records == (first, second)


def test_a_span_is_recorded_when_its_block_raises() -> None:
    clock = Clock()
    trace = Trace(now_s=clock)

    def fail() -> None:
        with trace.span("forward", COMPUTE):
            clock.at_s = 3.0
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [(span.name, span.end_s) for span in trace.spans] == [("forward", 3.0)]


def test_the_chrome_trace_has_a_named_row_a_lane(tmp_path: Path) -> None:
    clock = Clock()
    clock.at_s = 100.0
    trace = Trace(now_s=clock)
    trace.add("layer 0", "cpu to gpu", 100.5, 101.0, 8)
    trace.add("forward", COMPUTE, 100.0, 102.0)
    trace.write(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    rows = {event["args"]["name"]: event["tid"] for event in events if event["name"] == "thread_name"}
    assert list(rows) == [COMPUTE, STALL, "cpu to gpu"]
    (transfer,) = (event for event in events if event["ph"] == "X" and event["tid"] == rows["cpu to gpu"])
    assert (transfer["ts"], transfer["dur"], transfer["args"]) == (0.5e6, 0.5e6, {"bytes": 8})


def test_old_spans_are_dropped_and_the_step_still_adds_up() -> None:
    trace = Trace(now_s=Clock(), max_spans=2)
    for index in range(5):
        trace.add(f"{index}", "cpu to gpu", 0.0, 1.0, 1)
    assert [span.name for span in trace.spans] == ["3", "4"]
    assert trace.step().moved_bytes == {"cpu to gpu": 5}


def test_intervals_merge_and_meet() -> None:
    assert merged([(3, 4), (0, 1), (1, 2), (3.5, 3.6)]) == [(0, 2), (3, 4)]
    assert shared_s([(0, 2), (3, 4)], [(1, 3.5)]) == 1.5
    assert shared_s([], [(1, 3.5)]) == 0.0


def test_the_peak_of_memory_is_the_one_that_the_kernel_charges() -> None:
    charged = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    assert memory_peaks()["rss_bytes"] == pytest.approx(charged, rel=0.05)
