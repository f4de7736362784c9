"""Reading and verifying by path: no model, no ranks, no Checkpointer."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import checkpoint
from checkpoint import (
    Checkpointer,
    CheckpointNotFound,
    CorruptCheckpoint,
    StateMismatch,
    read,
    verify,
)
from checkpoint.access import open_reader
from checkpoint.format import DIGEST_BYTES
from checkpoint.lazy import open_checkpoint
from checkpoint.selection import Index, select_box
from tests.test_checkpoint.worlds import same, saved_by, values

SHARED = {"box", "empty", "flat", "scalar", "whole"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with the checkpoint of step 1, saved by three ranks."""
    saved_by(tmp_path / "root", 3, seed=6)
    return tmp_path / "root"


def test_whole_tensors_are_assembled_from_the_slices_of_all_ranks(root: Path):
    found = read(root)
    assert found.keys() == SHARED
    assert same(found, values(6))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("flat", {"flat"}),
        ("*a*", {"flat", "scalar"}),
        ("[bw]*", {"box", "whole"}),
        (["whole", "box"], {"whole", "box"}),
        ([], set()),
    ],
)
def test_names_are_a_glob_or_a_list(root: Path, names: str | list[str], expected: set[str]):
    assert read(root, names).keys() == expected


def test_a_name_that_looks_like_a_glob_is_itself_first(tmp_path: Path):
    with Checkpointer(tmp_path) as ck:
        ck.save(1, {"w[0]": torch.zeros(1), "w0": torch.ones(1)})
    assert read(tmp_path, "w[0]").keys() == {"w[0]"}
    assert read(tmp_path, "w?").keys() == {"w0"}


def test_names_that_are_not_there_are_named(root: Path):
    with pytest.raises(StateMismatch, match="holds no tensor named 'nothing', 'zip'"):
        read(root, ["flat", "zip", "nothing"])
    with pytest.raises(StateMismatch, match=r"holds no tensor named 'model\.\*'"):
        read(root, "model.*")


def test_a_place_is_a_root_a_folder_a_url_or_an_info(root: Path):
    info = Checkpointer(root).list()[0]
    places = [root, str(root), f"{root}/", f"file://{root}", info, info.path, Path(info.path), f"file://{info.path}/"]
    for place in places:
        assert torch.equal(read(place, "flat")["flat"], values(6)["flat"])


