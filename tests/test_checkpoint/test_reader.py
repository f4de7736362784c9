"""Reads: only the chunks that are needed, each verified, nothing overwritten before all are."""

from __future__ import annotations

import contextlib
import math
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import checkpoint
from checkpoint import (
    BoxSlice,
    CheckpointConfig,
    Checkpointer,
    CorruptCheckpoint,
    FlatSlice,
    RankLocal,
    StateMismatch,
    transfer,
    verify,
)
from checkpoint.access import open_reader
from checkpoint.format import CHUNK_BYTES, DIGEST_BYTES, LARGEST_DIGEST_BYTES, chunk_count, digest, fingerprint
from checkpoint.local import LocalStorage
from checkpoint.manifest import SHARED, CommitRecord, FileRecord, SavedSlice, SliceTable
from checkpoint.names import COMMIT, TABLE
from checkpoint.reader import Reader, Want
from checkpoint.region import Region
from checkpoint.reshard import plan
from checkpoint.state import pieces_of
from checkpoint.storage import Source
from checkpoint.transfer import Window, windows
from tests.test_checkpoint.test_region import positions, regions, shapes
from tests.test_checkpoint.worlds import blank, bounds, ranks, same, state, tensor_of, values

GOLDEN = Path(__file__).parents[1] / "golden" / "checkpoint-1"
SMALL_CHUNK = 16
"""Bytes under one digest in the tests of plans: four elements."""


@st.composite
def rows(draw: st.DrawFn) -> tuple[list[SavedSlice], dict[str, bytes]]:
    """Slices of tensors, and files that hold them one behind the other."""
    found, files = [], {}
    for file in draw(st.lists(st.sampled_from(["r0", "r1", "r2"]), unique=True, min_size=1)):
        data = bytearray(draw(st.binary(max_size=3)) * 4)
        for index in range(draw(st.integers(1, 3))):
            shape = draw(shapes)
            region = draw(regions(shape))
            content = draw(st.randoms(use_true_random=False)).randbytes(region.numel * 4)
            count = chunk_count(len(content), SMALL_CHUNK)
            digests = tuple(digest(content[i * SMALL_CHUNK : (i + 1) * SMALL_CHUNK]) for i in range(count))
            name = f"{file}.{index}"
            found.append(SavedSlice(name, SHARED, "F32", shape, region, file, len(data), digests, SMALL_CHUNK))
            data += content
        files[file] = bytes(data)
    return found, files


