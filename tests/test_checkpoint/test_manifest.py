"""The slice table and the commit record: what is written comes back, and nothing malformed gets through."""

from __future__ import annotations

import contextlib
import dataclasses
import json

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoint import CorruptCheckpoint, SaveFailed, UnsupportedFormat
from checkpoint.commit import Agreement
from checkpoint.errors import CheckpointError
from checkpoint.format import chunk_count
from checkpoint.manifest import SHARED, CommitRecord, FileRecord, SavedSlice, SliceTable, TableForm
from checkpoint.region import Region
from tests.test_checkpoint.test_region import regions, shapes


@st.composite
def slices(draw: st.DrawFn) -> SavedSlice:
    """A row that makes sense by itself."""
    shape = draw(shapes)
    region = draw(regions(shape))
    count = chunk_count(region.numel * 4)
    return SavedSlice(
        name=draw(st.text(min_size=1)),
        owner=draw(st.integers(SHARED, 3)),
        dtype="F32",
        global_shape=shape,
        region=region,
        file="r00000.safetensors",
        byte_start=draw(st.integers(0, 2**62)),
        digests=tuple(draw(st.lists(st.integers(0, 2**64 - 1), min_size=count, max_size=count))),
    )


@given(st.lists(slices(), max_size=6))
def test_rows_come_back_by_name(rows: list[SavedSlice]):
    table = SliceTable.from_bytes(SliceTable.of(rows, {"rank": 1}).to_bytes(), "t")
    assert table.all_rows() == rows
    assert table.metadata["rank"] == 1
    assert set(table.keys()) == {(row.name, row.owner) for row in rows}
    for row in rows:
        assert table.rows(row.name, row.owner) == [
            other for other in rows if (other.name, other.owner) == (row.name, row.owner)
        ]


@given(st.lists(slices(), max_size=6), st.integers(1, 3))
def test_a_form_filled_with_digests_is_the_table_of_the_same_rows(rows: list[SavedSlice], num_names: int):
    named = [[dataclasses.replace(row, name=f"{row.name}{i}") for i in range(num_names)] for row in rows]
    form = TableForm([[dataclasses.replace(row, digests=()) for row in names] for names in named])
    for change in (0, 1):  # once made, it serves every save
        changed = [
            [dataclasses.replace(row, digests=tuple(d ^ change for d in row.digests)) for row in names]
            for names in named
        ]
        filled = form.filled([digest for names in changed for digest in names[0].digests])
        expected = [row for names in changed for row in names]
        assert filled.all_rows() == expected
        assert filled.to_bytes() == SliceTable.of(expected, {}).to_bytes()


def test_a_form_refuses_digests_that_are_not_as_many_as_its_chunks():
    with pytest.raises(AssertionError, match="2 digests for 1 chunks"):
        TableForm([[ROW]]).filled([1, 2])


def test_votes_are_looked_into_whenever_more_than_digests_changed():
    whole = dataclasses.replace(ROW, region=Region.whole((3, 4)))
    half = dataclasses.replace(ROW, region=Region((0, 0), (3, 4), 0, 6))
    agreement = Agreement()

    def check(row: SavedSlice, **metadata: object) -> None:
        parts = [SliceTable.of([row], {"world_size": 1, "replicated": "x", **metadata})]
        agreement.check(parts, SliceTable.merge(parts))

    check(whole)
    check(dataclasses.replace(whole, digests=(2,)))
    for row, metadata, message in (
        (half, {}, "'w'"),
        (dataclasses.replace(whole, digests=(1, 2)), {}, "2 digests for 48 bytes"),
        (whole, {"world_size": 2}, "takes the world for 2 ranks"),
    ):
        with pytest.raises(CheckpointError, match=message):
            check(row, **metadata)
        check(whole)


def test_a_merged_table_has_the_rows_of_all():
    parts = [SliceTable.of([dataclasses.replace(ROW, file=f"r{i}")], {}) for i in range(3)]
    assert [row.file for row in SliceTable.merge(parts).rows("w")] == ["r0", "r1", "r2"]


ROW = SavedSlice("w", SHARED, "F32", (3, 4), Region((0, 0), (3, 4), 2, 7), "r00000.safetensors", 4096, (1,))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "F31"}, "'w': unknown dtype 'F31'"),
        ({"global_shape": (-3, 4)}, r"'w': negative size in shape \[-3, 4\]"),
        ({"byte_start": -1}, "'w': starts at byte -1"),
        ({"global_shape": (3,)}, "'w': has 2 dimensions, its tensor 1"),
        ({"region": Region((1, 0), (3, 4), 0, 5)}, r"'w': box at \[1, 0\] of shape \[3, 4\] leaves shape"),
        ({"region": Region((0, 0), (3, 4), 0, 13)}, r"'w': range \[0, 13\) leaves its 12 elements"),
        ({"region": Region((0, 0), (3, 4), 5, 2)}, r"'w': range \[5, 2\) leaves"),
        ({"global_shape": (0, 2**62), "region": Region((0, 0), (0, 0), 0, 0)}, "'w': has a shape that no tensor can"),
        ({"global_shape": (1,) * 65, "region": Region((0,) * 65, (1,) * 65, 0, 1)}, "'w': has a shape that no tensor"),
        ({"owner": -2}, "'w': belongs to rank -2"),
        ({"digests": ()}, "'w': 0 digests for 20 bytes"),
        ({"digests": (1, 2)}, "'w': 2 digests for 20 bytes"),
    ],
)
def test_a_row_that_makes_no_sense_is_refused_by_name(change: dict[str, object], message: str):
    row = dataclasses.replace(ROW, **change)  # type: ignore[arg-type]
    table = SliceTable.of([row], {})
    with pytest.raises(CorruptCheckpoint, match=message):
        table.rows("w", row.owner)
    with pytest.raises(CorruptCheckpoint, match=message):
        table.problems()


