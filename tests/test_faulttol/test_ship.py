"""Events reach any file system in parts, survive what happens on the way, and come back as they were."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from faulttol import RankRecord, read_ring, ring_path
from faulttol.errors import RunError, ShipError
from faulttol.ring import KIND_NUMBERS, Ring
from faulttol.run import records
from faulttol.ship import Convoy, Shipper, shipped
from faulttol.table import EVENTS, MARKS, events_of, events_table, group_ranks, marks_of, marks_table


@pytest.fixture
def ring(tmp_path: Path) -> Iterator[Ring]:
    made = Ring(ring_path(tmp_path / "rings", 1, 2), rank=1, world_size=2, generation=2, capacity=64)
    yield made
    made.close()


def collective(ring: Ring, seq: int, *, ends: bool = True) -> int:
    names = ring.number("group", "0", "gloo", (0, 1)), ring.number("dtype", "float32")
    where = seq, ring.number("phase", "train")
    index = ring.begin(KIND_NUMBERS["all_reduce"], time.monotonic_ns(), 8, seq, where, -1, names)
    if ends:
        ring.end(index, time.monotonic_ns(), None, failed=False, late=False)
    return index


def facts(record: RankRecord) -> tuple[object, ...]:
    return record.rank, record.world_size, record.generation, record.events, record.marks


def test_tables_have_the_schema_and_give_back_what_they_were_made_of(ring: Ring) -> None:
    collective(ring, 1), collective(ring, 2, ends=False)
    ring.mark("step_end", 9, (3, ring.number("phase", "eval")), 5, 1.5, None)
    record = read_ring(ring.path)
    events, marks = events_table(record.events), marks_table(record.marks)
    assert (events.schema, marks.schema) == (EVENTS, MARKS)
    assert tuple(events_of(events, group_ranks(record.events))) == record.events
    assert tuple(marks_of(marks)) == record.marks


@pytest.mark.parametrize("scheme", ["path", "file", "fsspec"])
def test_what_is_shipped_in_parts_comes_back_whole(ring: Ring, tmp_path: Path, scheme: str) -> None:
    target = {
        "path": str(tmp_path / "kept"),
        "file": f"file://{tmp_path}/kept",
        "fsspec": f"fsspec+memory://{tmp_path}",
    }[scheme]
    shipper = Shipper(ring.path, target)
    late = collective(ring, 1, ends=False)
    ring.mark("step_begin", 5, (1, ring.number("phase", "train")), 100, None, None)
    assert shipper.ship() == 2
    assert shipper.ship() == 0
    ring.end(late, time.monotonic_ns(), 7, failed=False, late=True)
    collective(ring, 2)
    shipper.close()
    (record,) = shipped(target)
    assert facts(record) == facts(read_ring(ring.path))
    assert record.num_lost == 0


def test_a_second_shipper_goes_on_where_the_first_left_off(ring: Ring, tmp_path: Path) -> None:
    target = str(tmp_path / "kept")
    first = Shipper(ring.path, target)
    for seq in range(1, 4):
        collective(ring, seq)
    still_open = collective(ring, 4, ends=False)
    collective(ring, 5)
    first.ship()  # and is killed
    ring.end(still_open, time.monotonic_ns(), None, failed=False, late=False)
    collective(ring, 6)
    second = Shipper(ring.path, target)
    assert second.ship() == 3, "the one that was open, and what came after it"
    second.close()
    (record,) = shipped(target)
    assert facts(record) == facts(read_ring(ring.path))


def test_what_cannot_be_written_is_kept_up_to_a_bound_and_what_is_dropped_is_counted(
    ring: Ring, tmp_path: Path
) -> None:
    target = tmp_path / "kept"
    shipper = Shipper(ring.path, str(target), max_rows=3)
    target.write_text("in the way")
    for seq in range(1, 6):
        collective(ring, seq)
    with pytest.raises(OSError):
        shipper.ship()
    target.unlink()
    assert shipper.ship() == 3
    shipper.close()
    (record,) = shipped(str(target))
    assert [event.seq for event in record.events] == [3, 4, 5]
    assert record.num_lost == shipper.num_dropped == 2


@pytest.mark.parametrize("kept", [0.0, 0.2, 0.5, 0.9, 0.99])
def test_a_torn_part_gives_its_whole_batches(
    ring: Ring, tmp_path: Path, kept: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("faulttol.ship._BATCH_ROWS", 4)
    shipper = Shipper(ring.path, str(tmp_path / "kept"))
    for seq in range(1, 33):
        collective(ring, seq)
    shipper.ship()
    (part,) = (tmp_path / "kept").rglob("events-*.arrows")
    content = part.read_bytes()
    part.write_bytes(content[: int(len(content) * kept)])
    found = shipped(str(tmp_path / "kept"))
    seqs = [event.seq for record in found for event in record.events]
    assert seqs == list(range(1, len(seqs) + 1))
    assert len(seqs) % 4 == 0
    assert bool(seqs) == (kept >= 0.5), "what the file is comes first"
    shipper.close()


def test_a_damaged_part_does_not_harm_the_others(ring: Ring, tmp_path: Path) -> None:
    shipper = Shipper(ring.path, str(tmp_path / "kept"))
    for seq in (1, 2):
        collective(ring, seq)
        shipper.ship()
    first, _ = sorted((tmp_path / "kept").rglob("events-*.arrows"))
    first.write_bytes(bytes(100))
    (record,) = shipped(str(tmp_path / "kept"))
    assert [event.seq for event in record.events] == [2]
    shipper.close()


def test_an_end_is_not_replaced_by_a_begin_that_is_read_later(ring: Ring, tmp_path: Path) -> None:
    late = collective(ring, 1, ends=False)
    shipper = Shipper(ring.path, str(tmp_path / "rings"))
    shipper.ship()
    ring.end(late, time.monotonic_ns(), None, failed=False, late=False)
    (record,) = records(tmp_path / "rings")
    assert record.events[0].state == "ended"
    shipper.close()


def test_a_run_of_which_nothing_is_known_is_told(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no rings and no shipped events"):
        records(tmp_path)
    with pytest.raises(RunError, match="no rings and no shipped events"):
        records(tmp_path / "nowhere")


def test_a_generation_that_is_not_there_is_told(ring: Ring, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no generation 7; there are 2"):
        records(tmp_path, 7)
    assert records(tmp_path, 2)[0].generation == 2


def test_a_target_that_no_file_system_knows_is_refused(ring: Ring) -> None:
    with pytest.raises(ShipError, match="no file system"):
        Shipper(ring.path, "nonsense://there")


def test_the_schemas_use_no_type_that_costs_more_than_it_must() -> None:
    assert all(pa.types.is_dictionary(EVENTS.field(name).type) for name in ("kind", "group", "dtype", "phase"))


def test_a_convoy_ships_rings_that_come_later_too_and_all_that_is_left(ring: Ring, tmp_path: Path) -> None:
    target = str(tmp_path / "kept")
    with Convoy(tmp_path / "rings", target, every_s=0.01):
        collective(ring, 1)
        other = Ring(ring_path(tmp_path / "rings", 0, 2), rank=0, world_size=2, generation=2, capacity=64)
        collective(other, 1)
        deadline_s = time.monotonic() + 20
        while len(list((tmp_path / "kept").rglob("events-*.arrows"))) < 2:
            assert time.monotonic() < deadline_s
            time.sleep(0.005)
        collective(other, 2)
    assert [len(record.events) for record in shipped(target)] == [2, 1]
    other.close()


def test_a_convoy_that_cannot_write_says_so_in_the_end(ring: Ring, tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("in the way")
    convoy = Convoy(tmp_path / "rings", str(tmp_path / "kept"), every_s=60.0)
    collective(ring, 1)
    with pytest.raises(OSError):
        convoy.close()
    convoy.close()


def test_a_convoy_lets_go_of_rings_of_older_generations_and_removes_them_if_asked(tmp_path: Path) -> None:
    rings, target = tmp_path / "rings", str(tmp_path / "kept")
    open_rings: list[Ring] = []
    convoy = Convoy(rings, target, every_s=0.01, removes=True)
    for generation in range(4):
        made = Ring(ring_path(rings, 0, generation), rank=0, world_size=1, generation=generation, capacity=64)
        collective(made, 1)
        open_rings.append(made)  # as of a process that died: it is never closed
    there = [ring_path(rings, 0, 2), ring_path(rings, 0, 3)]
    deadline_s = time.monotonic() + 20
    while sorted(rings.glob("*.ring")) != there:
        assert time.monotonic() < deadline_s
        time.sleep(0.005)
    convoy.close()
    assert [(record.generation, len(record.events)) for record in shipped(target)] == [(n, 1) for n in range(4)]
    assert sorted(rings.glob("*.ring")) == there
    for made in open_rings:
        made.close()


def test_a_convoy_goes_on_after_whatever_a_file_system_raises(
    ring: Ring, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raised: list[int] = []
    write = Shipper._write

    def failing(self: Shipper, what: str, rows: object, about: dict[str, object]) -> None:
        if len(raised) < 2:
            raised.append(1)
            raise RuntimeError("503 Slow Down")
        write(self, what, rows, about)

    monkeypatch.setattr(Shipper, "_write", failing)
    collective(ring, 1)
    with Convoy(tmp_path / "rings", str(tmp_path / "kept"), every_s=0.01):
        deadline_s = time.monotonic() + 20
        while not list((tmp_path / "kept").rglob("events-*.arrows")):
            assert time.monotonic() < deadline_s
            time.sleep(0.005)
    raised.clear()
    collective(ring, 2)
    convoy = Convoy(tmp_path / "rings", str(tmp_path / "kept"), every_s=60.0)
    with pytest.raises(ShipError, match="kept: 503 Slow Down"):
        convoy.close()


def test_a_convoy_ships_the_rest_of_a_ring_that_was_removed(ring: Ring, tmp_path: Path) -> None:
    target = str(tmp_path / "kept")
    collective(ring, 1)
    with Convoy(tmp_path / "rings", target, every_s=0.05) as convoy:
        deadline_s = time.monotonic() + 20
        while not list((tmp_path / "kept").rglob("events-*.arrows")):
            assert time.monotonic() < deadline_s
            time.sleep(0.005)
        collective(ring, 2)
        ring.path.unlink()
        while convoy._shippers:
            assert time.monotonic() < deadline_s, "it holds a ring that nobody needs"
            time.sleep(0.005)
    assert [len(record.events) for record in shipped(target)] == [2]


def test_a_convoy_keeps_rings_that_a_folder_does_not_show_for_once(
    ring: Ring, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = str(tmp_path / "kept")
    collective(ring, 1)
    with Convoy(tmp_path / "rings", target, every_s=60.0, removes=True) as convoy:
        convoy._ship()
        with monkeypatch.context() as patch:
            patch.setattr(Path, "rglob", lambda self, pattern: iter(()))
            convoy._ship()
            collective(ring, 2)
            convoy._ship()
        collective(ring, 3)
        monkeypatch.setattr(Path, "rglob", lambda self, pattern: iter(()))  # as it closes, too
    assert ring.path.exists()
    assert [len(record.events) for record in shipped(target)] == [3]
