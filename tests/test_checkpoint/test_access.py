"""Reading and verifying by path: no model, no ranks, no Checkpointer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import checkpoint
from checkpoint import (
    Checkpointer,
    CheckpointNotFound,
    CorruptCheckpoint,
    StateMismatch,
    read,
    verify,
)
from checkpoint.format import DIGEST_BYTES
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
