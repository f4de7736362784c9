"""Commands as jobs of a Ray cluster, through the HTTP address of its head (`http://HOST:8265`).

Ray's authentication token goes with every request; it is found where Ray looks for it (see `ray_cluster`).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from launch import ray_cluster
from launch.config import LaunchConfig
from launch.errors import ClusterError, JobNotFound, LaunchError

_POLL_S = 0.5
_STOP_MARGIN_S = 10  # for the launcher itself, once its ranks have left
_STOPPED_EXIT_CODE = 143  # as a shell tells SIGTERM: Ray keeps no exit code of a job that was stopped
_ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


def submit(
    argv: Sequence[str],
    *,
    address: str,
    working_dir: Path | None = None,
    env: Mapping[str, str] | None = None,
    stop_grace_s: float = LaunchConfig().stop_grace_s,
) -> str:
    """Start `argv` as a job on the cluster's head and return the job's id.

    `working_dir` is uploaded, and is the current folder of the job and of its ranks; `env` is set in all of
    them. Asked to stop, the job gets a little over `stop_grace_s` before Ray kills it.

    Raises: ClusterError, TokenError; LaunchError when the cluster refuses the job.
    """
    # Ray's own grace is 3 s, shorter than a rank takes to save.
    variables = {**(env or {}), "RAY_JOB_STOP_WAIT_TIME_S": str(int(stop_grace_s) + _STOP_MARGIN_S)}
    runtime_env: dict[str, Any] = {"env_vars": variables}
    if working_dir is not None:
        runtime_env["working_dir"] = str(working_dir)
    # `exec` leaves no shell between Ray, which signals, and the command.
    with _errors(address):
        job_id: str = _client(address).submit_job(entrypoint=f"exec {shlex.join(argv)}", runtime_env=runtime_env)
    return job_id


def status(job_id: str, *, address: str) -> str:
    """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED.

    Raises: JobNotFound, ClusterError, TokenError; so do all functions below.
    """
    return str(_details(job_id, address).status)


def logs(job_id: str, *, address: str, follow: bool = False) -> Iterator[str]:
    """What the job has printed, in pieces; with `follow` until it ends."""
    status(job_id, address=address)  # an unknown job is told here, not at the first piece
    return _follow(job_id, address) if follow else _printed(job_id, address)


def stop(job_id: str, *, address: str) -> str:
    """Ask the job to stop, wait until it has ended, and return its last status."""
    with _errors(address, job_id):
        _client(address).stop_job(job_id)
    return str(_wait(job_id, address).status)


def wait(job_id: str, *, address: str) -> int:
    """Wait until the job has ended and return its exit code; 143 for a job that was stopped.

    Raises: LaunchError for a job that ended before its command ran.
    """
    ended = _wait(job_id, address)
    if ended.driver_exit_code is not None:
        return int(ended.driver_exit_code)
    if str(ended.status) == "STOPPED":
        return _STOPPED_EXIT_CODE
    raise LaunchError(f"job {job_id} at {address}: {ended.status}: {ended.message}")


def _client(address: str) -> Any:
    url = urlsplit(address)
    if url.scheme not in ("http", "https") or not url.hostname:
        raise ClusterError(f"{address}: not the HTTP address of a Ray head, such as http://127.0.0.1:8265")
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        # Ray would silently prefer it to the address it is given.
        if os.environ.get(name, address) != address:
            raise ClusterError(f"{address}: {name} is set to {os.environ[name]}, which Ray would use; unset it")
    ray_cluster.probe(url.hostname, url.port or (443 if url.scheme == "https" else 80), address)
    ray_cluster.import_ray()
    from ray.job_submission import JobSubmissionClient

    token = ray_cluster.find_token(os.environ)
    return JobSubmissionClient(address, headers={"Authorization": f"Bearer {token}"} if token else {})


@contextlib.contextmanager
def _errors(address: str, job_id: str = "") -> Iterator[None]:
    """Turn what Ray's client raises into this package's errors."""
    ray = ray_cluster.import_ray()
    try:
        yield
    except LaunchError:
        raise
    except ray.exceptions.AuthenticationError as error:
        has = "the authentication token of this process is not the cluster's"
        lacks = "the cluster wants an authentication token, and this process has none"
        what = has if ray_cluster.find_token(os.environ) else lacks
        raise ray_cluster.token_error(address, what) from error
    except ConnectionError as error:
        raise ClusterError(f"{address}: {error}") from error
    except (RuntimeError, ValueError) as error:
        if job_id and "404" in str(error):
            raise JobNotFound(f"{address}: knows no job {job_id}; `ray job list` shows its jobs") from error
        raise LaunchError(f"{address}: {error}") from error


def _details(job_id: str, address: str) -> Any:
    with _errors(address, job_id):
        return _client(address).get_job_info(job_id)


def _wait(job_id: str, address: str) -> Any:
    while str((details := _details(job_id, address)).status) not in _ENDED:
        time.sleep(_POLL_S)
    return details


def _printed(job_id: str, address: str) -> Iterator[str]:
    with _errors(address, job_id):
        yield _client(address).get_job_logs(job_id)


def _follow(job_id: str, address: str) -> Iterator[str]:
    with _errors(address, job_id), asyncio.Runner() as runner:
        pieces = _client(address).tail_job_logs(job_id)
        try:
            while (piece := runner.run(anext(pieces, None))) is not None:
                yield piece
        finally:
            runner.run(pieces.aclose())