@given(shapes.flatmap(lambda s: st.tuples(st.just(s), regions(s), regions(s))))
def test_a_plan_reads_every_chunk_that_has_something_and_no_other(case):
    shape, saved, wanted = case
    count = chunk_count(saved.numel * 4, SMALL_CHUNK)
    row = SavedSlice("w", SHARED, "F32", shape, saved, "r", 0, (0,) * count, SMALL_CHUNK)
    here = set(positions(wanted, shape).tolist())
    held = positions(saved, shape).tolist()
    needed = {i // (SMALL_CHUNK // 4) for i, place in enumerate(held) if place in here}
    reads = list(plan([row], wanted))
    assert sorted(chunk for read in reads for chunk in range(read.first, read.last)) == sorted(needed)
    taken = [p for read in reads for box in read.boxes for p in positions(Region.box(*box), shape).tolist()]
    assert sorted(taken) == sorted(here & set(held))
    assert sum(read.needed_bytes for read in reads) == 4 * len(taken)


@given(rows(), st.data(), st.integers(0, 400))
def test_windows_bring_each_chunk_once_and_each_read_its_bytes(case, data, capacity):
    saved, files = case
    wanted = data.draw(st.lists(st.sampled_from(saved), max_size=6))
    reads = [
        read for i, row in enumerate(wanted) for read in plan([row], data.draw(regions(row.global_shape)), target=i)
    ]
    found = list(windows(reads, capacity))
    assert sorted(map(id, (read for window in found for read in window.reads))) == sorted(map(id, reads))
    for window in found:
        assert window.nbytes <= capacity + 64 * len(window.blocks) or len(window.reads) == 1
        memory = brought(window, files)
        for read, place in zip(window.reads, window.places, strict=True):
            assert memory[place : place + read.nbytes].tobytes() == files[read.file][read.byte_start : read.byte_stop]
            assert place % 4 == read.byte_start % 4


def brought(window: Window, files: dict[str, bytes]) -> np.ndarray[Any, Any]:
    """A window's memory, its blocks read and verified; no byte is brought twice."""
    memory = np.zeros(window.nbytes, np.uint8)
    times = np.zeros(window.nbytes, int)
    for block in window.blocks:
        content = np.frombuffer(files[block.file][block.start : block.stop], np.uint8)
        memory[block.place : block.place + len(content)] = content
        times[block.place : block.place + len(content)] += 1
        assert block.stop - block.start <= CHUNK_BYTES
        assert [s.start for s in block.segments] == [block.start, *(s.stop for s in block.segments[:-1])]
        for segment in block.segments:
            data = files[block.file][segment.start : segment.stop]
            expected = [digest(data[i : i + SMALL_CHUNK]) for i in range(0, len(data), SMALL_CHUNK)]
            assert tuple(expected) == segment.row.digests[segment.first : segment.last]
    assert times.max(initial=0) <= 1
    return memory


SHAPE = (1531, 1021)
"""Of the large tensors: 6 MB, and divisible by none of the world sizes."""


def whole_state() -> dict[str, torch.Tensor]:
    """Parameters and optimizer state, as a small layer has them."""
    generator = torch.Generator().manual_seed(3)
    return {
        "weight": torch.randn(SHAPE, generator=generator),
        "exp_avg": torch.randn(SHAPE, generator=generator),
        "bf16": torch.randn(SHAPE, generator=generator).to(torch.bfloat16),
        "rows": torch.randn(SHAPE, generator=generator),
        "bias": torch.randn(SHAPE[:1], generator=generator),
    }


def part_of(whole: dict[str, torch.Tensor], rank: int, world_size: int) -> dict[str, Any]:
    """What a rank holds: ZeRO partitions, a tensor-parallel shard by rows, and a replica."""
    parts: dict[str, Any] = {}
    for name in ("weight", "exp_avg", "bf16"):
        start, stop = bounds(math.prod(SHAPE), rank, world_size)
        parts[name] = FlatSlice(whole[name].flatten()[start:stop].clone(), SHAPE, start)
    start, stop = bounds(SHAPE[0], rank, world_size)
    parts["rows"] = BoxSlice(whole["rows"][start:stop].clone(), SHAPE, (start, 0))
    parts["bias"] = whole["bias"].clone()
    return parts


def test_loads_from_1_to_4_to_3_to_2_to_1_ranks_read_a_tenth_more_than_they_need_at_most(tmp_path: Path):
    whole = whole_state()
    held = [part_of(whole, 0, 1)]
    for step, world_size in enumerate([4, 3, 2, 1], 1):
        before = held

        def save(rank: int, before: list[dict[str, Any]] = before, step: int = step) -> None:
            with open_world(tmp_path, rank, len(before), f"save {step}") as ck:
                ck.save(step, before[rank]).result(60)

        def load(rank: int, world_size: int = world_size) -> tuple[int, int, dict[str, Any]]:
            found = part_of({name: torch.zeros_like(t) for name, t in whole.items()}, rank, world_size)
            with open_world(tmp_path, rank, world_size, "load") as ck:
                loaded = ck.load(ck.latest(), found)
            return loaded.read_bytes, loaded.needed_bytes, found

        ranks(len(before), save)
        results = ranks(world_size, load)
        held = [found for _, _, found in results]
        for rank, (read_bytes, needed_bytes, found) in enumerate(results):
            expected = part_of(whole, rank, world_size)
            assert all(torch.equal(tensor_of(found[name]), tensor_of(expected[name])) for name in whole)
            assert needed_bytes == sum(tensor_of(value).nbytes for value in expected.values())
            assert needed_bytes <= read_bytes <= 1.1 * needed_bytes


def open_world(root: Path, rank: int, world_size: int, run_id: str) -> Checkpointer:
    config = CheckpointConfig(commit_timeout_s=30, keep_last=1)
    return Checkpointer(root, config=config, rank=rank, world_size=world_size, run_id=run_id)


def test_a_part_of_a_tensor_costs_the_chunks_it_touches(tmp_path: Path):
    tensor = torch.arange(4 * DIGEST_BYTES, dtype=torch.int32).reshape(16, DIGEST_BYTES // 4)  # a row is a chunk
    with Checkpointer(tmp_path) as ck:
        ck.save(1, {"w": tensor})
    reader = open_reader(tmp_path)
    for index, region, chunks in [
        (slice(3, 5), Region.box((3, 0), (2, DIGEST_BYTES // 4)), 2),
        ((slice(None), slice(7, 9)), Region.box((0, 7), (16, 2)), 16),
        ((slice(2, 9), 5), Region.box((2, 5), (7, 1)), 7),
        (slice(0, 0), Region.box((0, 0), (0, DIGEST_BYTES // 4)), 0),
    ]:
        with reader.transfer() as used:
            (found,) = reader.read([Want("w", region=region)], used)
            assert used.read_bytes == chunks * DIGEST_BYTES
        assert torch.equal(found.reshape(tensor[index].shape), tensor[index])


MANY = 10 * CHUNK_BYTES
"""More than a load without a buffer holds at once."""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 80 MiB in three tensors."""
    root = tmp_path_factory.mktemp("large")
    with Checkpointer(root) as ck:
        ck.save(1, large_state()).result(60)
    return root


def large_state() -> dict[str, torch.Tensor]:
    each = MANY // 3 // 4 + 1
    return {name: torch.arange(i, each + i, dtype=torch.int32) for i, name in enumerate("abc")}


@pytest.mark.parametrize("place", ["local", "memory"])
@pytest.mark.parametrize(("buffer_bytes", "again"), [(0, 48 << 20), (48 << 20, 32 << 20), (1 << 30, 0)])
def test_what_exceeds_the_buffer_is_read_again(large: Path, place: str, buffer_bytes: int, again: int):
    url = str(large)
    if place == "memory":
        url = f"memory://{uuid.uuid4()}"
        fsspec.filesystem("memory").put(str(large), url, recursive=True)
    ck = Checkpointer(url, config=CheckpointConfig(load_buffer_bytes=buffer_bytes))
    found = {name: torch.zeros_like(t) for name, t in large_state().items()}
    loaded = ck.load(ck.latest(), found)
    assert all(torch.equal(found[name], t) for name, t in large_state().items())
    total = sum(t.nbytes for t in found.values())
    assert (loaded.needed_bytes, loaded.read_bytes) == (total, total)
    assert again <= loaded.reread_bytes < total
    assert (loaded.reread_bytes == 0) == (again == 0)


@pytest.mark.parametrize("place", ["local", "memory"])
@pytest.mark.parametrize("name", ["a", "c"])
def test_nothing_is_overwritten_if_any_chunk_is_damaged(large: Path, tmp_path: Path, place: str, name: str):
    root = tmp_path / "copy"
    shutil.copytree(large, root)
    row = open_reader(root).table.rows(name)[0]
    (shard,) = root.glob(f"*/{row.file}")
    with shard.open("r+b") as file:
        file.seek(row.byte_start + row.nbytes // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 4]))
    url = str(root)
    if place == "memory":
        url = f"memory://{uuid.uuid4()}"
        fsspec.filesystem("memory").put(str(root), url, recursive=True)
    ck = Checkpointer(url, config=CheckpointConfig(load_buffer_bytes=0))
    found = {key: torch.full_like(t, -1) for key, t in large_state().items()}
    with pytest.raises(CorruptCheckpoint, match=f"tensor '{name}', bytes .* the digest does not match"):
        ck.load(ck.latest(), found)
    assert all((t == -1).all() for t in found.values())


@pytest.mark.parametrize("place", ["local", "memory"])
def test_fresh_destinations_are_filled_in_one_reading(large: Path, place: str):
    url = str(large)
    if place == "memory":
        url = f"memory://{uuid.uuid4()}"
        fsspec.filesystem("memory").put(str(large), url, recursive=True)
    found = {name: torch.zeros_like(t) for name, t in large_state().items()}
    ck = Checkpointer(url, config=CheckpointConfig(load_buffer_bytes=0))
    loaded = ck.load(ck.latest(), found, fresh=True)
    assert all(torch.equal(found[name], t) for name, t in large_state().items())
    total = sum(t.nbytes for t in found.values())
    assert (loaded.needed_bytes, loaded.read_bytes, loaded.reread_bytes) == (total, total, 0)


def test_of_a_damaged_chunk_no_byte_reaches_a_fresh_destination(large: Path, tmp_path: Path):
    root = tmp_path / "copy"
    shutil.copytree(large, root)
    row = open_reader(root).table.rows("b")[0]
    (shard,) = root.glob(f"*/{row.file}")
    at = row.nbytes // 2 // DIGEST_BYTES * DIGEST_BYTES
    with shard.open("r+b") as file:
        file.seek(row.byte_start + at)
        file.write(bytes(DIGEST_BYTES))
    ck = Checkpointer(root)
    found = {key: torch.full_like(t, -1) for key, t in large_state().items()}
    with pytest.raises(CorruptCheckpoint, match=r"tensor 'b', bytes .* the digest does not match") as caught:
        ck.load(ck.latest(), found, fresh=True)
    assert caught.value.__notes__ == ["destinations hold a part of it: load another checkpoint into them"]
    for name, expected in large_state().items():
        assert torch.all((found[name] == -1) | (found[name] == expected)), "only what was verified was copied"
    assert torch.all(found["b"][at // 4 : (at + DIGEST_BYTES) // 4] == -1)


def test_what_is_a_rank_s_own_is_never_filled_from_a_checkpoint_that_fails(tmp_path: Path):
    state = {"w": torch.arange(100_000.0), "generator": RankLocal(torch.arange(10))}
    with Checkpointer(tmp_path) as ck:
        info = ck.save(1, state).result(20)
    (shard,) = Path(info.path).glob("*.safetensors")
    row = open_reader(info).table.rows("w")[0]
    with shard.open("r+b") as file:
        file.seek(row.byte_start)
        file.write(b"damage")
    own = torch.full((10,), -1)
    with pytest.raises(CorruptCheckpoint):
        Checkpointer(tmp_path).load(info, {"w": torch.zeros(100_000), "generator": RankLocal(own)}, fresh=True)
    assert torch.all(own == -1)


class Vanishing(LocalStorage):
    """Its checkpoint is removed as soon as a shard is open."""

    @contextlib.contextmanager
    def open(self, path: str) -> Iterator[Source]:
        with super().open(path) as source:
            if path.endswith(".safetensors"):
                shutil.rmtree(Path(self.url, path).parent)
            yield source


def test_a_checkpoint_removed_between_the_two_passes_is_still_loaded(large: Path, tmp_path: Path):
    shutil.copytree(large, tmp_path / "copy")
    (folder,) = (path.name for path in (tmp_path / "copy").iterdir())
    reader = Reader(Vanishing(tmp_path / "copy"), folder)
    found = {name: torch.zeros_like(t) for name, t in large_state().items()}
    reader.load(pieces_of(found), 0, strict=True, buffer_bytes=0)
    assert not (tmp_path / "copy" / folder).exists()
    assert all(torch.equal(found[name], t) for name, t in large_state().items())


def test_more_files_than_may_be_open_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole = torch.arange(999.0)

    def save(rank: int) -> None:
        start, stop = bounds(999, rank, 9)
        with open_world(tmp_path, rank, 9, "run") as ck:
            ck.save(1, {"w": FlatSlice(whole[start:stop], (999,), start)}).result(60)

    ranks(9, save)
    monkeypatch.setattr(transfer, "_MAX_OPEN", 2)
    assert torch.equal(open_reader(tmp_path).assemble("w"), whole)


@pytest.mark.parametrize("stride", [1, 3])
def test_destinations_may_have_any_strides(tmp_path: Path, stride: int):
    whole = torch.randn(300, 200)
    with Checkpointer(tmp_path) as ck:
        info = ck.save(1, {"w": whole}).result(20)
    memory = torch.zeros(200, 300 * stride)
    ck.load(info, {"w": memory[:, ::stride].T})
    assert torch.equal(memory[:, ::stride].T, whole)
    flat = torch.zeros(1000 * stride)
    ck.load(info, {"w": FlatSlice(flat[::stride], (300, 200), 150)})
    assert torch.equal(flat[::stride], whole.flatten()[150:1150])
    assert flat.count_nonzero() <= 1000


def test_a_checkpoint_of_the_first_days_is_read(tmp_path: Path):
    """It was written before digests were of 64 KiB."""
    shutil.copytree(GOLDEN, tmp_path / "root")
    assert open_reader(tmp_path / "root").table.chunk_bytes == LARGEST_DIGEST_BYTES
    assert verify(tmp_path / "root").ok
    assert same(checkpoint.read(tmp_path / "root"), values(4))
    for rank in range(3):
        found = blank(rank, 3)
        with open_world(tmp_path / "root", rank, 3, "load") as ck:
            loaded = ck.load(ck.latest(), found, strict=False)
        assert (loaded.shared, loaded.objects.get("t")) == ({"seed": 4}, (1, b"x") if rank < 2 else None)
        expected = state(values(4), rank, 3)
        assert all(torch.equal(tensor_of(found[name]), tensor_of(expected[name])) for name in values())


def test_larger_digests_are_read_in_their_own_chunks(tmp_path: Path):
    tensor = torch.arange(5 * LARGEST_DIGEST_BYTES // 8, dtype=torch.int32)  # two and a half of them
    with Checkpointer(tmp_path) as ck:
        info = ck.save(1, {"w": tensor}).result(20)
    folder = Path(info.path)
    (row,) = open_reader(folder).table.rows("w")
    data = tensor.numpy().tobytes()
    digests = tuple(digest(data[i : i + LARGEST_DIGEST_BYTES]) for i in range(0, len(data), LARGEST_DIGEST_BYTES))
    table = SliceTable.of([replace(row, digests=digests)], {"chunk_bytes": LARGEST_DIGEST_BYTES}).to_bytes()
    (folder / TABLE).write_bytes(table)
    record = CommitRecord.from_bytes((folder / COMMIT).read_bytes(), COMMIT)
    files = [f for f in record.files if f.path != TABLE]
    proof = FileRecord(TABLE, len(table), len(table), fingerprint(table))
    (folder / COMMIT).write_bytes(replace(record, files=(*files, proof)).to_bytes())
    assert verify(folder).ok
    reader = open_reader(folder)
    with reader.transfer() as used:
        (found,) = reader.read([Want("w", region=Region.box((LARGEST_DIGEST_BYTES // 4 - 1,), (2,)))], used)
        assert used.read_bytes == 2 * LARGEST_DIGEST_BYTES
    assert torch.equal(found, tensor[LARGEST_DIGEST_BYTES // 4 - 1 :][:2])


def test_a_destination_whose_elements_are_one_is_refused_before_any_is_filled(tmp_path: Path):
    with Checkpointer(tmp_path) as ck:
        info = ck.save(1, {"a": torch.ones(2), "b": torch.arange(4.0)}).result(20)
    first = torch.zeros(2)
    with Checkpointer(tmp_path) as ck, pytest.raises(StateMismatch, match=r"'b' cannot be filled: .*clone\(\)"):
        ck.load(info, {"a": first, "b": torch.zeros(1).expand(4)})
    assert torch.equal(first, torch.zeros(2))
