"""Ranks as Ray actors: on a Ray that one driver process keeps for all these tests, or on one of a run's own."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import pytest

from tests.test_launch.client import Driver, noted_pids, runs, wait_for
from tests.test_launch.contract import LauncherContract, Request

pytestmark = pytest.mark.ray
RAY_GONE_S = 20.0


@pytest.fixture(scope="module")
def environ(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, str]]:
    """A home of its own, where Ray puts the token that it makes for a new cluster; a folder for its sessions."""
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:  # Ray needs a short path
        yield {"HOME": str(tmp_path_factory.mktemp("home")), "RAY_TMPDIR": folder, "TMPDIR": folder}


@pytest.fixture(scope="module")
def driver(environ: Mapping[str, str]) -> Iterator[Driver]:
    with Driver("ray", environ) as driver:
        yield driver


class TestRayActors(LauncherContract):
    """The contract, and what only Ray actors promise."""

    kind = "ray"
    cpus_per_rank = 0.5

    @pytest.mark.slow
    def test_a_ray_of_our_own_lives_for_one_run(
        self, request_for: Request, environ: Mapping[str, str], tmp_path: Path
    ) -> None:
        with Driver("local", environ) as driver:
            driver.submit(request_for("until_stopped"))
            driver.until_output("ready")
            assert driver.children()
            driver.signal(signal.SIGTERM)
            assert driver.end()["outcome"] == "stopped"
            assert driver.children() == []
            refused = driver.run(request_for("echo", cpus_per_rank=10_000.0))
            assert (refused["event"], refused["type"]) == ("refused", "PlacementError"), refused
            assert "2 ranks of 10000 CPU each cannot be placed: the cluster has" in refused["text"]
            assert "which is all there will be; use fewer ranks, or lower" in refused["text"]
            assert driver.children() == []
        assert (Path(environ["HOME"]) / ".ray" / "auth_token").exists(), "Ray ran without authentication"

    @pytest.mark.slow
    def test_no_rank_outlives_a_launcher_that_is_killed(
        self, request_for: Request, environ: Mapping[str, str], tmp_path: Path
    ) -> None:
        with Driver("ray", environ) as driver:
            driver.submit(request_for("until_stopped", {"deaf": True, "child": True}))
            driver.until_output("ready")
            wait_for(lambda: len(noted_pids(tmp_path)) == 3, "ranks and child to be noted")
            os.kill(int((tmp_path / "rank0.pid").read_text()), signal.SIGSTOP)
            below = driver.kill()
        try:
            wait_for(lambda: not any(runs(pid) for pid in noted_pids(tmp_path)), "ranks to end", RAY_GONE_S)
        finally:
            for process in below:  # agents of Ray stay for up to a minute
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(below, RAY_GONE_S)