def test_a_folder_is_found_from_inside_its_root(root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(root)
    folder = Checkpointer(root).list()[0].folder
    assert read(folder, "scalar")["scalar"] == 6
    assert read(".", "scalar")["scalar"] == 6


def test_whoever_names_the_folder_of_a_run_is_told_where_its_checkpoints_are(tmp_path: Path):
    with Checkpointer(tmp_path / "run" / "checkpoints") as saved:
        saved.save(1, {"x": torch.ones(2)})
    for ask in (read, verify):
        with pytest.raises(CheckpointNotFound, match=r"run: holds no checkpoint.*; .*run/checkpoints does"):
            ask(tmp_path / "run")


def test_where_nothing_is_saved_is_said(tmp_path: Path, root: Path):
    with pytest.raises(CheckpointNotFound, match="absent: holds no checkpoint that verifies"):
        read(tmp_path / "absent")
    with pytest.raises(CheckpointNotFound, match="absent: holds no checkpoint"):
        verify(tmp_path / "absent")
    folder = Path(Checkpointer(root).list()[0].path)
    (folder / "COMMIT.json").unlink()
    for look in (read, verify):
        with pytest.raises(CheckpointNotFound, match=r"no COMMIT\.json: nothing was committed here"):
            look(folder)


def test_a_root_falls_back_for_reading_but_not_for_verifying(root: Path):
    saved_by(root, 1, step=2, seed=7, run_id="later")
    folder = Path(Checkpointer(root).list()[-1].path)
    (folder / "slices.arrow").unlink()
    assert read(root, "scalar")["scalar"] == 6
    report = verify(root)
    assert report.path == str(folder)
    assert not report.ok
    with pytest.raises(CorruptCheckpoint, match=r"slices\.arrow is missing"):
        read(folder)


def test_a_report_counts_what_was_verified(root: Path):
    report = verify(root)
    info = Checkpointer(root).list()[0]
    assert (report.ok, report.deep, report.problems) == (True, True, ())
    assert (report.path, report.nbytes) == (info.path, info.nbytes)
    assert report.num_tensors == len(SHARED) + 3
    assert not verify(root, deep=False).deep


def test_a_quick_verification_does_not_read_the_tensors(root: Path):
    shard = next(Path(Checkpointer(root).list()[0].path).glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert verify(root, deep=False).ok
    assert not verify(root).ok


def test_every_damaged_chunk_is_reported(tmp_path: Path):
    with Checkpointer(tmp_path) as ck:
        info = ck.save(1, {"big": torch.zeros(3 * DIGEST_BYTES, dtype=torch.uint8)}).result(20)
    shard = Path(info.path, "r00000.safetensors")
    data = bytearray(shard.read_bytes())
    data[5000] ^= 1
    data[-1] ^= 1
    shard.write_bytes(data)
    problems = verify(tmp_path).problems
    assert len(problems) == 2
    assert f"bytes [4096, {4096 + DIGEST_BYTES})" in problems[0]
    assert f"bytes [{4096 + 2 * DIGEST_BYTES}, {4096 + 3 * DIGEST_BYTES})" in problems[1]


def test_reading_needs_no_process_group(root: Path):
    assert not torch.distributed.is_initialized()
    assert checkpoint.read(root, "whole")["whole"].dtype == torch.float64


indices = st.one_of(
    st.just(...),
    st.lists(
        st.one_of(
            st.integers(-6, 6),
            st.builds(
                slice,
                st.none() | st.integers(-7, 7),
                st.none() | st.integers(-7, 7),
                st.none() | st.integers(1, 3),
            ),
            st.just(...),
        ),
        max_size=4,
    ).map(tuple),
    st.integers(-6, 6),
)


@given(st.lists(st.integers(0, 5), max_size=3).map(tuple), indices)
def test_an_index_selects_what_it_selects_of_a_tensor(shape: tuple[int, ...], index: Index):
    whole = torch.arange(math.prod(shape)).reshape(shape)
    try:
        expected = whole[index]
    except IndexError:
        with pytest.raises((IndexError, TypeError)):
            select_box(index, shape)
        return
    if isinstance(index, tuple) and index.count(...) > 1:
        return  # torch lets the second one stand for nothing
    region, rest = select_box(index, shape)
    box = whole[tuple(slice(o, o + n) for o, n in zip(region.offset, region.shape, strict=True))]
    assert tuple(box.shape) == region.shape
    assert torch.equal(box[rest], expected)


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        (5, IndexError, "index 5 is out of range for dimension 0 of size 5"),
        ((0, 0, 0), IndexError, "3 indices for a tensor of 2 dimensions"),
        (slice(None, None, -1), ValueError, "step -1 in dimension 0; allowed are steps from 1"),
        ((..., ...), TypeError, "allowed are integers, slices and one"),
        (True, TypeError, "allowed are integers, slices and one"),
        ([1, 2], TypeError, "allowed are integers, slices and one"),
    ],
)
def test_other_indices_are_refused(root: Path, index: Index, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        read(root, "whole", slices={"whole": index})


def test_parts_of_tensors_are_read_by_index(root: Path):
    found = read(root, "*", slices={"flat": (slice(10, 31), 2), "box": -1})
    assert torch.equal(found["flat"], values(6)["flat"][10:31, 2])
    assert torch.equal(found["box"], values(6)["box"][-1])
    assert torch.equal(found["whole"], values(6)["whole"])
    with pytest.raises(StateMismatch, match="slices: 'flat' are not among the names to be read"):
        read(root, "whole", slices={"flat": 0})


def test_an_open_checkpoint_tells_of_its_tensors_without_reading_them(root: Path):
    shards = Path(Checkpointer(root).list()[0].path).glob("*.safetensors")
    with open_checkpoint(root, rank=1) as opened:
        for shard in shards:
            shard.unlink()
        assert opened.info.step == 1
        assert opened.keys() == SHARED | {"rng"}
        assert all(opened[name].shape == tensor.shape for name, tensor in values().items())
        assert all(opened[name].dtype == tensor.dtype for name, tensor in values().items())
        assert repr(opened["box"]) == "LazyTensor('box', torch.bfloat16, [60, 7])"
        with pytest.raises(KeyError):
            opened["absent"]


def test_an_open_checkpoint_reads_what_is_indexed(root: Path):
    with open_checkpoint(root, rank=1) as opened:
        for name, tensor in values(6).items():
            assert torch.equal(opened[name][...], tensor)
        assert torch.equal(opened["flat"][5:50:7, -3:], values(6)["flat"][5:50:7, -3:])
        assert opened["rng"][0] == 1
        Path(Checkpointer(root).list()[0].path, "COMMIT.json").unlink()
        for path in Path(opened.info.path).glob("*.safetensors"):
            path.unlink()
        assert torch.equal(opened["flat"][:], values(6)["flat"])  # its files are open
    opened.close()
    with pytest.raises(ValueError, match="is closed"):
        opened["flat"][0]


def test_an_open_checkpoint_verifies_what_it_reads(root: Path):
    row = open_reader(root).table.rows("flat")[0]
    (shard,) = root.glob(f"*/{row.file}")
    data = bytearray(shard.read_bytes())
    data[row.byte_start] ^= 1
    shard.write_bytes(data)
    with open_checkpoint(root) as opened:
        assert torch.equal(opened["flat"][-1], values(6)["flat"][-1])  # another chunk
        with pytest.raises(CorruptCheckpoint, match="tensor 'flat'"):
            opened["flat"][0]
