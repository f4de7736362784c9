"""A run that goes on without ranks it lost: in which smaller layouts, behind which fence, from what warm start."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import faulttol
import launch
from checkpoint.names import COMMIT, MARK, AttemptName
from faulttol import fence
from faulttol.durable import is_there
from faulttol.fence import Fence
from faulttol.probing import Answering
from trainsys.check import backend_of, check, data_ranks, num_ranks
from trainsys.config import RunConfig
from trainsys.distrust import distrust, right_until
from trainsys.errors import ConfigError, RunError
from trainsys.folder import RunFolder
from trainsys.precision import outcomes

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from trainsys.setup import Setup


def recovery_of(config: RunConfig, folder: RunFolder) -> launch.Recovery | None:
    """Return what the launcher needs to let the run go on without a lost rank; None if the recipe does not ask."""
    if config.faulttol.mode != "act":
        return None
    return launch.Recovery(
        fence=fence_path(folder),
        record=folder.path / "events" / "recoveries.jsonl",
        smaller_sizes=tuple(smaller_sizes(config)) if config.faulttol.policy.shrink else (),
        first_generation=next_generation(folder),
        total_steps=config.steps,
        saved_step=lambda: saved_step(folder),
        acts_on_outliers=config.faulttol.corruption.gradient_norms,
        distrust=lambda after_step, why: distrust(folder, after_step, why),
        health=config.faulttol.health,
        policy=config.faulttol.policy,
    )


def promise(config: RunConfig) -> str:
    """Return what becomes of the run when a rank is at fault, in one line for a person."""
    watching = config.faulttol
    if watching.mode == "off":
        return "faulttol.mode = off: a rank that dies, freezes or stands still ends the run; --resume continues it"
    looked_for = watching.corruption
    numbers = [
        f"replicas every {looked_for.replicas_every} steps" if looked_for.replicas_every else "",
        f"every {looked_for.products_every}. product of a layer" if looked_for.products_every else "",
        "gradient norms" if looked_for.gradient_norms else "",
    ]
    compared = f", and wrong numbers by {', '.join(filter(None, numbers))}" if any(numbers) else ""
    if watching.mode == "observe":
        ends = "a lost rank ends the run, --resume continues it"
        return f"faulttol.mode = observe: faults{compared} are told and kept in RUN/events; {ends}"
    shrink = "fewer ranks" if watching.policy.shrink and any(smaller_sizes(config)) else "nothing less than all ranks"
    return (
        f"faulttol.mode = act: a rank at fault{compared} is replaced, by {config.launch.spares} spare(s) that wait or "
        f"one that is started, else the run goes on with {shrink}"
    )


def saved_step(folder: RunFolder) -> int:
    """Return the newest step with a committed checkpoint on the local tier that nobody distrusts; -1 before the first.

    Looking costs the supervisor a list of their names, and some names more. Raises: OSError, RunError.
    """
    right = right_until(folder)
    try:
        there = os.listdir(folder.checkpoints)  # says so where the disk does not answer, as `glob` does not
    except FileNotFoundError:
        return -1
    steps = {name: attempt.step for name in there if (attempt := AttemptName.parse(name)) and attempt.step <= right}
    for name in sorted(steps, key=steps.__getitem__, reverse=True):
        path = folder.checkpoints / name
        if is_there(path / COMMIT) and not is_there(path / MARK):
            return steps[name]
    return -1


def observation_of(config: RunConfig, folder: RunFolder) -> launch.Observation | None:
    """Return what the launcher needs to look at what ranks record; None if the recipe does not ask."""
    if config.faulttol.mode == "off":
        return None
    return launch.Observation(
        rings=rings_path(config, folder),
        record=folder.path / "events" / "findings.jsonl",
        health=config.faulttol.health,
        detector=config.faulttol.detector,
        probes=config.faulttol.probes,
        ship_to=config.faulttol.ship_to,
    )


@contextlib.contextmanager
def recorded(config: RunConfig, folder: RunFolder, context: launch.RankContext) -> Iterator[None]:
    """Record the collectives of this process inside the block, if the recipe asks for it.

    A rank whose ring has no room trains without one, and says so: it is better looked after by its heartbeat alone than
    not trained at all.
    """
    if config.faulttol.mode == "off":
        yield
        return
    env = context.env
    rings = rings_path(config, folder)
    try:
        rings.mkdir(parents=True, exist_ok=True)
        faulttol.install(rings, rank=env.rank, world_size=env.world_size, generation=context.generation)
    except OSError as error:
        log.warning("rank %d trains unrecorded, and of its collectives nothing is found out: %s", env.rank, error)
        yield
        return
    try:
        yield
    finally:
        faulttol.uninstall()


def answering(config: RunConfig, folder: RunFolder, context: launch.RankContext) -> Answering | None:
    """Return this rank's side of probes that the launcher asks for; None if nobody looks, or there are no links."""
    if config.faulttol.mode == "off" or not config.faulttol.probes or context.env.world_size == 1:
        return None
    return Answering(rings_path(config, folder), context.env.rank, context.generation)