def arrow(table: pa.Table, metadata: str | None) -> bytes:
    """An Arrow file with other content."""
    sink = pa.BufferOutputStream()
    table = table.replace_schema_metadata({} if metadata is None else {"checkpoint": metadata})
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


GOOD = '{"format": "checkpoint/1", "chunk_bytes": 65536}'
TABLE = pa.ipc.open_file(SliceTable.of([ROW], {}).to_bytes()).read_all()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is not a slice table"),
        (b"ARROW1", "is not a slice table"),
        (arrow(TABLE, None), "carries no metadata of this package"),
        (arrow(TABLE, "{"), "is not a slice table"),
        (arrow(TABLE, '{"format": "checkpoint/1", "chunk_bytes": 4095}'), "chunk_bytes is 4095"),
        (arrow(TABLE.drop(["digests"]), GOOD), "is not a slice table"),
        (arrow(TABLE.set_column(0, "name", pa.array([[1]])), GOOD), "is not a slice table"),
        (arrow(TABLE.set_column(0, "name", pa.array([None], pa.string())), GOOD), "has empty cells"),
        (arrow(TABLE.set_column(4, "box_offset", pa.array([[None, 0]], pa.list_(pa.int64()))), GOOD), "empty cells"),
    ],
    ids=["empty", "magic", "no metadata", "bad metadata", "chunks", "column", "type", "null", "inner null"],
)
def test_a_malformed_table_is_refused(data: bytes, message: str):
    with pytest.raises(CorruptCheckpoint, match=message):
        SliceTable.from_bytes(data, "slices.arrow")


def test_a_table_of_another_version_is_told_apart():
    with pytest.raises(UnsupportedFormat, match="checkpoint/2"):
        SliceTable.from_bytes(arrow(TABLE, GOOD.replace("/1", "/2")), "slices.arrow")


@given(st.binary(max_size=2000), st.integers(0, 5000))
def test_no_damaged_table_raises_anything_else(noise: bytes, position: int):
    data = bytearray(SliceTable.of([ROW] * 3, {}).to_bytes())
    position %= len(data)
    data[position : position + len(noise)] = noise
    with contextlib.suppress(CorruptCheckpoint, UnsupportedFormat):
        SliceTable.from_bytes(bytes(data), "slices.arrow").all_rows()


RECORD = CommitRecord(
    step=3,
    sequence=1,
    run_id="run",
    world_size=1,
    created="2026-01-01T00:00:00.000+00:00",
    files=(FileRecord("r00000.safetensors", 5000, 4096, "xxh3-128:0"),),
    shared={"lr": 0.1, "name": "ü"},
    versions={"torch": "2"},
)


def test_a_record_comes_back():
    assert CommitRecord.from_bytes(RECORD.to_bytes(), "COMMIT.json") == RECORD
    assert RECORD.nbytes == 5000


def test_a_record_claims_no_more_ranks_than_wrote_files():
    with pytest.raises(SaveFailed, match="2 ranks cannot have written 1 files"):
        dataclasses.replace(RECORD, world_size=2).to_bytes()


@given(st.data())
def test_no_edit_of_a_record_goes_unnoticed(data: st.DataObject):
    text = RECORD.to_bytes()
    position = data.draw(st.integers(0, len(text) - 1))
    byte = data.draw(st.integers(0, 255).filter(lambda b: b != text[position]))
    edited = text[:position] + bytes([byte]) + text[position + 1 :]
    if edited.split() == text.split():
        return  # white space between tokens says nothing
    with pytest.raises((CorruptCheckpoint, UnsupportedFormat), match="COMMIT"):
        CommitRecord.from_bytes(edited, "COMMIT.json")


@given(st.recursive(st.none() | st.integers() | st.text(), lambda i: st.lists(i) | st.dictionaries(st.text(), i)))
def test_no_other_json_is_taken_for_a_record(tree: object):
    with pytest.raises(CorruptCheckpoint, match="COMMIT"):
        CommitRecord.from_bytes(json.dumps(tree).encode(), "COMMIT.json")


def test_numbers_beyond_any_file_are_no_danger():
    huge = Region((0,), (2**60,), 0, 2**60)
    table = SliceTable.of([dataclasses.replace(ROW, global_shape=(2**60,), region=huge)], {})
    with pytest.raises(CorruptCheckpoint, match=f"1 digests for {2**62} bytes"):
        table.rows("w")
