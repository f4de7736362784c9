"""`python -m checkpoint`: what it prints, and how it exits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from checkpoint import Checkpointer
from checkpoint.__main__ import main
from tests.test_checkpoint.worlds import same, saved_by, values


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with the checkpoints of steps 1 and 2, saved by two ranks."""
    saved_by(tmp_path / "root", 2, step=1, seed=1, run_id="one")
    saved_by(tmp_path / "root", 2, step=2, seed=2, run_id="two")
    return tmp_path / "root"


def folder(root: Path, index: int) -> Path:
    """Folder of a checkpoint."""
    return Path(Checkpointer(root).list()[index].path)


def damage(root: Path, index: int) -> None:
    """Flip the last bit of a shard."""
    shard = folder(root, index) / "r00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)


def test_ls_lists_checkpoints_and_attempts(root: Path, capsys: pytest.CaptureFixture[str]):
    (root / "step-00000003.a0.0123456789abcdef").mkdir()
    assert main(["ls", str(root)]) == 0
    header, *rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert header == ["STEP", "COMMITTED", "RANKS", "SIZE", "STATE", "FOLDER"]
    assert [(row[0], row[-2]) for row in rows] == [("1", "ok"), ("2", "ok"), ("3", "uncommitted")]


def test_ls_tells_damaged_checkpoints(root: Path, capsys: pytest.CaptureFixture[str]):
    (folder(root, 0) / "r00000.safetensors").unlink()
    (folder(root, 1) / "COMMIT.json").write_text("{}")
    assert main(["ls", str(root)]) == 1
    printed = capsys.readouterr()
    assert [line.split()[-2] for line in printed.out.splitlines()[1:]] == ["damaged", "damaged"]
    assert "r00000.safetensors is missing" in printed.err
    assert "COMMIT.json: format: None is not a format of this package" in printed.err


def test_show_describes_a_checkpoint_and_its_tensors(root: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["show", str(root), "--names", "[fs]*"]) == 0
    out = capsys.readouterr().out
    assert "step      2\n" in out
    assert "run       two, 2 ranks" in out
    assert "shared    {'seed': 2}" in out
    rows = [line.split() for line in out.partition("TENSOR")[2].splitlines()[1:]]
    assert sorted(rows) == [
        ["flat", "F32", "60x7", "2", "1.6", "KiB", "-"],
        ["scalar", "I64", "scalar", "1", "8", "B", "-"],
    ]


def test_show_names_the_rank_of_what_is_rank_local(root: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["show", str(folder(root, 0)), "--names", "rng"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[-2:]]
    assert [row[-1] for row in rows] == ["0", "1"]


def test_verify_says_ok(root: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["verify", str(root)]) == 0
    assert main(["verify", "--quick", str(folder(root, 0))]) == 0
    deep, quick = capsys.readouterr().out.splitlines()
    assert ": ok (every byte, " in deep
    assert ": ok (sizes and slice table, " in quick


def test_verify_exits_with_1_and_names_what_is_damaged(root: Path, capsys: pytest.CaptureFixture[str]):
    damage(root, 1)
    assert main(["verify", str(root)]) == 1
    printed = capsys.readouterr()
    assert ": 1 problem (" in printed.out
    assert "r00001.safetensors: tensor 'rng'" in printed.err
    assert main(["verify", "--quick", str(root)]) == 0
    assert main(["verify", str(folder(root, 0))]) == 0


def test_export_writes_the_tensors_asked_for(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "out.safetensors"
    assert main(["export", str(root), str(out), "--names", "flat"]) == 0
    assert same(load_file(out), {"flat": values(2)["flat"]})
    assert str(out) in capsys.readouterr().out


def test_export_of_damaged_tensors_exits_with_1(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (folder(root, 1) / "r00000.safetensors").write_bytes(b"")
    assert main(["export", str(folder(root, 1)), str(tmp_path / "out")]) == 1
    assert "has 0 bytes instead of" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_gc_removes_abandoned_attempts_alone(root: Path, capsys: pytest.CaptureFixture[str]):
    old, new = root / "step-00000003.a0.0123456789abcdef", root / "step-00000004.a0.0123456789abcdef"
    for path, age_s in ((old, 7200), (new, 60)):
        path.mkdir()
        (path / "r00000.safetensors").touch()
        written_s = path.stat().st_mtime - age_s
        for written in (path / "r00000.safetensors", path):
            os.utime(written, (written_s, written_s))
    assert main(["gc", "--dry-run", str(root)]) == 0
    assert capsys.readouterr().out == f"would remove {old.name}\n"
    assert main(["gc", str(root)]) == 0
    assert capsys.readouterr().out == f"removed {old.name}\n"
    assert (old.exists(), new.exists()) == (False, True)
    assert [info.step for info in Checkpointer(root).list()] == [1, 2]


def test_gc_keeps_as_many_as_told(root: Path):
    assert main(["gc", "--keep-last", "1", str(root)]) == 0
    assert [info.step for info in Checkpointer(root).list()] == [2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ls", "{tmp}/absent"], "absent: holds no checkpoint"),
        (["show", "{tmp}/absent"], "absent: holds no checkpoint"),
        (["verify", "{tmp}/absent"], "absent: holds no checkpoint"),
        (["show", "{tmp}/root", "--names", "zip*"], "holds no tensor named 'zip*'"),
        (["export", "{tmp}/root", "{tmp}/out", "--names", "zip"], "holds no tensor named 'zip'"),
        (["gc", "--keep-last", "0", "{tmp}/root"], "--keep-last: 0; allowed are integers from 1"),
        (["ls", "nosuch://bucket"], "nosuch://bucket: cannot open: Protocol not known"),
    ],
)
def test_what_cannot_be_done_exits_with_2_and_one_line(
    root: Path, tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    assert main([argument.replace("{tmp}", str(tmp_path)) for argument in arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("checkpoint: ")
    assert message in printed.err
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize("command", [[], ["ls"], ["show"], ["verify"], ["export"], ["gc"]])
def test_every_command_explains_itself(command: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as left:
        main([*command, "--help"])
    assert left.value.code == 0
    assert "usage: python -m checkpoint" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["dance"], ["ls"], ["verify", "a", "b"]])
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2
    assert "usage: python -m checkpoint" in capsys.readouterr().err


def test_the_module_runs_as_a_command(root: Path):
    done = subprocess.run(
        [sys.executable, "-m", "checkpoint", "verify", "--quick", str(root)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert ": ok (" in done.stdout
