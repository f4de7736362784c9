"""Chunks that did not change are referred to, and nothing that is referred to goes."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from checkpoint.comparison import Digester
from checkpoint.coverage import coverage_problem
from checkpoint.delta import MAX_FILES, Narrowed, Parent, narrow
from checkpoint.digest import CHUNK_BYTES, DIGEST_BYTES, chunk_count, digests
from checkpoint.format import DTYPES
from checkpoint.manifest import SHARED, FileRecord, SavedSlice
from checkpoint.shard import Part
from checkpoint.state import FlatSlice, Piece, RankLocal, TensorLike, pieces_of

PER_CHUNK = CHUNK_BYTES // 4
"""Elements of float32."""


def record(path: str) -> FileRecord:
    return FileRecord(path, 1 << 30, 4096, "xxh3-128:0")


def row_of(piece: Piece, part: Part, path: str, byte_start: int = 4096) -> SavedSlice:
    """Return the row under which a part of a piece would have been saved."""
    size = piece.tensor.element_size()
    start = part.first_chunk * CHUNK_BYTES
    stop = min(start + part.num_chunks * CHUNK_BYTES, piece.nbytes)
    data = memoryview(piece.tensor.contiguous().view(-1).view(torch.uint8).numpy().data)[start:stop]
    return SavedSlice(
        piece.name,
        SHARED if piece.kind != "local" else 0,
        DTYPES[piece.tensor.dtype],
        piece.global_shape,
        piece.region.part(start // size, stop // size),
        path,
        byte_start,
        tuple(digests(data)),
    )


def saved(pieces: Sequence[Piece], path: str = "r00000.safetensors", folder: str = "old") -> Parent:
    """Return a checkpoint that holds the pieces as they are, each in one row."""
    rows, position = [], 4096
    for piece in pieces:
        rows.append(row_of(piece, Part(0, 0, chunk_count(piece.nbytes, CHUNK_BYTES)), path, position))
        position += piece.nbytes
    return Parent(folder, rows, [record(path)])


def narrowed(pieces: Sequence[Piece], parent: Parent) -> Narrowed:
    return narrow(pieces, parent, Digester(pieces, ()).has_digests, 0)


def test_what_did_not_change_is_one_row_and_nothing_to_write():
    pieces = pieces_of({"w": torch.randn(3 * PER_CHUNK + 5), "b": torch.randn(7)})
    found = narrowed(pieces, saved(pieces))
    assert found.parts == ()
    assert [(row.name, row.file, row.region) for row in found.rows] == [
        (p.name, "old/r00000.safetensors", p.region) for p in pieces
    ]
    assert [file.path for file in found.files] == ["old/r00000.safetensors"]
    assert found.referred_bytes == sum(p.nbytes for p in pieces)


def test_a_changed_element_costs_its_chunk():
    values = torch.randn(4 * PER_CHUNK)
    pieces = pieces_of({"w": values})
    parent = saved(pieces)
    values[PER_CHUNK + 3] += 1
    found = narrowed(pieces, parent)
    assert found.parts == (Part(0, 1, 1),)
    assert [(r.region.start, r.region.stop) for r in found.rows] == [(0, PER_CHUNK), (2 * PER_CHUNK, 4 * PER_CHUNK)]
    assert found.rows[1].byte_start == 4096 + 2 * CHUNK_BYTES
    assert found.rows[1].digests == tuple(digests(memoryview(values[2 * PER_CHUNK :].view(torch.uint8).numpy().data)))


@pytest.mark.parametrize("where", [0, DIGEST_BYTES // 4, PER_CHUNK - 1])
def test_a_change_anywhere_in_a_chunk_is_seen(where: int):
    values = torch.zeros(PER_CHUNK)
    pieces = pieces_of({"w": values})
    parent = saved(pieces)
    values[where] = 1
    assert narrowed(pieces, parent).parts == (Part(0, 0, 1),)


def test_a_version_counter_has_no_say():
    values = torch.ones(8)
    pieces = pieces_of({"w": values})
    parent = saved(pieces)
    values.add_(0)  # counted, and equal
    assert narrowed(pieces, parent).parts == ()
    values.numpy()[3] = 2  # not counted, and different
    assert narrowed(pieces, parent).parts == (Part(0, 0, 1),)


def test_references_are_to_the_file_that_has_the_bytes_never_to_another_reference():
    pieces = pieces_of({"w": torch.randn(8)})
    first = narrowed(pieces, saved(pieces, folder="first"))
    second = narrowed(pieces, Parent("second", first.rows, [*first.files, record("r00000.safetensors")]))
    assert second == first


@pytest.mark.parametrize(
    "other",
    [
        {"v": torch.zeros(8)},
        {"w": torch.zeros(9)},
        {"w": torch.zeros(2, 4)},
        {"w": torch.zeros(8, dtype=torch.int32)},
        {"w": RankLocal(torch.zeros(8))},
        {"w": torch.zeros(8, 2)[:, 0]},
    ],
    ids=["name", "shape", "dims", "dtype", "owner", "strided"],
)
def test_what_was_something_else_before_is_written(other: dict[str, TensorLike]):
    parent = saved(pieces_of({"w": torch.zeros(8)}))
    found = narrowed(pieces_of(other), parent)
    assert len(found.parts) == 1
    assert found.rows == ()


def test_a_partition_that_grew_by_whole_chunks_finds_its_own():
    values = torch.randn(3 * PER_CHUNK)
    shape = (3 * PER_CHUNK,)
    parent = saved(pieces_of({"w": FlatSlice(values[: 2 * PER_CHUNK], shape, 0)}))
    found = narrowed(pieces_of({"w": FlatSlice(values[PER_CHUNK:], shape, PER_CHUNK)}), parent)
    assert found.parts == (Part(0, 1, 1),)
    assert found.rows[0].byte_start == 4096 + CHUNK_BYTES


def test_tied_names_all_refer():
    (piece,) = pieces_of({"embed": torch.randn(8)})
    tied = dataclasses.replace(piece, aliases=("head",))
    found = narrowed([tied], saved([piece]))
    assert [(row.name, row.byte_start) for row in found.rows] == [("embed", 4096), ("head", 4096)]
    assert found.referred_bytes == piece.nbytes


def test_only_the_fullest_files_are_referred_to():
    pieces = pieces_of({f"t{i}": torch.full((100 + i,), float(i)) for i in range(MAX_FILES + 2)})
    names = [f"r{i:05d}.safetensors" for i in range(len(pieces))]
    rows = [row_of(piece, Part(0, 0, 1), name) for piece, name in zip(pieces, names, strict=True)]
    found = narrowed(pieces, Parent("old", rows, [record(name) for name in names]))
    assert [part.source for part in found.parts] == [0, 1]
    assert len(found.files) == MAX_FILES


@given(data=st.data())
def test_what_is_written_and_what_is_referred_to_make_the_whole(data: st.DataObject):
    sizes = data.draw(st.lists(st.integers(0, 3 * PER_CHUNK), min_size=1, max_size=3))
    pieces = pieces_of({f"t{i}": torch.zeros(size) for i, size in enumerate(sizes)})
    rows = []
    for piece in pieces:  # of the parent, some chunks are there in runs, some are not
        count = chunk_count(piece.nbytes, CHUNK_BYTES)
        cuts = sorted(data.draw(st.sets(st.integers(0, count), max_size=3)))
        for first, last in itertools.pairwise(cuts):
            rows.append(row_of(piece, Part(0, first, last - first), f"f{data.draw(st.integers(0, 1))}"))
    same = data.draw(st.sets(st.tuples(st.integers(0, len(pieces) - 1), st.integers(0, 3))))
    parent = Parent("old", rows, [record("f0"), record("f1")])
    found = narrow(pieces, parent, lambda source, start, _: (source, start // CHUNK_BYTES) in same, 0)
    for i, piece in enumerate(pieces):
        regions = [row.region for row in found.rows if row.name == piece.name]
        for row in found.rows:
            row.check("test")
        for part in found.parts:
            if part.source == i:
                regions.append(row_of(piece, part, "new").region)
                assert not {(i, c) for c in range(part.first_chunk, part.first_chunk + part.num_chunks)} & {
                    (i, row.region.start // PER_CHUNK) for row in found.rows if row.name == piece.name
                }
        assert coverage_problem(piece.global_shape, regions) is None
