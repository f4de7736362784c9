"""Clusters that somebody else started: jobs on them, ranks on them, and what may be wrong with the way there."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from faulttol.config import HealthConfig
from launch import ClusterError, JobNotFound, TokenError, ray_cluster, ray_job
from tests.test_launch.client import Driver, wait_for
from tests.test_launch.head import Cluster

pytestmark = [
    pytest.mark.ray,
    # Ray's job client follows logs through an argument that aiohttp would rather not have.
    pytest.mark.filterwarnings("ignore:ssl=None is deprecated:DeprecationWarning"),
]

# Saves for longer than the 3 s that Ray gives a job of its own accord. Ray logs the command: look for whole lines.
SAVES_SLOWLY = """
import signal, sys, time
def save(*_):
    time.sleep(4)
    print("saved", flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
print("ready", flush=True)
while True:
    time.sleep(1)
"""
LAUNCHES = """
from pathlib import Path
import launch
job = launch.Job(entry="work:main", world_size=2, log_dir=Path("logs"), name="inner")
config = launch.LaunchConfig(kind="ray", cpus_per_rank=0.5)
result = launch.run(job, config, heartbeat_interval_s=0.5, on_output=lambda output: None)
print("result", result.results)
"""
WORK = """
import ray
def main(context, payload):
    return [context.env.rank, ray.get_runtime_context().gcs_address]
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(num_cpus=2) as cluster:
        yield cluster


@pytest.fixture
def with_token(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """The cluster, with its token in this process's environment, and no other way to it."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(cluster.token_path))
    return cluster


def python(code: str) -> list[str]:
    return [sys.executable, "-u", "-c", code]


def job_for(cluster: Cluster, folder: Path, entry: str, **settings: Any) -> dict[str, Any]:
    return {
        "job": {
            "entry": f"tests.test_launch.entries:{entry}",
            "payload": {"folder": str(folder), "num_steps": 3, "word": "hello"},
            "world_size": 2,
            "log_dir": str(folder / "logs"),
            "name": "job",
        },
        "config": {
            "kind": "ray",
            "ray_address": cluster.address,
            "start_timeout_s": 120.0,
            "cpus_per_rank": 1.0,
            **settings,
        },
        "heartbeat_interval_s": 0.1,
    }


# These come first: the cluster that the others share would run beside theirs.
@pytest.mark.slow
@pytest.mark.alone
def test_ranks_on_two_nodes_know_their_places_and_are_watched(tmp_path: Path) -> None:
    with Cluster(num_cpus=1) as cluster, Driver("local", cluster.environ) as driver:
        cluster.add_node(num_cpus=1)
        end = driver.run(job_for(cluster, tmp_path, "places"))
        assert end["event"] == "ended", end
        assert end["results"] == [[0, 0, 1, 0], [1, 0, 1, 1]]  # rank 0 beside the driver, on the head
        kill = job_for(cluster, tmp_path, "steps")
        kill["job"]["payload"]["faults"] = [{"kind": "kill", "rank": 1, "step": 2}]
        end = driver.run(kill)
        assert (end["event"], end["rank"], end["reason"]) == ("failed", 1, "died"), end
        # Its last words were fetched from its node after it had died.
        assert end["log_tails"]["1"] == "rank 1 did step 0\nrank 1 did step 1\n"


@pytest.mark.slow
@pytest.mark.alone
def test_a_lost_agent_costs_nothing_and_a_lost_node_its_rank_alone(tmp_path: Path) -> None:
    with Cluster(num_cpus=1) as cluster, Driver("local", cluster.environ) as driver:
        cluster.add_node(num_cpus=1)
        request = job_for(cluster, tmp_path, "generations")
        driver.submit(request | {"recovery": str(tmp_path)})
        driver.until_output("generation 0 did step 20")
        agents = cluster.pids("ray::AgentActor")
        assert len(agents) == 2, "one a node"
        for pid in agents:
            os.kill(pid, signal.SIGKILL)
        wait_for(lambda: len(cluster.pids("ray::AgentActor")) == 2, "agents in their places", 30.0)
        assert not set(agents) & set(cluster.pids("ray::AgentActor"))
        # For longer than lost_after_s, after which nodes without a word count as lost: a step takes 10 ms at least.
        driver.until_output(f"generation 0 did step {200 * round(HealthConfig().lost_after_s)}")
        assert not (tmp_path / "recoveries.jsonl").exists()
        pids = [int((tmp_path / f"rank{rank}.pid").read_text()) for rank in range(2)]
        gone = cluster.kill_added_node()  # either rank's: not the head, which has all that Ray knows
        (lost,) = (rank for rank, pid in enumerate(pids) if pid in gone)
        cluster.add_node(num_cpus=1)  # where the lost rank's successor starts
        driver.until_output("generation 1 did step 20")
        (tmp_path / "finish").touch()
        end = driver.end()
        assert end["event"] == "ended", end
        (recovery,) = (tmp_path / "recoveries.jsonl").read_text().splitlines()
        assert [loss["rank"] for loss in json.loads(recovery)["losses"]] == [lost]


def test_a_job_is_submitted_followed_and_waited_for(with_token: Cluster) -> None:
    url = with_token.url
    job_id = ray_job.submit(
        python("import os; print('hello from', os.environ['WHO'])"), address=url, env={"WHO": "a job"}
    )
    assert "hello from a job" in "".join(ray_job.logs(job_id, address=url, follow=True))
    assert ray_job.wait(job_id, address=url) == 0
    assert ray_job.status(job_id, address=url) == "SUCCEEDED"
    assert "hello from a job" in "".join(ray_job.logs(job_id, address=url))
    assert ray_job.stop(job_id, address=url) == "SUCCEEDED"


def test_the_exit_code_is_the_jobs(with_token: Cluster) -> None:
    job_id = ray_job.submit(python("raise SystemExit(3)"), address=with_token.url)
    assert ray_job.wait(job_id, address=with_token.url) == 3
    assert ray_job.status(job_id, address=with_token.url) == "FAILED"


def test_a_job_that_is_stopped_gets_the_grace_it_was_submitted_with(with_token: Cluster) -> None:
    url = with_token.url
    job_id = ray_job.submit(python(SAVES_SLOWLY), address=url, stop_grace_s=30.0)
    wait_for(lambda: "\nready\n" in "".join(ray_job.logs(job_id, address=url)), "the job to be ready", 60.0)
    assert ray_job.status(job_id, address=url) == "RUNNING"
    assert ray_job.stop(job_id, address=url) == "STOPPED"
    assert "\nsaved\n" in "".join(ray_job.logs(job_id, address=url))
    assert ray_job.wait(job_id, address=url) == 143


def test_a_launch_inside_a_job_runs_on_the_jobs_cluster(with_token: Cluster, tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text(LAUNCHES)
    (tmp_path / "work.py").write_text(WORK)
    job_id = ray_job.submit([sys.executable, "main.py"], address=with_token.url, working_dir=tmp_path)
    log = "".join(ray_job.logs(job_id, address=with_token.url, follow=True))
    assert ray_job.wait(job_id, address=with_token.url) == 0, log
    assert f"result {[[rank, with_token.address] for rank in range(2)]}" in log


@pytest.mark.parametrize(
    "ask",
    [
        lambda url: ray_job.status("nobody", address=url),
        lambda url: ray_job.stop("nobody", address=url),
        lambda url: ray_job.wait("nobody", address=url),
        lambda url: ray_job.logs("nobody", address=url),
        lambda url: ray_job.logs("nobody", address=url, follow=True),
    ],
    ids=["status", "stop", "wait", "logs", "follow"],
)
def test_an_unknown_job_is_said_to_be_unknown(with_token: Cluster, ask: Callable[[str], object]) -> None:
    with pytest.raises(JobNotFound, match="knows no job nobody"):
        ask(with_token.url)


def test_a_missing_token_is_one_error_with_its_remedy(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    with pytest.raises(TokenError, match="this process has none; print the token with `ray get-auth-token`"):
        ray_job.submit(["true"], address=cluster.url)


def test_a_wrong_token_is_one_error_with_its_remedy(with_token: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "not this one")
    with pytest.raises(TokenError, match="is not the cluster's; print the token with `ray get-auth-token`"):
        ray_job.status("any", address=with_token.url)


def test_an_address_that_nobody_answers_is_named() -> None:
    with pytest.raises(ClusterError, match=r"http://127\.0\.0\.1:1: no Ray answers"):
        ray_job.status("any", address="http://127.0.0.1:1")


def test_an_address_that_is_no_url_is_refused() -> None:
    with pytest.raises(ClusterError, match="not the HTTP address of a Ray head, such as http://"):
        ray_job.status("any", address="10.0.0.1:6379")


def test_an_address_that_ray_would_ignore_is_refused(with_token: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(ClusterError, match=r"RAY_ADDRESS is set to 10\.0\.0\.1:6379, .* unset it"):
        ray_job.status("any", address=with_token.url)


def test_ranks_run_on_a_cluster_that_is_named(cluster: Cluster, tmp_path: Path) -> None:
    environ = {name: value for name, value in cluster.environ.items() if name != "RAY_AUTH_MODE"}
    with Driver("local", environ) as driver:
        end = driver.run(job_for(cluster, tmp_path, "echo"))
        assert end["event"] == "ended", end
        assert [result["rank"] for result in end["results"]] == [0, 1]
        refused = driver.run(job_for(cluster, tmp_path, "echo", cpus_per_rank=1.5, start_timeout_s=1.0))
        assert (refused["event"], refused["type"]) == ("refused", "PlacementError"), refused
        assert "2 ranks of 1.5 CPU each cannot be placed: the cluster has" in refused["text"]
        assert "2 CPU, 2 CPU of it free, and had no room in 1 s" in refused["text"]
        nobody = driver.run(job_for(cluster, tmp_path, "echo", ray_address="127.0.0.1:1"))
        assert (nobody["event"], nobody["type"]) == ("refused", "ClusterError"), nobody
        assert "127.0.0.1:1: no Ray answers" in nobody["text"]


def test_ranks_are_refused_with_a_wrong_token(cluster: Cluster, tmp_path: Path) -> None:
    # Ray retries a refused token twenty times.
    environ = {**cluster.environ, "RAY_AUTH_TOKEN": "not this one", "RAY_NUM_REDIS_GET_RETRIES": "1"}
    with Driver("local", environ) as driver:
        refused = driver.run(job_for(cluster, tmp_path, "echo"))
    assert (refused["event"], refused["type"]) == ("refused", "TokenError"), refused
    assert "the authentication token of this process is not the cluster's" in refused["text"]
    assert "ray get-auth-token" in refused["text"]


def test_the_token_is_found_where_ray_looks_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert ray_cluster.find_token({}) == ""
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("default\n")
    assert ray_cluster.find_token({}) == "default"
    (tmp_path / "named").write_text("named\n")
    assert ray_cluster.find_token({"RAY_AUTH_TOKEN_PATH": str(tmp_path / "named")}) == "named"
    both = {"RAY_AUTH_TOKEN": "value", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "named")}
    assert ray_cluster.find_token(both) == "value"
    with pytest.raises(TokenError, match=r"RAY_AUTH_TOKEN_PATH: .*nowhere: cannot be read"):
        ray_cluster.find_token({"RAY_AUTH_TOKEN_PATH": str(tmp_path / "nowhere")})
