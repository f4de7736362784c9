"""A process that runs jobs for the tests, a request per line: `python -m tests.test_launch.driver KIND`.

It stands in for the command line: it has a main thread that signals reach, it can be killed, and what it
costs to start, torch and perhaps a Ray, is paid once. It answers with a line of JSON for each output and end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

import launch
from faulttol.config import HealthConfig, PolicyConfig
from launch import ray_cluster

_SPEAKING = threading.Lock()


def say(**fields: Any) -> None:
    with _SPEAKING:
        sys.__stdout__.write(json.dumps(fields) + "\n")
        sys.__stdout__.flush()


def run(request: dict[str, Any]) -> None:
    """Run one job, and say how it ended."""
    job = launch.Job(**{**request["job"], "log_dir": Path(request["job"]["log_dir"])})
    config = launch.LaunchConfig(**request["config"])
    try:
        result = launch.run(
            job,
            config,
            heartbeat_interval_s=request["heartbeat_interval_s"],
            on_output=lambda output: say(event="output", job=job.name, text=output.decode()),
            recovery=_recovery(request["recovery"]) if "recovery" in request else None,
        )
    except launch.RankFailed as error:
        say(
            event="failed",
            job=job.name,
            rank=error.rank,
            reason=error.reason,
            exit_code=error.exit_code,
            signal=error.signal,
            traceback=error.traceback,
            log_tails=error.log_tails,
            text=str(error),
        )
    except (launch.LaunchError, ValueError) as error:
        say(event="refused", job=job.name, type=type(error).__name__, text=str(error))
    except BaseException:  # a bug: the test should see it rather than wait
        say(event="crashed", job=job.name, text=traceback.format_exc())
        raise
    else:
        say(event="ended", **{"job": job.name, **dataclasses.asdict(result)})


def _recovery(folder: str) -> launch.Recovery:
    """Going on, with notes in a folder, and patience for a busy machine."""
    return launch.Recovery(
        fence=Path(folder) / "generation",
        record=Path(folder) / "recoveries.jsonl",
        health=HealthConfig(frozen_after_s=20.0, stuck_after_s=20.0),
        policy=PolicyConfig(abort_timeout_s=20.0),
    )


def serve(kind: str) -> None:
    """Answer requests until there are no more; keep one Ray for all of them."""
    with ray_cluster.joined("") if kind == "ray" else contextlib.nullcontext():
        say(event="up")
        for line in sys.stdin:
            requests = json.loads(line)
            if len(requests) == 1:
                run(requests[0])  # in the main thread, where signals arrive
                continue
            threads = [threading.Thread(target=run, args=(request,)) for request in requests]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()


if __name__ == "__main__":
    serve(sys.argv[1])
