"""Ranks as Ray actors, one each; the entry runs inside the actor."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from faulttol.recovery import Standing
from launch import context, entry, placement, ray_cluster, ray_rank
from launch.config import LaunchConfig
from launch.errors import ClusterError
from launch.job import Job
from launch.placement import Home
from launch.rankenv import RankEnv
from launch.supervisor import log_path
from launch.verdict import Exit, Pulse, RankReport

_POLL_TIMEOUT_S = 0.05
_BURY_TIMEOUT_S = 60.0
_LEAVE_S = 10.0  # for what a rank does at the exit of its process, once its entry returned
_KILL_S = 0.5  # for Ray to end an actor itself, which it does within its limits and logs less of

log = logging.getLogger(__name__)


@contextlib.contextmanager
def start(job: Job, config: LaunchConfig, heartbeat_interval_s: float) -> Iterator[RayRanks]:
    """The running ranks of `job`; leaving the block ends what is left of them, and a Ray of our own."""
    demand = {"CPU": config.cpus_per_rank, "GPU": config.gpus_per_rank}
    with (
        ray_cluster.joined(config.ray_address) as own,
        cluster_errors(),
        ray_cluster.reserved(demand, job.world_size, own=own, timeout_s=config.start_timeout_s) as group,
    ):
        ranks = RayRanks(job, heartbeat_interval_s)
        try:
            ranks.start(group, config)
            yield ranks
        finally:
            ranks.kill()


@contextlib.contextmanager
def cluster_errors() -> Iterator[None]:
    """Turn into a ClusterError what Ray raises of itself, such as a head that is gone."""
    ray = ray_cluster.import_ray()
    try:
        yield
    except ray.exceptions.RayError as error:
        raise ClusterError(f"Ray failed: {error}") from error


class RayRanks:
    """See `supervisor.Ranks`. Until all actors have told where they live, ranks are in the actors' order."""

    def __init__(self, job: Job, heartbeat_interval_s: float) -> None:
        import ray.util

        self._ray = ray
        self._job = job
        self._heartbeat_interval_s = heartbeat_interval_s
        self._actors: list[Actor] = []
        self._seated = False
        # Here rather than on rank 0, whose loss the store survives.
        self._store_host = ray.util.get_node_ip_address()
        listener = context.listen(self._store_host)
        self._store_port = listener.getsockname()[1]
        self._store = context.serve_store(listener, job.world_size)

    def start(self, group: Any, config: LaunchConfig) -> None:
        """Start an actor in every bundle of the placement group."""
        ray = self._ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        actor_class = ray.remote(
            num_cpus=config.cpus_per_rank,
            num_gpus=config.gpus_per_rank,
            max_restarts=0,
            max_task_retries=0,
            concurrency_groups={"run": 1, "monitor": 4},
        )(ray_rank.RankActor)
        for index in range(self._job.world_size):
            placed = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
            self._actors.append(Actor(ray, actor_class.options(scheduling_strategy=placed).remote()))

    def poll(self) -> list[RankReport]:
        pending = [ref for actor in self._actors for ref in actor.pending()]
        done: list[Any] = []
        if pending:
            done, _ = self._ray.wait(pending, num_returns=len(pending), timeout=_POLL_TIMEOUT_S)
        for rank, actor in enumerate(self._actors):
            printed = actor.take(done)
            if printed:
                self._append_log(rank, printed)
        if not self._seated and all(actor.home is not None for actor in self._actors):
            self._seat()
        return [actor.report for actor in self._actors]

    def request_stop(self) -> None:
        for actor in self._actors:
            actor.tell("request_stop")

    def dump_stacks(self) -> None:
        for actor in self._actors:
            actor.tell("dump_stacks")

    def kill(self) -> None:
        actors, self._actors = self._actors, []
        for actor in actors:
            actor.kill()
        for rank, printed in enumerate(bury_all(self._ray, actors)):
            self._append_log(rank, printed)

    def _seat(self) -> None:
        """Decide who is which rank, and let all run."""
        homes = [actor.home for actor in self._actors if actor.home is not None]
        here = self._ray.get_runtime_context().get_node_id()
        seats = placement.seats(homes, here)
        self._actors = [self._actors[seat.actor] for seat in seats]
        self._seated = True
        for rank, (actor, seat) in enumerate(zip(self._actors, seats, strict=True)):
            env = RankEnv(
                rank=rank,
                world_size=self._job.world_size,
                local_rank=seat.local_rank,
                local_world_size=seat.local_world_size,
                node_rank=seat.node_rank,
                store_host=self._store_host,
                store_port=self._store_port,
                store_is_served=True,
            )
            gpus = {"CUDA_VISIBLE_DEVICES": ",".join(seat.visible_gpus)} if seat.visible_gpus else {}
            actor.run(
                {
                    "entry": self._job.entry,
                    "payload": dict(self._job.payload),
                    "sys_path": [os.path.abspath(path) for path in sys.path],
                    "environ": {**env.to_environ(), **gpus},
                    "heartbeat_interval_s": self._heartbeat_interval_s,
                }
            )

    def _append_log(self, rank: int, printed: bytes) -> None:
        append_printed(log_path(self._job.log_dir, rank), printed)


