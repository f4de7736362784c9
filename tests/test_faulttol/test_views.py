"""What people look at says what was recorded: clocks, report, timeline, heat map, live view, dumps, metrics."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import subprocess
import sys
import urllib.request
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from io import StringIO
from pathlib import Path

import pytest

from faulttol import RankRecord, flight, heat, metrics, pace, report, timeline
from faulttol.__main__ import main
from faulttol.clock import offsets
from faulttol.config import DetectorConfig, HealthConfig
from faulttol.ring import KIND_NUMBERS, Ring, ring_path
from faulttol.watch import Watcher, frame, run
from tests.test_faulttol.scenes import MS, Scene, all_reduce, message

CONFIG, HEALTH = DetectorConfig(hang_after_s=1.0), HealthConfig()


def scene(num_steps: int = 40, **changes: object) -> list[RankRecord]:
    """Four ranks, of which rank 2 is slow in the second half."""
    made = Scene(work_ms=lambda rank, step: 20.0 if rank == 2 and step >= num_steps // 2 else 10.0, **changes)  # type: ignore[arg-type]
    return list(made.run(num_steps).values())


def stuck(age_s: float = 5.0) -> list[RankRecord]:
    """All but rank 2 wait in an all-reduce."""
    found = []
    for record in scene():
        now = record.now_ns + round(age_s * 1e9)
        event = all_reduce(record.rank, range(4), seq=99, index=9999, begin_ns=record.now_ns, step=40)
        events = record.events if record.rank == 2 else (*record.events, event)
        found.append(dataclasses.replace(record, events=events, now_ns=now))
    return found


def write_rings(records: Sequence[RankRecord], folder: Path) -> list[Ring]:
    """Write records as rings, which stay open."""
    rings = []
    for record in records:
        ring = Ring(ring_path(folder, record.rank), rank=record.rank, world_size=record.world_size)
        rings.append(ring)
        rows = sorted([*record.events, *record.marks], key=lambda row: row.index)
        for row in rows:
            where = row.step, ring.number("phase", row.phase)
            if not isinstance(row, type(all_reduce(0, [0], seq=1))):
                ring.mark(row.kind, row.at_ns, where, row.tokens, row.loss, row.grad_norm)  # type: ignore[arg-type]
                continue
            names = ring.number("group", row.group, row.backend, row.group_ranks), ring.number("dtype", row.dtype)
            peer = -1 if row.peer is None else row.peer
            index = ring.begin(KIND_NUMBERS[row.kind], row.begin_ns, row.bytes, row.seq, where, peer, names)
            if row.end_ns is not None:
                ring.end(index, row.end_ns, None, failed=False, late=False)
    return rings


# Clocks.


def test_the_offset_of_clocks_is_found_within_its_error() -> None:
    truth = {0: 0.0, 1: 1000.0, 2: -250.0, 3: 3.0}
    for rank, offset in offsets(scene(offsets_ms=truth)).items():
        assert abs(offset.ns + truth[rank] * MS) <= offset.error_ns < 11 * MS


def test_one_shared_clock_is_within_the_error_of_itself() -> None:
    assert all(abs(offset.ns) <= offset.error_ns for offset in offsets(scene()).values())


def test_messages_there_and_back_bound_the_offset_from_both_sides() -> None:
    def record(rank: int, shift: int) -> RankRecord:
        there = message(rank, "send" if rank == 0 else "recv", 1 - rank, index=1, state="ended", begin_ns=0 + shift)
        back = message(rank, "recv" if rank == 0 else "send", 1 - rank, index=2, state="ended", begin_ns=10 + shift)
        events = (dataclasses.replace(there, end_ns=5 + shift), dataclasses.replace(back, end_ns=15 + shift))
        return RankRecord(rank=rank, world_size=2, generation=0, events=events, marks=(), now_ns=20)

    found = offsets([record(0, 0), record(1, 1000)])[1]
    assert abs(found.ns + 1000) <= found.error_ns <= 10


def test_clocks_that_drift_are_told_as_they_are_now() -> None:
    records = []
    for record in scene(200):
        if record.rank == 1:  # loses 30 ms in all, much more than a step's bounds are wide
            events = tuple(
                dataclasses.replace(
                    e, begin_ns=e.begin_ns - 150_000 * e.step, end_ns=(e.end_ns or 0) - 150_000 * e.step
                )
                for e in record.events
            )
            record = dataclasses.replace(record, events=events)
        records.append(record)
    found = offsets(records)[1]
    assert abs(found.ns - 150_000 * 199) <= found.error_ns + 2 * MS < 15 * MS


def test_ranks_that_nothing_ties_together_have_no_offset() -> None:
    alone = [dataclasses.replace(record, events=()) for record in scene()]
    assert offsets(alone)[0].error_ns == 0
    assert math.isinf(offsets(alone)[1].error_ns)
    assert offsets([]) == {}


# Where time goes.


def test_own_time_is_what_is_outside_of_collectives() -> None:
    times = {(time.rank, time.step): time for record in scene() for time in pace.step_times(record)}
    assert times[0, 3].own_ns == times[2, 3].own_ns == 10 * MS
    assert (times[0, 30].own_ns, times[2, 30].own_ns) == (10 * MS, 20 * MS)
    assert (times[0, 30].inside_ns, times[2, 30].inside_ns) == (12 * MS, 2 * MS)
    ratios = pace.excess(scene())
    assert (ratios[2, 30], ratios[1, 30]) == (2.0, 1.0)


def test_the_report_names_the_slow_rank_and_when_it_was() -> None:
    said = report.text(scene(96), CONFIG, HEALTH)
    assert re.search(r"straggler: .*rank 2.*\(seen at steps? [6-9]\d", said), said
    assert re.search(r"^2 +\d+ +\d+\.\d\d +\d+\.\d\d +(1|2)\.\d\d", said, re.MULTILINE), said
    assert "NOT ENDED" not in said


def test_the_report_of_a_hang_names_who_did_not_come_and_shows_who_waits() -> None:
    said = report.text(stuck(), CONFIG, HEALTH)
    assert re.search(r"hang: .*rank 2", said), said
    assert len(re.findall(r"^rank \d +all_reduce +0 +99 +- +40 +begun +5\.000", said, re.MULTILINE)) == 3, said


def test_the_report_says_which_ranks_are_missing() -> None:
    assert "nothing of rank 1, 3" in report.text([scene()[0], scene()[2]], CONFIG, HEALTH)


# Pictures.


def test_the_timeline_has_every_event_and_arrows_from_the_last_who_came() -> None:
    rows = timeline.trace(scene(8))["traceEvents"]
    assert json.loads(json.dumps(rows)) == rows
    slices = [row for row in rows if row["ph"] == "X" and row["name"] == "all_reduce"]
    assert len(slices) == 4 * 8 * 2
    assert all(row["dur"] >= 0 and row["ts"] >= 0 for row in slices)
    tracks = {(row["pid"], row["tid"]): row["args"]["name"] for row in rows if row["name"] == "thread_name"}
    assert {tracks[row["pid"], row["tid"]] for row in slices} == {"group 0"}
    begun, ended = ([row for row in rows if row["ph"] == phase] for phase in "sf")
    assert [row["id"] for row in begun] == [row["id"] for row in ended]
    assert len({row["id"] for row in begun}) == len(begun) == 8 * 2 * 3
    causes = [row["pid"] for row in sorted(begun, key=lambda row: float(row["ts"]))]
    assert causes[-6:-3] == [2, 2, 2], "the first all-reduce of the last step"
    for arrow in begun + ended:  # viewers draw an arrow only from and to a slice that holds its end
        own = (row for row in slices if (row["pid"], row["tid"]) == (arrow["pid"], arrow["tid"]))
        assert any(row["ts"] <= arrow["ts"] <= row["ts"] + row["dur"] + 1e-3 for row in own)


def test_arrows_lead_only_to_who_waited() -> None:
    """Of a broadcast nobody waits for its receivers, of a reduction to a root nobody but the root waits."""
    times = {  # ms after the last step: begin and end, by rank
        "broadcast": {0: (1, 2), 1: (1, 5), 2: (9, 10), 3: (0, 3)},
        "reduce": {0: (15, 22), 1: (11, 12), 2: (20, 21), 3: (11, 13)},
    }
    records = []
    for record in scene(8):
        more = [
            all_reduce(record.rank, range(4), seq=90 + place, index=900 + place, kind=kind, peer=0, state="ended")
            for place, kind in enumerate(times)
        ]
        more = [
            dataclasses.replace(event, begin_ns=record.now_ns + begin * MS, end_ns=record.now_ns + end * MS)
            for event, (begin, end) in zip(more, (of_ranks[record.rank] for of_ranks in times.values()), strict=True)
        ]
        events = (*record.events, *more)
        records.append(dataclasses.replace(record, events=events, now_ns=record.now_ns + 30 * MS))
    rows = timeline.trace(records)["traceEvents"]
    begun, ended = ({row["id"]: row for row in rows if row["ph"] == phase} for phase in "sf")
    assert all(row["ts"] <= ended[key]["ts"] for key, row in begun.items())
    last = max(row["ts"] for row in rows if row["ph"] == "X" and row["name"] == "all_reduce")
    arrows = [(row["pid"], ended[key]["pid"]) for key, row in begun.items() if row["ts"] > last]
    assert sorted(arrows) == [(0, 1), (0, 2), (0, 3), (2, 0)]


def test_the_timeline_puts_ranks_of_other_clocks_beside_each_other() -> None:
    rows = timeline.trace(scene(8, offsets_ms={1: 60_000.0}))["traceEvents"]
    ends = {row["pid"]: row["ts"] for row in rows if row["ph"] == "X" and row["name"] == "all_reduce"}
    assert max(ends.values()) - min(ends.values()) < 25_000, "us, of an hour apart"


def test_what_is_open_goes_on_to_the_end_of_the_timeline() -> None:
    rows = [row for row in timeline.trace(stuck())["traceEvents"] if row["name"] == "all_reduce (open)"]
    assert {row["pid"] for row in rows} == {0, 1, 3}
    assert all(row["dur"] == pytest.approx(5e6) for row in rows)


def test_the_heat_map_is_well_formed_and_dark_where_a_rank_is_slow() -> None:
    page = heat.page(scene(), "a run <of> mine")
    assert "a run &lt;of&gt; mine" in page
    assert not re.search(r"https?://|<script|url\(", page), "one file, nothing fetched"
    own, inside = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    cells = {}
    for cell in ElementTree.fromstring(own).iter("rect"):
        told = cell.findtext("title") or ""
        rank, step = re.findall(r"\d+", told)[:2]
        cells[int(rank), int(step)] = cell.get("fill")
    assert len(cells) == 4 * 40
    low, high = cells[0, 0], cells[2, 39]
    assert low != high
    assert {place for place, fill in cells.items() if fill == high} == {(2, step) for step in range(20, 40)}
    ElementTree.fromstring(inside)


def test_a_long_run_has_as_many_columns_as_a_page_is_wide() -> None:
    own = re.findall(r"<svg.*?</svg>", heat.page(scene(500), "long"), re.DOTALL)[0]
    assert len(list(ElementTree.fromstring(own).iter("rect"))) == 4 * 100
    assert "steps 5 to 9" in own


def test_a_run_without_steps_or_messages_has_a_page_that_says_so() -> None:
    assert "nothing to compare" in heat.page([dataclasses.replace(scene()[0], events=(), marks=())], "empty")


# Live.


def test_the_live_view_shows_what_ranks_wait_in_and_what_is_wrong(tmp_path: Path) -> None:
    rings = write_rings(stuck(), tmp_path)
    out = StringIO()
    with Watcher(tmp_path, CONFIG, HEALTH) as watcher:
        run(watcher, out, 0.0, once=True)
    for ring in rings:
        ring.close()
    said = out.getvalue()
    assert len(re.findall(r"^[013] .* all_reduce 0#99 for ", said, re.MULTILINE)) == 3, said
    assert re.search(r"^hang: .*rank 2", said, re.MULTILINE), said
    assert "\x1b" not in said


def test_the_live_view_follows_the_newest_generation(tmp_path: Path) -> None:
    old, new = (Ring(ring_path(tmp_path, 0, g), rank=0, world_size=1, generation=g) for g in (0, 1))
    with Watcher(tmp_path, CONFIG, HEALTH) as watcher:
        new.mark("step_begin", 1, (7, new.number("phase", "train")), None, None, None)
        view, signs, found = watcher.look()
        assert view.records[0].marks[-1].step == 7
        assert "\x1b[31m" not in frame(view, signs, found, colours=True)
        assert "nothing is wrong" in frame(view, signs, found, colours=False)
        old.close()
        new.close()
        said = frame(*watcher.look(), colours=False)
        assert "faulttol report` tells how the run ended" in said
        assert "nothing is wrong" not in said


# Dumps.


def analyse(folder: Path) -> str:
    command = [sys.executable, "-m", "torch.distributed.flight_recorder.fr_trace", str(folder), "-v"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_torchs_analyser_reads_dumps_of_gloo_and_names_the_rank_that_did_not_come(tmp_path: Path) -> None:
    whole = []
    for record in stuck():
        peer = record.rank ^ 1
        kind = "send" if record.rank % 2 == 0 else "recv"
        sent = message(record.rank, kind, peer, index=5000, state="ended", end_ns=2, begin_ns=1)
        whole.append(
            dataclasses.replace(record, events=(*record.events[6 * record.rank :], sent))
        )  # older ones are lost
    flight.dump(whole, tmp_path)
    said = analyse(tmp_path)
    assert "Not all ranks joining collective, sequence number: 99" in said
    assert "missing ranks: {2}" in said
    assert said.count("Not all ranks joining") == 1, said


def test_every_kind_has_a_name_that_torchs_analyser_knows() -> None:
    from torch.distributed.flight_recorder.components.types import COLLECTIVES

    from faulttol.events import KINDS, MESSAGES

    assert set(flight._NAMES) == set(KINDS) - MESSAGES
    assert set(flight._NAMES.values()) <= COLLECTIVES


# Metrics.


def test_metrics_count_what_ended_and_tell_what_is_open(tmp_path: Path) -> None:
    rings = write_rings(stuck(), tmp_path)
    with metrics.Metrics(tmp_path) as counted, metrics.serve(counted, 0) as port:
        for _ in range(2):  # a second look counts nothing twice
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as answer:
                said = answer.read().decode()
        counted.write(tmp_path / "faulttol.prom")
    for ring in rings:
        ring.close()
    labels = 'rank="1",generation="0"'
    assert f'faulttol_collectives_total{{{labels},kind="all_reduce",group="0"}} 80\n' in said
    assert f'faulttol_collective_bytes_total{{{labels},kind="all_reduce",group="0"}} {80 << 20}\n' in said
    assert f"faulttol_open_collectives{{{labels}}} 1\n" in said
    assert f"faulttol_step{{{labels}}} 40\n" in said
    assert (tmp_path / "faulttol.prom").read_text().count("\n") == said.count("\n")
    for line in said.splitlines():
        assert re.fullmatch(r"# (HELP|TYPE) faulttol_\w+ .+|faulttol_\w+\{[^}]*\} -?[0-9.e+-]+", line), line


# The command line.


def test_every_command_works_on_rings_and_on_what_was_shipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for ring in write_rings(scene(8), tmp_path / "rings"):
        ring.close()
    rings, kept = str(tmp_path / "rings"), str(tmp_path / "kept")
    assert main(["ship", rings, kept, "--once"]) == 0
    for place in (rings, kept):
        assert main(["report", place]) == 0
        assert main(["timeline", place, str(tmp_path / "trace.json")]) == 0
        assert main(["heat", place, str(tmp_path / "heat.html")]) == 0
        assert main(["flight", place, str(tmp_path / "flight")]) == 0
    assert len(json.loads((tmp_path / "trace.json").read_text())["traceEvents"]) > 64
    assert main(["watch", rings, "--once"]) == 0
    assert main(["metrics", rings, "--once", "--file", str(tmp_path / "a.prom")]) == 0
    assert "4 of 4 ranks" in capsys.readouterr().out


def test_a_report_of_a_fault_has_exit_code_1_and_one_of_nothing_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for ring in write_rings(stuck(), tmp_path / "rings"):
        ring.close()
    # The last line was cut off by a kill.
    line = {"generation": 1, "step": 7, "losses": [], "decision": "go on with 4 ranks", "after_s": {"rejoined": 0.25}}
    (tmp_path / "rings" / "recoveries.jsonl").write_text(
        json.dumps(line) + '\n{"generation": 2, "st'
    )  # a kill cut it off
    assert main(["report", str(tmp_path / "rings"), "--hang-after", "1"]) == 1
    told = "step 7: the ranks lost one another -> generation 1, after 0.25 s: go on with 4 ranks\n"
    assert capsys.readouterr().out.endswith(told)
    assert main(["report", str(tmp_path / "nothing")]) == 2
    assert "no rings and no shipped events" in capsys.readouterr().err
    assert main(["watch", str(tmp_path / "nothing"), "--once"]) == 2
