"""`run`: one job, from its start to its end, by the launcher that the configuration names."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager

from faulttol import probing
from faulttol.ring import remove_rings
from launch import elastic, local, ray_actors, ray_fleet
from launch.config import LaunchConfig
from launch.diagnosis import Diagnosis, Observation
from launch.fleet import Fleet, Recovery
from launch.job import Job, JobResult
from launch.supervisor import Ranks, log_path, supervise
from launch.verdict import Limits

log = logging.getLogger(__name__)

Start = Callable[[Job, LaunchConfig, float], AbstractContextManager[Ranks]]

StartFleet = Callable[[Job, LaunchConfig, float], AbstractContextManager[Fleet]]

_FLEET_BY_KIND: Mapping[str, StartFleet] = {"local": local.start_fleet, "ray": ray_fleet.start_fleet}
_START_BY_KIND: Mapping[str, Start] = {"local": local.start, "ray": ray_actors.start}


def run(
    job: Job,
    config: LaunchConfig,
    *,
    heartbeat_interval_s: float,
    on_output: Callable[[bytes], None],
    observation: Observation | None = None,
    recovery: Recovery | None = None,
) -> JobResult:
    """Run `job` on all its ranks and block until it ended; no rank outlives the call or the calling process.

    With `observation` what its ranks record is looked at, and findings are told and kept. With `recovery` the job
    goes on without ranks that are lost; its entry does its work in `RankContext.run`.

    `on_output` gets what rank 0 prints, as it appears; where it raises OSError, as on a full disk or a pipe that nobody
    reads any more, the job goes on: all is in `log_dir` as well. SIGTERM or SIGINT asks every rank to stop, kills what
    is left after `config.stop_grace_s`, and ends in the outcome "stopped"; a second SIGINT kills at once.
    That needs the main thread: called from another one, signals are the caller's.

    Raises: RankFailed for a rank that raised, died, froze, hung or never joined; ValueError for a job or
    configuration that cannot run; LaunchError when the ranks cannot be started.
    """
    job.check()
    _check(config, heartbeat_interval_s)
    if recovery is not None:
        elastic.refuse_if_begun(recovery)  # before anything of the other launch is touched
    _empty_logs(job)
    limits = Limits(
        start_timeout_s=config.start_timeout_s,
        frozen_timeout_s=config.frozen_timeout_s,
        hang_timeout_s=config.hang_timeout_s,
        exit_timeout_s=config.stop_grace_s,
        heartbeat_interval_s=heartbeat_interval_s,
    )
    grace_s = config.stop_grace_s
    on_output = _enduring(on_output)
    with contextlib.ExitStack() as stack:
        diagnosis = None
        if observation is not None:
            # Before a rank records: what is of an earlier launch would be taken for its own.
            remove_rings(observation.rings)
            probing.remove(observation.rings)
            stack.enter_context(_shipping(observation, lambda text: on_output(f"[{job.name}] {text}\n".encode())))
            diagnosis = stack.enter_context(contextlib.closing(Diagnosis(observation)))
            diagnosis.begin(recovery.first_generation if recovery is not None else 0, job.world_size)
        if recovery is not None:
            fleet = stack.enter_context(_FLEET_BY_KIND[config.kind](job, config, heartbeat_interval_s))
            care = elastic.Care(limits, recovery, diagnosis)
            return elastic.supervise(fleet, job, care, stop_grace_s=grace_s, on_output=on_output)
        ranks = stack.enter_context(_START_BY_KIND[config.kind](job, config, heartbeat_interval_s))
        return supervise(ranks, job, limits, stop_grace_s=grace_s, on_output=on_output, diagnosis=diagnosis)


@contextlib.contextmanager
def _shipping(observation: Observation, say: Callable[[str], None]) -> Iterator[None]:
    """Keep all that ranks record while the block runs, where that is asked for; what cannot be kept ends no job."""
    if not observation.ship_to:
        yield
        return
    from faulttol.errors import ShipError
    from faulttol.ship import Convoy

    convoy = Convoy(observation.rings, observation.ship_to, removes=True)
    try:
        yield
    finally:
        try:
            convoy.close()
        except (OSError, ShipError) as error:
            say(f"not all that ranks recorded could be kept in {observation.ship_to}: {error}")


def _enduring(on_output: Callable[[bytes], None]) -> Callable[[bytes], None]:
    """`on_output`, whose failures end no job; the first one is logged."""
    failed = False

    def pass_on(text: bytes) -> None:
        nonlocal failed
        try:
            on_output(text)
        except OSError as error:
            if not failed:
                log.warning("what the job prints cannot be passed on: %s; its logs have it", error)
            failed = True

    return pass_on


def _empty_logs(job: Job) -> None:
    """Make the folder, with an empty log for each rank and no log of an earlier run."""
    job.log_dir.mkdir(parents=True, exist_ok=True)
    for path in job.log_dir.glob("rank*.log"):
        path.unlink()
    for rank in range(job.world_size):
        log_path(job.log_dir, rank).touch()


def _check(config: LaunchConfig, heartbeat_interval_s: float) -> None:
    wrong: list[str] = []
    if config.kind not in _START_BY_KIND:
        wrong.append(f"launch.kind: {config.kind!r} is none of {', '.join(sorted(_START_BY_KIND))}")
    positive = ("cpus_per_rank", "start_timeout_s", "frozen_timeout_s", "hang_timeout_s", "stop_grace_s")
    wrong += [
        f"launch.{name}: {getattr(config, name)} is not above 0" for name in positive if not getattr(config, name) > 0
    ]
    if config.spares < 0:
        wrong.append(f"launch.spares: {config.spares} is below 0")
    if config.gpus_per_rank < 0:
        wrong.append(f"launch.gpus_per_rank: {config.gpus_per_rank} is below 0")
    if not heartbeat_interval_s > 0:
        wrong.append(f"faulttol.heartbeat_interval_s: {heartbeat_interval_s} is not above 0")
    elif config.frozen_timeout_s < 3 * heartbeat_interval_s:
        wrong.append(
            f"launch.frozen_timeout_s: {config.frozen_timeout_s} s is under three heartbeats of "
            f"{heartbeat_interval_s} s; lengthen it or shorten faulttol.heartbeat_interval_s"
        )
    if wrong:
        raise ValueError("\n".join(sorted(wrong)))