def rings_path(config: RunConfig, folder: RunFolder) -> Path:
    """Return the folder in which ranks record."""
    return Path(config.faulttol.ring_dir).absolute() if config.faulttol.ring_dir else folder.path / "events"


def fence_path(folder: RunFolder) -> Path:
    """Return where the number of the run's current generation is."""
    return folder.path / "generation"


def next_generation(folder: RunFolder) -> int:
    """Return the number that the run's next start begins with: above those of every earlier one; 0 in a new run.

    Raises:
        RunError: the number of the last one cannot be read.
    """
    try:
        return fence.current_generation(fence_path(folder)) + 1
    except FileNotFoundError:
        return 0
    except (OSError, ValueError) as error:
        raise RunError(
            f"{fence_path(folder)}: cannot tell the last generation of the run: {error}; write the largest number of a "
            "generation that its events name there"
        ) from error


def keep_out_earlier(folder: RunFolder) -> None:
    """Let no rank of an earlier start of the run write any more, where any of those heeds a fence."""
    if fence_path(folder).exists():
        fence.publish(fence_path(folder), next_generation(folder))


def fence_of(config: RunConfig, folder: RunFolder, generation: int) -> Fence | None:
    """Return the fence that a rank of this generation must heed before it writes; None in a run without recovery."""
    return Fence(fence_path(folder), generation) if config.faulttol.mode == "act" else None


def smaller_sizes(config: RunConfig) -> Iterator[int]:
    """Yield the numbers of ranks, from the largest, in which the run can go on with the same batch."""
    for size in range(num_ranks(config.parallel) - 1, 0, -1):
        try:
            check(with_ranks(config, size), world_size=size)
        except ConfigError:
            continue
        yield size


def with_ranks(config: RunConfig, world_size: int) -> RunConfig:
    """Return the run on this many ranks: with fewer, or as many, whole data-parallel replicas, and the same batch.

    Raises:
        ConfigError: no number of replicas makes up that many ranks.
    """
    degrees = config.parallel
    if num_ranks(degrees) == world_size:
        return config
    of_replica = num_ranks(degrees) // data_ranks(degrees)
    replicas, rest = divmod(world_size, of_replica)
    problem = f"config: parallel: {world_size} ranks are no whole number of replicas of {of_replica} ranks"
    if rest or not replicas:
        raise ConfigError([problem])
    if degrees.shard == 1:
        changed = dataclasses.replace(degrees, replicate=replicas)
    elif degrees.replicate == 1:
        changed = dataclasses.replace(degrees, shard=replicas)
    elif replicas % degrees.shard == 0:
        changed = dataclasses.replace(degrees, replicate=replicas // degrees.shard)
    else:
        raise ConfigError([f"{problem}, sharded {degrees.shard} ways"])
    return dataclasses.replace(config, parallel=changed)


def check_links(shared: Setup) -> None:
    """See that all ranks can exchange messages about equally fast, before they train; every rank calls it.

    Raises:
        RunError: they cannot; naming the ranks at the slowest link. On every rank alike.
    """
    from faulttol import preflight

    check = preflight.check_links(device=shared.device.type)
    if not check.ok:
        raise RunError(f"preflight failed:\n{preflight.summary([check])}")


def warm_up(config: RunConfig, folder: RunFolder) -> None:
    """Check this machine, and do what a first start of training would do, so that a generation begins at once.

    Raises:
        RunError: the machine does not compute, remember or store as it should; with what each check found.
    """
    import torch

    from faulttol import preflight

    torch.set_num_threads(1)
    checks = preflight.check_machine(folder.path)
    if not all(check.ok for check in checks):
        raise RunError(f"{socket.gethostname()}: preflight failed:\n{preflight.summary(checks)}")

    if config.engine.device == "cpu" or not torch.cuda.is_available():
        from trainsys.rehearsal import rehearse

        rehearse(config)
    elif any(backend_of(outcome) == "deepspeed" for outcome in outcomes(config)):
        # On a GPU it ends here: a spare does not know yet which one will be its own.
        from trainsys.deepspeed_setup import import_deepspeed

        import_deepspeed("cuda")
