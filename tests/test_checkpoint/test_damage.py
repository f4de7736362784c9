"""A damaged checkpoint is named, never exposed, and passed over for the one before it."""

from __future__ import annotations

import json
import logging
import random
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

import checkpoint
from checkpoint import (
    CheckpointConfig,
    Checkpointer,
    CheckpointInfo,
    CorruptCheckpoint,
    FlatSlice,
    UnsupportedFormat,
    objects,
)
from checkpoint.access import open_reader
from checkpoint.format import fingerprint
from checkpoint.state import pieces_of
from tests.test_checkpoint.worlds import blank, bounds, ranks, same, saved_by, state, values

WORLD = 2


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with a sound checkpoint of step 1 and one of step 2 to damage."""
    saved_by(tmp_path, WORLD, step=1, seed=1, run_id="one")
    saved_by(tmp_path, WORLD, step=2, seed=2, run_id="two")
    return tmp_path


def newest(root: Path) -> CheckpointInfo:
    """The checkpoint of step 2."""
    return Checkpointer(root).list()[-1]


def flip(path: Path, position: int, bit: int = 0) -> None:
    """Flip one bit of a file."""
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def place_of(root: Path, name: str) -> tuple[Path, int]:
    """File and offset of the first byte of a tensor of step 2."""
    row = open_reader(newest(root)).table.rows(name)[0]
    return Path(newest(root).path, row.file), row.byte_start


def rewrite(info: CheckpointInfo, change: Callable[[dict[str, object]], None], *, sign: bool) -> None:
    """Edit a commit record, with or without mending its fingerprint."""
    path = Path(info.path, "COMMIT.json")
    tree = json.loads(path.read_text())
    claimed = tree.pop("fingerprint")
    change(tree)
    tree["fingerprint"] = fingerprint(objects.canonical(tree)) if sign else claimed
    path.write_text(json.dumps(tree))


def damage(root: Path, kind: str) -> None:
    """Damage the checkpoint of step 2."""
    info = newest(root)
    folder = Path(info.path)
    match kind:
        case "bit":
            flip(*place_of(root, "flat"))
        case "page":
            path, start = place_of(root, "flat")
            data = path.read_bytes()
            path.write_bytes(data[:start] + bytes(64) + data[start + 64 :])
        case "truncated":
            path, _ = place_of(root, "flat")
            path.write_bytes(path.read_bytes()[:-10])
        case "longer":
            path, _ = place_of(root, "flat")
            path.write_bytes(path.read_bytes() + b"x")
        case "missing":
            place_of(root, "flat")[0].unlink()
        case "header":
            flip(folder / "r00000.safetensors", 20)
        case "objects":
            flip(folder / "r00000.objects.json", 3)
        case "table":
            flip(folder / "slices.arrow", 900)
        case "no table":
            (folder / "slices.arrow").unlink()
        case "edited":
            rewrite(info, lambda tree: tree.update(step=3), sign=False)
        case "cut record":
            path = folder / "COMMIT.json"
            path.write_bytes(path.read_bytes()[:-50])
        case "empty record":
            (folder / "COMMIT.json").write_bytes(b"")
        case "version":
            rewrite(info, lambda tree: tree.update(format="checkpoint/99"), sign=True)


_DIGEST = (
    r"/r0000\d\.safetensors: tensor 'flat', bytes \[\d+, \d+\): "
    r"the digest does not match; .*load another"
)
DEEP = {
    "bit": _DIGEST,
    "page": _DIGEST,
    "truncated": r"/r0000\d\.safetensors has \d+ bytes instead of \d+; it holds .*'flat'.*; .*load another",
    "longer": r"/r0000\d\.safetensors has \d+ bytes instead of \d+; it holds .*'flat'.*; .*load another",
    "missing": r"/r0000\d\.safetensors is missing; it holds .*'flat'.*; .*load another",
    "header": r"/r00000\.safetensors: bytes \[0, 4096\): the fingerprint does not match; .*load another",
    "objects": r"/r00000\.objects\.json: bytes \[0, \d+\): the fingerprint does not match; .*load another",
    "table": r"/slices\.arrow: bytes \[0, \d+\): the fingerprint does not match; .*load another",
    "no table": r"/slices\.arrow is missing; .*load another",
    "edited": r"/COMMIT\.json: was damaged or changed after the commit",
    "cut record": r"/COMMIT\.json: is not JSON",
    "empty record": r"/COMMIT\.json: is not JSON",
    "version": r"/COMMIT\.json: format checkpoint/99 is not known here .*read it with the version",
}
QUICK = [kind for kind in DEEP if kind not in ("bit", "page", "header", "objects")]


@pytest.mark.parametrize("kind", DEEP)
def test_verify_names_file_tensor_and_remedy(root: Path, kind: str):
    folder = newest(root).path
    assert checkpoint.verify(folder).ok
    damage(root, kind)
    report = checkpoint.verify(folder)
    assert not report.ok
    assert len(report.problems) == 1
    with pytest.raises(CorruptCheckpoint, match=DEEP[kind]):
        raise CorruptCheckpoint(report.problems[0])


@pytest.mark.parametrize("kind", DEEP)
def test_latest_deep_falls_back_and_says_why(root: Path, kind: str, caplog: pytest.LogCaptureFixture):
    damage(root, kind)
    with caplog.at_level(logging.WARNING, "checkpoint"):
        latest = Checkpointer(root).latest("deep")
    assert latest is not None
    assert latest.step == 1
    (record,) = caplog.records
    with pytest.raises(CorruptCheckpoint, match=DEEP[kind]):
        raise CorruptCheckpoint(record.getMessage())


@pytest.mark.parametrize("kind", QUICK)
def test_latest_quick_falls_back_where_sizes_or_records_tell(root: Path, kind: str):
    damage(root, kind)
    latest = Checkpointer(root).latest("quick")
    assert latest is not None
    assert latest.step == 1


@pytest.mark.parametrize("kind", [kind for kind in DEEP if kind != "header"])  # a load needs no header
def test_a_load_raises_the_same_and_touches_no_destination(root: Path, kind: str):
    info = newest(root)
    damage(root, kind)
    for rank in range(WORLD):
        if kind == "objects" and rank == 1:
            continue  # the damaged file is rank 0's
        found, before = blank(0, 1), blank(0, 1)
        error = UnsupportedFormat if kind == "version" else CorruptCheckpoint
        with pytest.raises(error, match=DEEP[kind]):
            Checkpointer(root, rank=rank, world_size=WORLD, run_id="x").load(info, found, strict=False)
        assert same(found, before)


@pytest.mark.parametrize("buffer_bytes", [0, 1 << 30])
def test_a_load_from_an_object_store_touches_no_destination_either(buffer_bytes: int):
    root = f"memory://{uuid.uuid4()}"
    saved_by(root, WORLD)
    ck = Checkpointer(root, config=CheckpointConfig(load_buffer_bytes=buffer_bytes))
    info = ck.list()[0]
    row = open_reader(info).table.rows("flat")[-1]
    path = f"{info.path}/{row.file}"
    data = bytearray(fsspec.filesystem("memory").cat_file(path))
    data[row.byte_start + row.nbytes - 1] ^= 1
    fsspec.filesystem("memory").pipe_file(path, bytes(data))
    found = blank(0, 1)
    with pytest.raises(CorruptCheckpoint, match=_DIGEST):
        ck.load(info, found)
    assert same(found, blank(0, 1))
    with pytest.raises(CorruptCheckpoint, match=r"none of the checkpoints is whole: .*found it damaged"):
        ck.latest()


def test_a_checkpoint_found_damaged_is_passed_over_by_every_rank_from_then_on(
    root: Path, caplog: pytest.LogCaptureFixture
):
    damage(root, "bit")

    def load(rank: int) -> int:
        ck = Checkpointer(root, rank=rank, world_size=WORLD, run_id="again")
        info = ck.latest()
        assert info is not None
        try:
            return ck.load(info, blank(rank, WORLD)).step
        except CorruptCheckpoint:
            return -1

    first = [load(rank) for rank in range(WORLD)]
    assert first == [-1, 1]
    assert ranks(WORLD, load) == [1, 1]
    assert "rank 0 found it damaged: " in caplog.text
    assert "remove BAD.json there to use it again" in caplog.text


def test_the_sound_part_of_a_damaged_checkpoint_can_still_be_read(root: Path):
    damage(root, "missing")
    gone, _ = place_of(root, "flat")
    reader = open_reader(newest(root))
    sound = [n for n in ("whole", "scalar", "box") if all(Path(r.file).name != gone.name for r in reader.table.rows(n))]
    assert sound
    found = checkpoint.read(newest(root), sound)
    assert all(torch.equal(found[name], values(2)[name]) for name in sound)


NUM_PLACES = 1000


def test_damage_at_a_thousand_places_is_found_and_no_wrong_tensor_exposed(tmp_path: Path):
    """Flipped bits, zeroed pages and truncation, anywhere in any file of the checkpoint."""
    generator = random.Random(0)
    large = torch.randn(50_000, generator=torch.Generator().manual_seed(1))  # so that most bytes are a tensor's

    def part(rank: int, whole: dict[str, torch.Tensor], flat: torch.Tensor) -> dict[str, Any]:
        start, stop = bounds(len(flat), rank, WORLD)
        return {**state(whole, rank, WORLD), "large": FlatSlice(flat[start:stop].clone(), (len(flat),), start)}

    def save(rank: int) -> CheckpointInfo:
        with Checkpointer(tmp_path, rank=rank, world_size=WORLD, run_id="run") as ck:
            return ck.save(1, part(rank, values(2), large), {"rank": rank}).result(20)

    info = ranks(WORLD, save)[0]
    blanks = {name: torch.full_like(tensor, -9) for name, tensor in values().items()}
    expected, untouched = part(0, values(2), large), part(0, blanks, torch.full_like(large, -9))
    files = {path: path.read_bytes() for path in Path(info.path).iterdir() if path.is_file()}
    found = changed = wrong = 0
    while changed < NUM_PLACES:
        (path,) = generator.choices(list(files), [len(data) for data in files.values()])
        data = damaged(files[path], generator)
        if data == files[path]:
            continue  # zeros where zeros were
        changed += 1
        path.write_bytes(data)
        found += not checkpoint.verify(info.path).ok
        loaded = part(0, blanks, torch.full_like(large, -9))
        try:
            open_reader(info.path).load(pieces_of(loaded), 0, strict=True, buffer_bytes=1 << 20)
        except (CorruptCheckpoint, UnsupportedFormat):
            wrong += not same(loaded, untouched)
        else:
            wrong += not same(loaded, expected)
        path.write_bytes(files[path])
    assert (found, wrong) == (NUM_PLACES, 0)
    assert checkpoint.verify(info.path).ok


def damaged(data: bytes, generator: random.Random) -> bytes:
    """The bytes with one fault."""
    position = generator.randrange(len(data))
    match generator.choice(["bit", "page", "cut"]):
        case "bit":
            return data[:position] + bytes([data[position] ^ 1 << generator.randrange(8)]) + data[position + 1 :]
        case "page":
            start = position // 4096 * 4096
            return data[:start] + bytes(len(data[start : start + 4096])) + data[start + 4096 :]
        case _:
            return data[:position]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tree: tree.update(step=-1), "step: -1 is not a count"),
        (lambda tree: tree.update(world_size="2"), "world_size: '2' is not a count"),
        (lambda tree: tree.update(run_id=None), "run_id and created must be text"),
        (lambda tree: tree.update(surprise=1), "is not a commit record"),
        (lambda tree: tree.pop("files"), "is not a commit record"),
        (
            lambda tree: tree["files"][0].update(path="../../etc/passwd"),
            r"'../../etc/passwd' is not the name of a file",
        ),
        (lambda tree: tree["files"][0].update(path=".hidden"), "'.hidden' is not the name of a file"),
        (lambda tree: tree["files"][0].update(head_bytes=1 << 60), "make no sense"),
        (lambda tree: tree.update(shared={"$": "exec", "value": 1}), "holds a value of unknown kind 'exec'"),
    ],
)
def test_a_forged_record_is_refused_even_with_a_good_fingerprint(
    root: Path, change: Callable[[dict[str, object]], None], message: str
):
    info = newest(root)
    rewrite(info, change, sign=True)
    with pytest.raises(CorruptCheckpoint, match=message):
        Checkpointer(root).load(info, blank(0, 1))


def test_what_was_removed_meanwhile_is_not_marked_and_leaves_nothing_behind(root: Path):
    reader = open_reader(newest(root))
    shutil.rmtree(newest(root).path)
    with pytest.raises(CorruptCheckpoint, match="is missing") as failed:
        reader.objects(0)
    reader.condemn(0, failed.value)
    assert "removed since it was opened" in failed.value.__notes__[0]
    assert not (root / reader.folder).exists()
