"""A ring can be read whole at any moment, in whatever state its writer is, and says what it lost."""

from __future__ import annotations

import errno
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from faulttol import RankRecord, RingError, probing, read_ring, ring_path
from faulttol.ring import _HEADER_BYTES, _NAMES_BYTES, _RECORD_BYTES, KIND_NUMBERS, Ring, RingReader, remove_rings

# What a record says in several places agrees, so that a reader can see whether they belong together.
SPINNING_RANK = """
import sys, time
from pathlib import Path
from faulttol.ring import KIND_NUMBERS, Ring
ring = Ring(Path(sys.argv[1]), rank=3, world_size=8, capacity=64)
names = ring.number("group", "0", "gloo", (0, 3)), ring.number("dtype", "float32")
phase = ring.number("phase", "train")
while True:
    index = ring.begin(KIND_NUMBERS["all_reduce"], 1000 * (ring.begun + 1), ring.begun + 1, 7, (5, phase), -1, names)
    ring.end(index, 1000 * index + 1, None, failed=False, late=False)
"""


def wait_for(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "waited in vain"
        time.sleep(0.002)


@pytest.fixture
def ring(tmp_path: Path) -> Iterator[Ring]:
    made = Ring(tmp_path / "a.ring", rank=1, world_size=2, generation=3, capacity=16)
    yield made
    made.close()


def begin(ring: Ring, seq: int = 1, kind: str = "all_reduce", peer: int = -1) -> int:
    names = ring.number("group", "0", "gloo", (0, 1)), ring.number("dtype", "float32")
    where = 4, ring.number("phase", "train")
    return ring.begin(KIND_NUMBERS[kind], time.monotonic_ns(), 64, seq, where, peer, names)


def test_what_is_written_is_read(ring: Ring) -> None:
    ring.mark("step_begin", 5, (4, ring.number("phase", "train")), 100, None, None)
    first, second, third = begin(ring), begin(ring, 2), begin(ring, 1, "send", 0)
    ring.end(first, 70, 12, failed=False, late=True)
    ring.end(second, 80, None, failed=True, late=False)
    ring.mark("step_end", 90, (4, ring.number("phase", "train")), None, 2.5, math.inf)
    record = read_ring(ring.path)
    assert (record.rank, record.world_size, record.generation, record.num_lost) == (1, 2, 3, 0)
    one, two, three = record.events
    assert (one.index, one.kind, one.group, one.group_ranks, one.backend) == (first, "all_reduce", "0", (0, 1), "gloo")
    assert (one.seq, one.bytes, one.dtype, one.step, one.phase, one.peer) == (1, 64, "float32", 4, "train", None)
    assert (one.state, one.end_ns, one.device_ns, one.end_is_late) == ("ended", 70, 12, True)
    assert (one.started_ns, one.duration_ns) == (58, 12)
    assert (two.state, two.end_ns, two.device_ns) == ("failed", 80, None)
    assert (three.index, three.state, three.end_ns, three.peer, three.source, three.target) == (
        third,
        "begun",
        None,
        0,
        1,
        0,
    )
    assert [(mark.kind, mark.tokens, mark.loss, mark.grad_norm) for mark in record.marks] == [
        ("step_begin", 100, None, None),
        ("step_end", None, 2.5, math.inf),
    ]
    assert [mark.is_numeric_fault for mark in record.marks] == [False, True]


def test_a_reader_is_told_what_began_and_what_ended_since_and_nothing_twice(ring: Ring) -> None:
    with RingReader(ring.path) as reader:
        first, second = begin(ring), begin(ring, 2)
        assert [(e.index, e.state) for e in reader.poll().events] == [(first, "begun"), (second, "begun")]
        assert not reader.poll().events
        ring.end(first, 9, None, failed=False, late=False)
        third = begin(ring, 3)
        assert [(e.index, e.state) for e in reader.poll().events] == [(first, "ended"), (third, "begun")]


def test_what_was_overwritten_is_counted(ring: Ring) -> None:
    with RingReader(ring.path) as reader:
        for seq in range(1, 5):
            begin(ring, seq)
        assert len(reader.poll().events) == 4
        for seq in range(5, 31):
            ring.end(begin(ring, seq), 1, None, failed=False, late=False)
        record = reader.poll()
    assert [event.seq for event in record.events] == list(range(15, 31))
    assert record.num_lost == 4 + 10, "ends of four that were open, and ten that were never seen"


def test_an_end_that_comes_after_its_record_was_overwritten_harms_nothing(ring: Ring) -> None:
    old = begin(ring)
    for seq in range(2, 19):
        begin(ring, seq)
    ring.end(old, 1, None, failed=False, late=False)
    assert {event.state for event in read_ring(ring.path).events} == {"begun"}


def test_losses_of_the_writer_are_told(ring: Ring) -> None:
    ring.lose()
    assert read_ring(ring.path).num_lost == 1


def test_more_names_than_there_is_room_for_leave_events_nameless(ring: Ring) -> None:
    long = "x" * (_NAMES_BYTES // 2)
    assert ring.number("phase", long) == 1
    assert ring.number("phase", long + "y") == 0
    begin(ring)
    (event,) = read_ring(ring.path).events
    assert event.group == "0"


@pytest.mark.parametrize("stop", [signal.SIGSTOP, signal.SIGKILL])
def test_the_ring_of_a_stopped_or_killed_rank_is_whole(tmp_path: Path, stop: signal.Signals) -> None:
    path = tmp_path / "a.ring"
    with subprocess.Popen([sys.executable, "-c", SPINNING_RANK, str(path)]) as rank:
        try:
            wait_for(path.exists)
            with RingReader(path) as reader:
                wait_for(lambda: reader.num_begun > 1000)
                rank.send_signal(stop)
                record = reader.poll()
                rank.kill()
        finally:
            rank.kill()
    _check(record)


def test_a_reader_beside_a_busy_writer_never_sees_half_a_record(tmp_path: Path) -> None:
    path = tmp_path / "a.ring"
    with subprocess.Popen([sys.executable, "-c", SPINNING_RANK, str(path)]) as rank:
        try:
            wait_for(path.exists)
            with RingReader(path) as reader:
                deadline_s = time.monotonic() + 20
                while reader.num_begun < 64 * 100:  # it goes round and round
                    _check(reader.poll())
                    assert time.monotonic() < deadline_s
        finally:
            rank.kill()


def _check(record: RankRecord) -> None:
    for event in record.events:
        assert (event.begin_ns, event.bytes, event.group_ranks) == (1000 * event.index, event.index, (0, 3))
        assert event.end_ns in (None, 1000 * event.index + 1)


def test_a_damaged_record_is_left_out(ring: Ring) -> None:
    begin(ring), begin(ring, 2)
    with ring.path.open("r+b") as file:
        file.seek(_HEADER_BYTES + _NAMES_BYTES + 10)
        file.write(b"\xff")
    assert [event.seq for event in read_ring(ring.path).events] == [2]


def test_an_end_that_is_torn_leaves_its_begin(ring: Ring) -> None:
    ring.end(begin(ring), 77, None, failed=False, late=False)
    with ring.path.open("r+b") as file:
        file.seek(_HEADER_BYTES + _NAMES_BYTES + _RECORD_BYTES - 20)
        file.write(b"\xff")
    (event,) = read_ring(ring.path).events
    assert (event.state, event.end_ns) == ("begun", None)


@pytest.fixture
def eager_threads() -> Iterator[None]:
    """Threads take turns as often as the interpreter lets them."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def at_once(work: Callable[[], object], num_threads: int = 8) -> None:
    """Do the same in several threads."""
    start = threading.Barrier(num_threads)

    def run() -> None:
        start.wait()
        work()

    threads = [threading.Thread(target=run) for _ in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.usefixtures("eager_threads")
def test_threads_that_name_the_same_at_once_name_it_once(tmp_path: Path) -> None:
    """Else each name after it has the number of another."""
    for attempt in range(40):
        ring = Ring(tmp_path / f"{attempt}.ring", rank=0, world_size=1, capacity=16)
        at_once(lambda ring=ring: ring.number("dtype", "float32"))  # type: ignore[misc]
        begin(ring)
        assert [(event.group, event.phase) for event in read_ring(ring.path).events] == [("0", "train")]
        ring.close()


@pytest.mark.usefixtures("eager_threads")
def test_threads_that_begin_at_once_get_records_of_their_own(tmp_path: Path) -> None:
    ring = Ring(tmp_path / "a.ring", rank=0, world_size=1, capacity=4096)
    for attempt in range(1, 101):  # the last record of each is the one that could be hidden
        at_once(lambda: [begin(ring) for _ in range(5)], 4)
        assert ring.begun == attempt * 20
    assert [event.index for event in read_ring(ring.path).events] == list(range(1, 2001))
    ring.close()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes are no ring"),
        (bytes(8192), "not a ring of this version"),
        (b"faulttol ring 1\n" + bytes(8192), "its header is damaged"),
    ],
)
def test_another_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "other").write_bytes(content)
    with pytest.raises(RingError, match=message):
        read_ring(tmp_path / "other")


def test_a_ring_that_is_cut_short_is_refused(ring: Ring) -> None:
    os.truncate(ring.path, ring.path.stat().st_size - 1)
    with pytest.raises(RingError, match="cut short"):
        read_ring(ring.path)


def test_a_capacity_that_is_too_small_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 16"):
        Ring(tmp_path / "a.ring", rank=0, world_size=1, capacity=3)
    assert not list(tmp_path.iterdir())


def test_who_closed_in_peace_is_told_from_who_did_not(ring: Ring) -> None:
    with RingReader(ring.path) as reader:
        assert not reader.is_closed
        ring.close()
        assert reader.is_closed


def test_a_ring_that_there_is_no_room_for_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, start: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(OSError, match="No space left"):
        Ring(ring_path(tmp_path, 0), rank=0, world_size=1)
    assert not list(tmp_path.iterdir())


def test_rings_of_older_generations_are_removed_and_no_others(tmp_path: Path) -> None:
    for generation in (0, 1, 9, 10, 11):
        ring_path(tmp_path, 0, generation).touch()
        (tmp_path / f"probe.generation{generation}").touch()
        (tmp_path / f"probe.generation{generation}.rank00000.json").touch()
    (tmp_path / "rankless.generation.ring").touch()
    (tmp_path / "rank00001.generation9.ring.new").touch()  # of a rank that was killed while it made it
    remove_rings(tmp_path, before=10)
    probing.remove(tmp_path, before=10)
    assert {path.name for path in tmp_path.iterdir()} == {
        *(f"rank00000.generation{generation}.ring" for generation in (10, 11)),
        *(f"probe.generation{generation}{what}" for generation in (10, 11) for what in ("", ".rank00000.json")),
        "rankless.generation.ring",
    }
