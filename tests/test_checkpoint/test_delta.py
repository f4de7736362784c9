"""Chunks that did not change are referred to, and nothing that is referred to goes."""

from __future__ import annotations

import dataclasses
import itertools
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import checkpoint
from checkpoint import CheckpointConfig, Checkpointer, CorruptCheckpoint, StorageError, catalog
from checkpoint.__main__ import main
from checkpoint.catalog import RETIRED
from checkpoint.comparison import Digester
from checkpoint.config import RemoteConfig
from checkpoint.coverage import coverage_problem
from checkpoint.delta import MAX_FILES, Narrowed, Parent, narrow
from checkpoint.digest import CHUNK_BYTES, DIGEST_BYTES, chunk_count, digests
from checkpoint.format import DTYPES
from checkpoint.manifest import SHARED, FileRecord, SavedSlice
from checkpoint.names import MARK
from checkpoint.promotion import Promoter
from checkpoint.shard import Part
from checkpoint.state import FlatSlice, Piece, RankLocal, TensorLike, pieces_of
from checkpoint.storage import open_storage
from tests.test_checkpoint.worlds import ranks

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


# Saved with a Checkpointer


def lora(seed: int = 0) -> dict[str, torch.Tensor]:
    """Return a frozen base, two tied names among it, and small tensors that train."""
    generator = torch.Generator().manual_seed(seed)
    embedding = torch.randn(PER_CHUNK + 1000, generator=generator)
    state = {"embedding": embedding, "head": embedding, "base": torch.randn(3, 1000, 100, generator=generator)}
    return state | {f"adapter.{i}": torch.zeros(50, 4) for i in range(3)}


def train(state: dict[str, torch.Tensor]) -> None:
    """Change what trains, and a row of the embedding."""
    for name, tensor in state.items():
        if name.startswith("adapter"):
            tensor += torch.randn_like(tensor)
    state["embedding"][-3:] += 1


def delta(root: Path, rank: int = 0, world_size: int = 1, run_id: str = "run", **options: Any) -> Checkpointer:
    config = CheckpointConfig(delta=True, commit_timeout_s=20, **options)
    return Checkpointer(root, config=config, rank=rank, world_size=world_size, run_id=run_id)


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_a_frozen_base_is_written_once_and_read_from_every_checkpoint(tmp_path: Path):
    state = lora()
    sizes = []
    with delta(tmp_path, keep_last=3) as ck:
        for step in range(1, 6):
            handle = ck.save(step, state)
            ck.fence()
            expected = {name: tensor.clone() for name, tensor in state.items()}
            info = handle.result(20)
            sizes.append(handle.stats().written_bytes)
            assert same(checkpoint.read(info), expected)
            assert checkpoint.verify(info).ok
            train(state)
    assert sizes[0] == sum(t.nbytes for name, t in state.items() if name != "head")
    assert sizes[1:] == [3 * 800 + 4000] * 4  # the adapters, and the last chunk of the embedding
    newest = checkpoint.Checkpointer(tmp_path).latest("deep")
    assert newest is not None
    assert newest.nbytes < 100_000
    fresh = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    Checkpointer(tmp_path).load(newest, fresh)
    assert same(fresh, expected)


def test_the_first_checkpoint_is_retired_not_removed_while_others_refer_to_it(tmp_path: Path):
    state = lora()
    with delta(tmp_path, keep_last=1) as ck:
        first = ck.save(1, state).result(20)
        for step in range(2, 6):
            ck.fence()
            train(state)
            ck.save(step, state)
    assert [info.step for info in ck.list()] == [3, 4, 5]
    assert sorted(p.name for p in Path(first.path).iterdir()) == [RETIRED, "r00000.safetensors"]
    assert same(checkpoint.read(tmp_path), state)
    with delta(tmp_path, keep_last=1, run_id="all anew") as ck:
        for step in range(6, 9):
            ck.fence()
            for tensor in state.values():
                tensor += 1
            ck.save(step, state).result(20)
    assert len(list(tmp_path.iterdir())) == 3


def test_another_launch_goes_on_from_what_it_finds(tmp_path: Path):
    state = lora()
    with delta(tmp_path) as ck:
        ck.save(1, state)
    with delta(tmp_path, run_id="next") as ck:
        assert ck.save(2, state).stats(20).written_bytes == 0
    assert same(checkpoint.read(tmp_path), state)


