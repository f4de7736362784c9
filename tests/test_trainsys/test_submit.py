"""Runs as jobs on a real Ray cluster, with token authentication, from our command line and from Ray's own."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import checkpoint as ck
from tests import warm
from tests.test_launch.head import Cluster
from tests.test_trainsys import runs

pytestmark = [pytest.mark.ray, pytest.mark.slow]

BIN = Path(sys.executable).parent
ON_RAY = ("--launch.kind=ray", "--launch.cpus_per_rank=0.5", "--evaluation.sample_tokens=0")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with pytest.MonkeyPatch.context() as patch:
        # A cluster's machines have trainsys installed: on this one it is in the environment that runs the tests.
        patch.setenv("PATH", f"{BIN}:{os.environ['PATH']}")
        with Cluster(num_cpus=2) as cluster:
            yield cluster


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write_text(tmp_path_factory.mktemp("text") / "corpus")


def command(cluster: Cluster, *args: str, cwd: Path, fresh: bool = False) -> subprocess.CompletedProcess[str]:
    """Run a command of the environment as a client of the cluster, which needs its token; see `runs.run`."""
    if not fresh:
        with tempfile.TemporaryDirectory(prefix="command-") as folder:
            environ = {**os.environ, **cluster.environ}
            return warm.run(args[0], args[1:], cwd=cwd, folder=Path(folder), environ=environ, timeout_s=240)
    return subprocess.run(
        [str(BIN / args[0]), *args[1:]],
        cwd=cwd,
        env={**os.environ, **cluster.environ},
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_submit_prints_the_job_s_id_follows_its_log_and_exits_with_its_code(
    cluster: Cluster, text: Path, tmp_path: Path
) -> None:
    settings = runs.arguments(*ON_RAY, f"--data.path={text}", f"--run_dir={tmp_path / 'run'}", "--steps=6")
    done = command(cluster, "trainsys", "submit", *settings, "--address", cluster.url, cwd=tmp_path, fresh=True)
    assert done.returncode == 0, done.stderr
    (job_id,) = done.stdout.split()
    assert "step 6/6  loss " in done.stderr
    assert runs.losses(tmp_path / "run").keys() == {1, 2, 3, 4, 5, 6}
    status = command(cluster, "trainsys", "job", "status", job_id, "--address", cluster.url, cwd=tmp_path)
    assert status.stdout == "SUCCEEDED\n"
    log = command(cluster, "trainsys", "job", "logs", job_id, "--address", cluster.url, cwd=tmp_path)
    assert "step 6/6  loss " in log.stdout

    again = command(cluster, "trainsys", "submit", *settings, "--address", cluster.url, cwd=tmp_path)
    assert again.returncode == 1
    assert "already holds a run; --resume continues it" in again.stderr


def test_a_job_that_is_stopped_has_saved_and_resumes(cluster: Cluster, text: Path, tmp_path: Path) -> None:
    settings = runs.arguments(*ON_RAY, f"--data.path={text}", f"--run_dir={tmp_path / 'run'}", "--steps=100000")
    at = ("--address", cluster.url)
    submitted = command(cluster, "trainsys", "submit", *settings, "--no-wait", *at, cwd=tmp_path)
    assert submitted.returncode == 0, submitted.stderr
    job_id = submitted.stdout.strip()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, text=True) as alive:
        runs.wait_for_step(alive, tmp_path / "run", 4)
        alive.communicate("\n")
    stopped = command(cluster, "trainsys", "job", "stop", job_id, *at, cwd=tmp_path)
    assert stopped.returncode == 0, stopped.stderr
    last = runs.last_step(tmp_path / "run")
    with ck.Checkpointer(tmp_path / "run/checkpoints") as checkpointer:
        info = checkpointer.latest(verify="deep")
    assert info is not None
    assert info.step == last, "everything that was trained was saved"

    resumed = [f"--steps={last + 2}" if setting.startswith("--steps") else setting for setting in settings]
    done = command(cluster, "trainsys", "submit", *resumed, "--resume", *at, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"resumes after step {last}" in done.stderr
    assert max(runs.losses(tmp_path / "run")) == last + 2


def test_ray_s_own_job_command_runs_a_recipe_from_the_working_directory(
    cluster: Cluster, text: Path, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    (work / "mine.toml").write_text("[optim]\nlr = 5e-4\n")
    one_rank = ("--steps=4", "--parallel.replicate=1")
    name, *settings = runs.arguments(*ON_RAY, f"--data.path={text}", f"--run_dir={tmp_path / 'run'}", *one_rank)
    submit = ("ray", "job", "submit", "--address", cluster.url, "--working-dir", ".", "--")
    done = command(cluster, *submit, "trainsys", "launch", name, "mine.toml", *settings, cwd=work, fresh=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 4/4  loss " in done.stdout + done.stderr
    assert runs.losses(tmp_path / "run").keys() == {1, 2, 3, 4}


def test_a_client_without_the_token_is_told_what_to_do(cluster: Cluster, text: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [str(BIN / "trainsys"), "submit", *runs.arguments(*ON_RAY), "--address", cluster.url],
        cwd=tmp_path,
        env={**os.environ, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert "ray get-auth-token" in done.stderr
    assert "Traceback" not in done.stderr
