"""A run as a job of a Ray cluster: the resolved recipe travels in the job's arguments, the cluster launches it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from launch import ray_job
from trainsys import recipe
from trainsys.check import check
from trainsys.config import RunConfig
from trainsys.recipe import Resolved


def submit_run(resolved: Resolved, *, address: str, resume: bool, working_dir: Path | None) -> str:
    """Submit `trainsys launch` of `resolved`, on Ray actors, and return the job's id.

    With `working_dir` that folder is uploaded and the job runs inside it, so that code in it comes before what is
    installed on the cluster. The run's folder should lie on storage that all machines share: a relative `run_dir`
    lies in the job's working folder on the head node.

    Raises:
        ConfigError: the recipe does not hold together; launch.LaunchError: the cluster refused or is out of reach.
    """
    config = dataclasses.replace(resolved.config, launch=dataclasses.replace(resolved.config.launch, kind="ray"))
    check(config, sources=resolved.sources)
    argv = ["trainsys", "launch", *overrides_of(config)]
    if resume:
        argv.append("--resume")
    return ray_job.submit(argv, address=address, working_dir=working_dir, stop_grace_s=config.launch.stop_grace_s)


def overrides_of(config: RunConfig) -> list[str]:
    """Return the `--key=value` arguments that rebuild `config` from the defaults, without any recipe file."""
    defaults = dict(recipe.leaves(recipe.to_tree(RunConfig(name="", steps=0))))
    return [
        f"--{key}={value if isinstance(value, str) else json.dumps(value)}"
        for key, value in recipe.leaves(recipe.to_tree(config))
        if value != defaults[key]
    ]