def append_printed(path: Path, printed: bytes) -> None:
    """Add to a rank's log; what a full disk has no room for is lost, and ends no job."""
    try:
        with open(path, "ab") as file:
            file.write(printed)
    except OSError as error:
        log.warning("%s: %d bytes that its rank printed are lost: %s", path, len(printed), error)


def bury_all(ray: Any, actors: Sequence[Actor]) -> list[bytes]:
    """End the actors' processes and return what each printed last, by actor; nothing of one that has told no home."""
    rest = [b""] * len(actors)
    by_node: dict[str, list[int]] = {}
    for index, actor in enumerate(actors):
        if actor.home is not None:
            by_node.setdefault(actor.home.node_id, []).append(index)
    for node_id, indices in by_node.items():
        homes = [home for index in indices if (home := actors[index].home) is not None]
        offsets = [actors[index].offset for index in indices]
        told = _bury(ray, node_id, homes, offsets, [actors[index].patience_s for index in indices])
        for index, printed in zip(indices, told, strict=True):
            rest[index] = printed
    return rest


def _bury(ray: Any, node_id: str, homes: list[Home], offsets: list[int], patience_s: list[float]) -> list[bytes]:
    """`ray_rank.bury` on that node: here, or by a task there."""
    if node_id == ray.get_runtime_context().get_node_id():
        return ray_rank.bury(homes, offsets, patience_s)
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(node_id, soft=False)
    task = ray.remote(num_cpus=0, max_retries=0)(ray_rank.bury).options(scheduling_strategy=there)
    try:
        rest: list[bytes] = ray.get(task.remote(homes, offsets, patience_s), timeout=_BURY_TIMEOUT_S)
    except ray.exceptions.RayError as error:
        # A lost node takes its ranks with it; what they printed last is lost too.
        log.warning("node %s: could not see its ranks end: %s", node_id, error)
        return [b""] * len(homes)
    return rest


class Actor:
    """One actor as the driver knows it."""

    def __init__(self, ray: Any, handle: Any) -> None:
        self.home: Home | None = None
        self.offset = 0
        """Bytes of its log that arrived here."""
        self.report = RankReport()
        self.standing: Standing | None = None
        self._ray = ray
        self._handle = handle
        self._home_ref: Any = self._ask("home")
        self._started = False
        self._run_ref: Any = None
        self._poll_ref: Any = None

    def run(self, description: dict[str, Any]) -> None:
        self._started = True
        self._run_ref = self._handle.run.options(concurrency_group="run").remote(description)
        self._poll_ref = self._ask("poll", self.offset, self.report.pulse is not None)

    def tell(self, method: str, *arguments: Any) -> None:
        if self.report.exit is None:
            self._ask(method, *arguments)

    def pending(self) -> list[Any]:
        refs = (self._home_ref, self._run_ref, self._poll_ref)
        return [ref for ref in refs if ref is not None]

    def take(self, done: list[Any]) -> bytes:
        """Learn from the answers that arrived; returns what the rank printed since the last."""
        ray = self._ray
        printed = b""
        try:
            if self._home_ref in done:
                ref, self._home_ref = self._home_ref, None
                self.home = ray.get(ref)
            if self._poll_ref in done:
                ref, self._poll_ref = self._poll_ref, None
                printed = self._learn(ray.get(ref))
            if self._run_ref in done:
                ref, self._run_ref = self._run_ref, None
                ray.get(ref)
        except ray.exceptions.ActorUnavailableError:
            pass  # the network hiccuped: ask again, silence is judged by the supervisor
        except ray.exceptions.RayError as error:
            self._ended(error)
        if self.home is None and self._home_ref is None and self.report.exit is None:
            self._home_ref = self._ask("home")
        if self._started and self._poll_ref is None and self.report.outcome is None and self.report.exit is None:
            self._poll_ref = self._ask("poll", self.offset, self.report.pulse is not None)
        return printed

    @property
    def patience_s(self) -> float:
        """How long its process may take to end by itself."""
        return _LEAVE_S if isinstance(self.report.outcome, entry.Returned) else _KILL_S

    def kill(self) -> None:
        if not isinstance(self.report.outcome, entry.Returned):
            self._ray.kill(self._handle, no_restart=True)

    def _ask(self, method: str, *arguments: Any) -> Any:
        return getattr(self._handle, method).options(concurrency_group="monitor").remote(*arguments)

    def _learn(self, answer: dict[str, Any]) -> bytes:
        pulse = Pulse(*answer["pulse"]) if answer["pulse"] is not None else None
        outcome = entry.from_json(answer["outcome"]) if answer["outcome"] is not None else None
        if isinstance(outcome, entry.Returned):
            self._handle.__ray_terminate__.remote()
        if answer["standing"] is not None:
            self.standing = Standing.from_json(answer["standing"])
        self.report = RankReport(pulse, outcome, Exit(code=0) if isinstance(outcome, entry.Returned) else None)
        printed: bytes = answer["printed"]
        self.offset += len(printed)
        return printed

    def _ended(self, error: Exception) -> None:
        self._home_ref = self._run_ref = self._poll_ref = None
        self.report = replace(self.report, exit=Exit(detail=_explain(error)))


def _explain(error: Exception) -> str:
    """What Ray knows about an actor's end, without its general advice."""
    text = str(error)
    found = re.search(r"Worker exit detail: (.*?)(?: Some common causes|$)", text, re.DOTALL)
    return (found.group(1) if found else text).strip()
