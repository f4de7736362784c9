"""`python -m checkpoint`: what it prints, and how it exits."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

import pytest
from safetensors.torch import load_file

import checkpoint
from checkpoint import Checkpointer, CheckpointNotFound
from checkpoint.__main__ import main
from checkpoint.terminal import Progress, size_of
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


def test_ls_show_and_verify_print_json(root: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["ls", str(root), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["step"], row["ranks"], row["state"], row["pinned"]) for row in rows] == [
        (1, 2, "ok", False),
        (2, 2, "ok", False),
    ]
    assert main(["show", str(root), "--json", "--names", "flat"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["step"], shown["shared"]) == (2, {"seed": 2})
    assert shown["tensors"] == [
        {"name": "flat", "dtype": "F32", "shape": [60, 7], "slices": 2, "nbytes": 1680, "rank": None}
    ]
    damage(root, 1)
    assert main(["verify", str(root), "--json"]) == 1
    verdict = json.loads(capsys.readouterr().out)
    assert (verdict["ok"], verdict["deep"], len(verdict["problems"])) == (False, True, 1)


def test_show_says_what_each_rank_wrote(root: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["show", str(root), "--json"]) == 0
    written = json.loads(capsys.readouterr().out)["written"]
    shards = [folder(root, 1) / f"r0000{rank}.safetensors" for rank in range(2)]
    assert [(w["rank"], w["nbytes"]) for w in written] == [(i, shard.stat().st_size) for i, shard in enumerate(shards)]
    assert main(["show", str(root)]) == 0
    rows = capsys.readouterr().out.partition("RANK  SLICES")[2].splitlines()[1:3]
    assert [row.split()[0] for row in rows] == ["0", "1"]


def test_what_is_pinned_outlives_gc_until_it_is_unpinned(root: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["pin", str(folder(root, 0))]) == 0
    assert main(["gc", "--keep-last", "1", str(root)]) == 0
    assert main(["ls", str(root)]) == 0
    assert " ok, pinned " in capsys.readouterr().out
    assert main(["unpin", str(folder(root, 0))]) == 0
    assert main(["gc", "--keep-last", "1", str(root)]) == 0
    assert [info.step for info in Checkpointer(root).list()] == [2]
    with pytest.raises(CheckpointNotFound):
        checkpoint.verify(root / "step-00000009.a0.0123456789abcdef")
    assert main(["pin", str(root / "step-00000009.a0.0123456789abcdef")]) == 2


def test_export_to_a_hugging_face_folder_and_back(root: Path, tmp_path: Path):
    (tmp_path / "config").mkdir()
    (tmp_path / "config/config.json").write_text("{}")
    hf, again = tmp_path / "hf", tmp_path / "again"
    how = ["--format", "huggingface", "--max-shard", "1kB", "--config-from", str(tmp_path / "config")]
    assert (
        main(["export", str(root), str(hf), "--names", "[fw]*", "--dtype", "bfloat16", "--strip-prefix", "w", *how])
        == 0
    )
    assert (hf / "config.json").read_text() == "{}"
    assert main(["import", str(hf), str(again), "--step", "7"]) == 0
    whole = values(2)
    expected = {"flat": whole["flat"].bfloat16(), "hole": whole["whole"].bfloat16()}
    assert same(checkpoint.read(again), expected)
    assert Checkpointer(again).list()[0].step == 7


def test_import_of_a_pickle_that_runs_code_exits_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "dcp").mkdir()
    (tmp_path / "dcp/.metadata").write_bytes(b"cos\nsystem\n.")
    assert main(["import", str(tmp_path / "dcp"), str(tmp_path / "root")]) == 2
    assert "needs os.system, which may run code" in capsys.readouterr().err


@pytest.fixture
def terminal() -> Iterator[tuple[TextIO, Callable[[], str]]]:
    """A file that is a terminal, and what has been written to it."""
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as file:

        def read() -> str:
            print("<end>", file=file, flush=True)
            found = b""
            while b"<end>" not in found:  # a terminal hands over what it has, in pieces
                found += os.read(ours, 1 << 16)
            return found.decode().partition("<end>")[0]

        yield file, read
    os.close(ours)


def test_tables_are_drawn_on_a_terminal(
    root: Path, terminal: tuple[TextIO, Callable[[], str]], monkeypatch: pytest.MonkeyPatch
):
    file, read = terminal
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr(sys, "stdout", file)
    assert main(["ls", str(root)]) == 0
    drawn = read()
    assert "─────" in drawn
    assert folder(root, 1).name in drawn


def test_progress_is_shown_on_a_terminal_alone(
    terminal: tuple[TextIO, Callable[[], str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    ticks = iter(range(9))
    with Progress("verified", clock=lambda: float(next(ticks))) as progress:
        progress(1 << 20, 1 << 30)
    assert capsys.readouterr() == ("", "")
    file, read = terminal
    monkeypatch.setattr(sys, "stderr", file)
    with Progress("verified", clock=lambda: float(next(ticks))) as progress:
        progress(1 << 20, 1 << 30)
    first, shown, cleared, _ = read().split("\r")
    assert (first, shown) == ("", "verified 1.0 MiB of 1.0 GiB (1.0 MiB/s)")
    assert not cleared.strip()


@pytest.mark.parametrize(("text", "nbytes"), [("5GB", 5 * 10**9), ("1.5KiB", 1536), ("7", 7), ("2tib", 2 << 40)])
def test_sizes_are_read(text: str, nbytes: int):
    assert size_of(text) == nbytes


@pytest.mark.parametrize("option", [["--max-shard", "much"], ["--dtype", "load"], ["--format", "zip"]])
def test_an_option_that_means_nothing_is_refused(root: Path, option: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        main(["export", str(root), "out", *option])
    assert caught.value.code == 2
    assert option[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ls", "{tmp}/absent"], "absent: holds no checkpoint"),
        (["show", "{tmp}/absent"], "absent: holds no checkpoint"),
        (["verify", "{tmp}/absent"], "absent: holds no checkpoint"),
        (["gc", "{tmp}/absent"], "absent: holds no checkpoint"),
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