def test_what_is_marked_as_damaged_is_not_referred_to(tmp_path: Path):
    state = lora()
    with delta(tmp_path) as ck:
        info = ck.save(1, state).result(20)
        Path(info.path, MARK).write_text('{"rank": 0, "reason": "test"}')
        assert ck.save(2, state).stats(20).written_bytes == sum(p.nbytes for n, p in state.items() if n != "head")
    assert [row.step for row in ck.list() if checkpoint.verify(row).ok] == [2]


def test_a_checkpoint_whose_references_went_away_is_not_committed(tmp_path: Path):
    state = lora()
    with delta(tmp_path) as ck:
        info = ck.save(1, state).result(20)
        Path(info.path, "r00000.safetensors").unlink()
        error = ck.save(2, state).exception(20)
    assert isinstance(error, StorageError)
    assert "r00000.safetensors: " in str(error)
    assert [found.step for found in ck.list()] == [1]


def test_damage_in_a_file_that_is_referred_to_is_found_from_every_checkpoint(tmp_path: Path):
    state = lora()
    with delta(tmp_path) as ck:
        infos = [ck.save(step, state).result(20) for step in (1, 2)]
    shard = Path(infos[0].path, "r00000.safetensors")
    data = bytearray(shard.read_bytes())
    data[-1000] ^= 1
    shard.write_bytes(data)
    for info in infos:
        report = checkpoint.verify(info)
        assert not report.ok
        assert infos[0].folder in report.problems[0]
        with pytest.raises(CorruptCheckpoint):
            checkpoint.read(info)


def test_ranks_refer_each_to_their_own_and_another_world_reads_all(tmp_path: Path):
    whole = torch.randn(2 * PER_CHUNK + 50)

    def save(rank: int) -> list[int]:
        half = whole.numel() // 2
        part = FlatSlice(whole[rank * half : (rank + 1) * half], tuple(whole.shape), rank * half)
        with delta(tmp_path, rank, 2, keep_last=1) as ck:
            return [ck.save(step, {"w": part, "b": torch.ones(9)}).stats(20).written_bytes for step in range(1, 5)]

    first, second = ranks(2, save)
    assert sorted((first[0], second[0])) == [whole.nbytes // 2, whole.nbytes // 2 + 36]
    assert first[1:] == second[1:] == [0] * 3
    assert torch.equal(checkpoint.read(tmp_path)["w"], whole)


def test_an_export_and_a_plain_tool_see_no_difference(tmp_path: Path):
    from safetensors.torch import load_file

    state = lora()
    with delta(tmp_path / "root") as ck:
        ck.save(1, state)
        ck.fence()
        train(state)
        ck.save(2, state)
    checkpoint.export(tmp_path / "root", tmp_path / "out.safetensors")
    assert same(load_file(tmp_path / "out.safetensors"), state)
    for shard in tmp_path.glob("root/*/*.safetensors"):
        load_file(shard)


def test_copies_in_another_tier_have_what_they_refer_to(tmp_path: Path):
    state = lora()
    remote = f"memory://{uuid.uuid4()}"
    mover = Promoter(open_storage(tmp_path), open_storage(remote), RemoteConfig(keep_last=1), rank=0, world_size=1)
    with delta(tmp_path, keep_last=1) as ck:
        for step in range(1, 6):
            ck.fence()
            train(state)
            info = ck.save(step, state).result(20)
            if step in (2, 4, 5):
                copy = mover.submit(info.folder).result(20)
                assert checkpoint.verify(copy).ok
                assert same(checkpoint.read(copy), state)
        mover.close()
    storage = open_storage(remote)
    assert [info.step for info in catalog.checkpoints(storage)] == [5]
    first, newest = [entry.name for entry in storage.entries("")]
    assert [entry.name for entry in storage.entries(first)] == ["r00000.safetensors"]
    assert newest == info.folder


def test_the_command_that_collects_keeps_what_is_referred_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    state = lora()
    with delta(tmp_path, keep_last=9) as ck:
        first = ck.save(1, state).result(20)
        ck.fence()
        train(state)
        ck.save(2, state)
    assert main(["gc", str(tmp_path), "--keep-last", "1"]) == 0
    assert f"{first.folder} but for r00000.safetensors" in capsys.readouterr().out
    assert same(checkpoint.read(tmp_path), state)
    assert main(["gc", str(tmp_path), "--keep-last", "1", "--idle-s", "0"]) == 0
    assert checkpoint.verify(tmp_path).ok
