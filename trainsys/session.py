"""Starting a run: in this process as one rank, through a launcher, or as a job on a Ray cluster."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable
from typing import Any, Literal

import launch
from launch import Job, JobResult, RankContext, RankEnv
from trainsys import elastic, folder, recipe
from trainsys.check import check, num_ranks
from trainsys.config import RunConfig
from trainsys.errors import ConfigError, RunError
from trainsys.recipe import Resolved

ENTRY = "trainsys.trainer:run_rank"


def train_here(resolved: Resolved, *, resume: bool) -> str:
    """Train as the one rank this process is (torchrun's, or the only one); return the outcome.

    Raises:
        ConfigError: the recipe's degrees do not multiply to the number of ranks, and what `check` finds.
    """
    from trainsys.trainer import train

    try:
        RankEnv.from_environ(os.environ)
    except ValueError as error:
        raise ConfigError(str(error).splitlines()) from error
    with contextlib.ExitStack() as stack:
        context = stack.enter_context(RankContext.open(os.environ))
        config = folder.as_begun(resolved.config, resume=resume)
        check(config, world_size=context.env.world_size, sources=resolved.sources)
        if resolved.config.faulttol.mode == "act":
            source = resolved.sources.get("faulttol.mode", "config")
            raise ConfigError(
                [
                    f"{source}: faulttol.mode: 'act' needs the launcher that replaces ranks (`trainsys launch`); "
                    "allowed here: 'off', 'observe'"
                ]
            )
        os.environ.update(context.env.to_environ())
        return train(
            context,
            resolved.config,
            lambda: _opened(stack.enter_context(folder.open_run(resolved, resume=resume))),
            resume=resume,
            threads=threads_per_rank(resolved.config),
        ).outcome


def launch_ranks(resolved: Resolved, *, resume: bool, on_output: Callable[[bytes], None]) -> JobResult:
    """Start every rank with the launcher of the recipe, watch them, and return when all have left.

    Raises:
        ConfigError, RunError: before anything starts; launch.LaunchError: a rank failed, or none could start.
    """
    check(folder.as_begun(resolved.config, resume=resume), sources=resolved.sources)
    memory = resolved.config.checkpoint.memory
    if resolved.config.launch.kind == "local" and memory.every and memory.peers:
        source = resolved.sources.get("checkpoint.memory.peers", "config")
        problem = f"{memory.peers} copies on other hosts, and launch.kind = 'local' has one host; allowed: 0"
        raise ConfigError([f"{source}: checkpoint.memory.peers: {problem}"])
    config = _with_console(resolved.config)
    with folder.open_run(resolved, resume=resume) as run:
        if config.faulttol.mode != "act":  # where it is, recovery does
            elastic.keep_out_earlier(run)
        on_output(f"[{config.name}] {elastic.promise(config)}\n".encode())
        job = Job(
            entry=ENTRY,
            payload=rank_payload(config, run, resume=resume, threads=threads_per_rank(config)),
            world_size=num_ranks(config.parallel),
            log_dir=run.logs,
            name=config.name,
        )
        result = launch.run(
            job,
            config.launch,
            heartbeat_interval_s=config.faulttol.heartbeat_interval_s,
            on_output=on_output,
            observation=elastic.observation_of(config, run),
            recovery=elastic.recovery_of(config, run),
        )
    if result.killed:
        raise RunError(
            f"{run.path}: asked to stop, {len(result.killed)} rank(s) had not saved, within launch.stop_grace_s = "
            f"{config.launch.stop_grace_s:g} s or for want of a lost rank, and were killed; --resume continues from "
            "the last checkpoint before"
        )
    return result


def rank_payload(config: RunConfig, run: folder.RunFolder, *, resume: bool, threads: int = 1) -> dict[str, Any]:
    """Return what `trainer.run_rank` needs, as JSON values; `threads` are the CPU threads a rank computes with."""
    return {
        "config": recipe.to_tree(config),
        "folder": str(run.path),
        "resume": resume,
        "first_generation": elastic.next_generation(run),
        "threads": threads,
        "cwd": os.getcwd(),
    }


def outcome_of(result: JobResult) -> str:
    """Return how the run ended, as its ranks tell it: a stop that came after the last step stopped nothing."""
    return next((rank["outcome"] for rank in result.results if rank), result.outcome)


def threads_per_rank(config: RunConfig) -> int:
    """Return the CPU threads one rank computes with: what the launcher reserves for it."""
    return max(1, int(config.launch.cpus_per_rank))


def _opened(run: folder.RunFolder) -> folder.RunFolder:
    elastic.keep_out_earlier(run)
    return run


def _with_console(config: RunConfig) -> RunConfig:
    """Settle `metrics.console = auto` here, where the terminal is; ranks only see a pipe."""
    if config.metrics.console != "auto":
        return config
    console: Literal["rich", "plain"] = "rich" if sys.stdout.isatty() else "plain"
    return dataclasses.replace(config, metrics=dataclasses.replace(config.metrics, console=console))
