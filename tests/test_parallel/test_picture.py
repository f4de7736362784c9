"""`python -m parallel mesh`: the picture of a mesh, and the degrees that recipes and flags give it."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel import Coordinates, Mesh, MeshError, ParallelConfig
from parallel.__main__ import main
from parallel.mesh import Axis
from parallel.picture import draw

_degree = st.integers(1, 4)


@st.composite
def _meshes(draw: st.DrawFn) -> Mesh:
    sizes = {axis: draw(_degree) for axis in Coordinates._fields}
    num_data = sizes["replicate"] * sizes["shard"]
    expert = draw(st.sampled_from([n for n in range(1, num_data + 1) if num_data % n == 0]))
    return Mesh(ParallelConfig(**sizes, expert=expert), math.prod(sizes.values()))


def _shown(picture: str) -> list[int]:
    """Return the ranks in the boxes."""
    boxes = [text for line in picture.splitlines() for text in re.findall(r"│([^│]*)│", line)]
    return [int(number) for text in boxes for number in re.findall(r"\d+", text)]


@given(_meshes(), st.integers(0, 9))
def test_a_picture_that_is_wide_enough_shows_every_rank_once_or_says_where_it_leaves_some_out(
    mesh: Mesh, ranks_per_host: int
) -> None:
    picture = draw(mesh, ranks_per_host, width=10_000)
    ranks = _shown(picture)
    if "⋮" in picture:
        assert mesh.data_size > 16
        assert {0, mesh.world_size - 1} <= set(ranks)
    else:
        assert sorted(ranks) == list(range(mesh.world_size))


@given(_meshes(), st.integers(120, 200), st.integers(0, 9))
def test_a_picture_keeps_to_its_width_and_ends_every_line_alike(mesh: Mesh, width: int, ranks_per_host: int) -> None:
    boxes = [line for line in draw(mesh, ranks_per_host, width).splitlines() if re.search("[│┐┘┤╡]$", line)]
    assert len({len(line) for line in boxes}) == 1
    assert len(boxes[0]) <= width


def test_thousands_of_ranks_are_summarised() -> None:
    mesh = Mesh(ParallelConfig(pipeline=8, replicate=8, shard=8, tensor=8, expert=8), 4096)
    picture = draw(mesh, 8, 120)
    assert len(picture.splitlines()) < 30
    assert picture.startswith(
        "4096 ranks = pipeline 8 x replicate 8 x shard 8 x tensor 8; expert 8 in replicate x shard"
    )
    assert re.search(r"tensor +512 groups of 8 +inside hosts +like 0 1 2 3 4 5 6 7\n", picture)
    assert re.search(r"pipeline +512 groups of 8 +across 8 hosts +like 0 512 1024", picture)


def test_a_picture_shows_stages_hosts_and_who_shares_what() -> None:
    mesh = Mesh(ParallelConfig(pipeline=2, shard=2, context=2, tensor=2, expert=2), 16)
    assert draw(mesh, 4, 80).splitlines() == [
        "16 ranks = pipeline 2 x shard 2 x context 2 x tensor 2; expert 2 in replicate x shard; 4 hosts of 4 ranks",
        "",
        "                   stage 0            stage 1",
        "shard expert  ┌─ host 0 ──────┐  ┌─ host 2 ──────┐",
        "    0      0  │  0  1 |  2  3 │  │  8  9 | 10 11 │",
        "              ╞═ host 1 ══════╡  ╞═ host 3 ══════╡",
        "    1      1  │  4  5 |  6  7 │  │ 12 13 | 14 15 │",
        "              └───────────────┘  └───────────────┘",
        "",
        "pipeline        8 groups of 2     across 2 hosts         like 0 8",
        "shard           8 groups of 2     across 2 hosts         like 0 4",
        "context         8 groups of 2     inside hosts           like 0 2",
        "tensor          8 groups of 2     inside hosts           like 0 1",
        "expert          8 groups of 2     across 2 hosts         like 0 4",
    ]


def test_hosts_inside_a_line_are_divided() -> None:
    lines = draw(Mesh(ParallelConfig(tensor=4, context=2), 8), 2, 80).splitlines()
    assert "│ 0 1║2 3 ║ 4 5║6 7 │" in lines[3]
    with pytest.raises(MeshError, match="-1 ranks cannot be on a host"):
        draw(Mesh(ParallelConfig(), 1), -1)


def _print(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["mesh", *arguments])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def _write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_recipes_compose_and_flags_override_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = _write(tmp_path / "one.toml", 'name = "x"\n[parallel]\npipeline = 2\nshard = 4\nsequence = false\n')
    two = _write(tmp_path / "two.toml", "[parallel]\nshard = 2\n[parallel.stages]\nper_rank = 3\n")
    code, out, _ = _print(capsys, one, two, "--tensor=2", "--json", "--ranks-per-host=4")
    assert code == 0
    document = json.loads(out)
    mesh = Mesh(ParallelConfig(pipeline=2, shard=2, tensor=2), 8)
    assert document["world_size"] == 8
    assert document["degrees"] == {a: mesh.size(a) for a in get_args(Axis)}
    assert document["groups"] == {axis: mesh.groups(axis) for axis in ("pipeline", "shard", "tensor")}
    assert document["ranks"][6] == {"rank": 6, **mesh.coordinates(6)._asdict(), "data": 1, "host": 1}
    filled = _print(capsys, one, two, "--world=16", "--fill=replicate", "--json")[1]
    assert json.loads(filled)["degrees"] == document["degrees"] | {"replicate": 4, "tensor": 1}


def test_shipped_recipes_are_found_by_name_without_importing_the_trainer() -> None:
    program = "import sys; from parallel.__main__ import main; main(['mesh', 'tiny']); "
    program += "sys.exit(sum(name in sys.modules for name in ('trainsys', 'torch')))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("2 ranks = replicate 2\n")


def test_groups_are_listed_on_demand(capsys: pytest.CaptureFixture[str]) -> None:
    mesh = Mesh(ParallelConfig(pipeline=2, tensor=2), 4)
    code, out, _ = _print(capsys, "--world=4", "--pipeline=2", "--tensor=2", "--groups", "--width=90")
    assert (code, out) == (0, draw(mesh, 0, 90) + "\npipeline: [0, 2] [1, 3]\ntensor: [0, 1] [2, 3]\n")


def test_what_does_not_fit_ends_with_2_and_all_reasons(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _print(capsys, "--world=3", "--tensor=2")[::2] == (
        2,
        "parallel: degrees multiply to 2 (tensor 2) but there are 3 ranks; "
        "start 2 or choose degrees with the product 3\n",
    )
    bad = _write(tmp_path / "bad.toml", '[parallel]\ntensr = 2\nshard = "4"\ntensor = true\n')
    code, out, err = _print(capsys, bad, str(tmp_path / "none.toml"), "nowhere")
    assert (code, out) == (2, "")
    lines = err.splitlines()
    assert "bad.toml: parallel.shard: '4' is no number of ranks; a whole number of at least 1" in lines
    assert "bad.toml: parallel.tensor: True is no number of ranks; a whole number of at least 1" in lines
    assert any(line.startswith("bad.toml: parallel.tensr: unknown; one of pipeline, ") for line in lines)
    assert any(line.endswith("none.toml: cannot be read: No such file or directory") for line in lines)
    assert any(line.startswith("nowhere: no such recipe (a file must end in .toml); shipped: ") for line in lines)
    broken = [_write(tmp_path / "a.toml", "[parallel"), _write(tmp_path / "b.toml", "parallel = 3")]
    assert re.search(r"a\.toml: not TOML: .*\n.*b\.toml: parallel: 3 is no section", _print(capsys, *broken)[2])
    assert "cannot fill 6 ranks: degrees multiply to 4" in _print(capsys, "--tensor=4", "--world=6", "--fill=shard")[2]


@pytest.mark.parametrize("arguments", [["mesh", "--world", "two"], []])
def test_the_command_ends_with_2_when_it_is_mistyped(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", "parallel", *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr
    assert not done.stdout
    assert "Traceback" not in done.stderr
