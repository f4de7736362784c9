"""Every recipe of many GPUs runs on a CPU as its header says, through Ray actors."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import trainsys
from tests import warm
from tests.test_launch.head import Cluster
from tests.test_trainsys import runs
from trainsys import metrics, recipe
from trainsys.check import check, num_ranks

FOLDER = Path(trainsys.__file__).parent / "recipes"
LINE = "# On a CPU:  trainsys launch "
RECIPES = sorted(path.stem for path in FOLDER.glob("*.toml") if LINE in path.read_text(encoding="utf-8"))


def command(name: str) -> list[str]:
    """What the recipe's header says to launch on a CPU."""
    lines = (FOLDER / f"{name}.toml").read_text(encoding="utf-8").splitlines()
    (line,) = [line for line in lines if line.startswith(LINE)]
    return line.removeprefix(LINE).split()


def test_there_is_a_recipe_for_each_kind_of_parallelism() -> None:
    expected = ["long_context", "pretrain_3d", "pretrain_dp", "pretrain_moe", "pretrain_pp", "pretrain_tp"]
    assert expected == RECIPES


@pytest.mark.parametrize("name", RECIPES)
def test_the_cpu_form_of_a_recipe_holds_together_and_keeps_its_kinds(name: str) -> None:
    """Whatever has more than one rank in the recipe has two on the CPU, but for data ranks beside other kinds."""
    words = command(name)
    names = [word for word in words if not word.startswith("--")]
    assert names == [name, "cpu_smoke"]
    big = recipe.load([name]).config
    small = recipe.load(names, words[2:]).config
    check(big)
    check(small, world_size=num_ranks(small.parallel))
    for axis in ("pipeline", "context", "tensor", "expert"):
        assert (getattr(big.parallel, axis) > 1) == (getattr(small.parallel, axis) == 2), axis
    assert num_ranks(small.parallel) <= 4


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(num_cpus=2) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write_text(tmp_path_factory.mktemp("text") / "corpus")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains_saves_evaluates_and_exports_on_a_cpu(
    name: str, cluster: Cluster, text: Path, tmp_path: Path
) -> None:
    settings = [
        f"--data.path={text}",
        f"--data.cache_dir={text.parent / 'prepared'}",
        f"--run_dir={tmp_path / 'run'}",
        f"--launch.ray_address={cluster.address}",
        # A slow machine must not look like a fault.
        "--launch.start_timeout_s=300",
        "--launch.frozen_timeout_s=60",
    ]
    done = warm.run(
        "trainsys",
        ["launch", *command(name), *settings],
        cwd=tmp_path,
        folder=tmp_path,
        environ={**os.environ, **cluster.environ},
        timeout_s=240,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{runs.logs(tmp_path / 'run')}"
    losses = runs.losses(tmp_path / "run")
    assert losses.keys() == {1, 2, 3, 4}
    assert losses[4] < losses[1]
    records = metrics.read(tmp_path / "run/metrics.jsonl")
    assert any(math.isfinite(record.get("validation/loss", math.nan)) for record in records)
    assert (tmp_path / "run/model/model.safetensors").exists()
