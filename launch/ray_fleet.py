"""Members of a job that outlives its ranks as Ray actors, with an agent on each node that looks after those there.

Ray tells of an actor that died in some 20 ms; of one that is stopped it knows nothing, and to kill such a one takes it
five seconds. The agents, one actor a node, see both and end processes themselves.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

from faulttol.health import Vitals
from launch import context, ray_cluster, ray_rank
from launch.config import LaunchConfig
from launch.fleet import MemberReport, member_log
from launch.job import Job
from launch.orders import Order
from launch.placement import Home
from launch.rankenv import RankEnv
from launch.ray_actors import Actor, append_printed, bury_all, cluster_errors
from launch.verdict import Exit

_LOOK_S = 0.02
_END_TIMEOUT_S = 10.0
_AGENT_PAUSE_S = 0.5  # until an agent that died is started again, doubled each time
_LONGEST_AGENT_PAUSE_S = 60.0
_SILENT_S = 2.0  # that an agent may owe an answer
_BLIND_S = 0.5  # that a time without a look counts at most: the driver was away, which proves nothing

log = logging.getLogger(__name__)


@contextlib.contextmanager
def start_fleet(job: Job, config: LaunchConfig, heartbeat_interval_s: float) -> Iterator[RayFleet]:
    """The running members of `job`, its spares among them; leaving the block ends what is left of them."""
    demand = {"CPU": config.cpus_per_rank, "GPU": config.gpus_per_rank}
    size = job.world_size + config.spares
    with (
        ray_cluster.joined(config.ray_address) as own,
        cluster_errors(),
        ray_cluster.reserved(demand, size, own=own, timeout_s=config.start_timeout_s) as group,
    ):
        fleet = RayFleet(job, config, heartbeat_interval_s, group)
        try:
            for _ in range(size):
                fleet.add()
            yield fleet
        finally:
            fleet.kill()


class RayFleet:
    """See `fleet.Fleet`. Each member has a bundle of the placement group, which its successor takes over."""

    def __init__(self, job: Job, config: LaunchConfig, heartbeat_interval_s: float, group: Any) -> None:
        import ray.util

        self._ray = ray
        self._job, self._config, self._heartbeat_interval_s = job, config, heartbeat_interval_s
        self._group = group
        self._free = list(range(job.world_size + config.spares))
        self._bundles: list[int] = []
        self._actors: list[Actor] = []
        self._ended: dict[int, Exit] = {}
        self._agents: dict[str, _Agent] = {}
        self._store_host = ray.util.get_node_ip_address()
        listener = context.listen(self._store_host)
        self._store_port = listener.getsockname()[1]
        self._store = context.serve_store(listener, job.world_size)

    def add(self) -> None:
        ray = self._ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        member_log(self._job, len(self._actors)).touch()
        actor_class = ray.remote(
            num_cpus=self._config.cpus_per_rank,
            num_gpus=self._config.gpus_per_rank,
            max_restarts=0,
            max_task_retries=0,
            concurrency_groups={"run": 1, "monitor": 4},
        )(ray_rank.RankActor)
        bundle = self._free.pop(0)
        placed = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=bundle)
        self._bundles.append(bundle)
        self._actors.append(Actor(ray, actor_class.options(scheduling_strategy=placed).remote()))

    def look(self) -> list[MemberReport]:
        pending = [
            ref for index, actor in enumerate(self._actors) if index not in self._ended for ref in actor.pending()
        ]
        done: list[Any] = []
        if pending:
            done, _ = self._ray.wait(pending, num_returns=len(pending), timeout=_LOOK_S)
        for index, actor in enumerate(self._actors):
            if index not in self._ended:
                was_home = actor.home is not None
                self._append_log(index, actor.take(done))
                if actor.home is not None and not was_home:
                    self._settle(index, actor)
                if actor.report.exit is not None:
                    self._note_end(index, actor.report.exit)
        vitals = {seen.rank: seen for agent in self._agents.values() for seen in agent.look()}
        return [
            MemberReport(
                replace(actor.report, exit=self._ended.get(index)),
                actor.standing,
                None if index in self._ended else vitals.get(index),
            )
            for index, actor in enumerate(self._actors)
        ]

    def places(self, members: Sequence[int]) -> list[dict[str, Any]]:
        nodes = [self._node(member) for member in members]
        order = list(dict.fromkeys(nodes))
        return [
            asdict(
                RankEnv(
                    rank=rank,
                    world_size=len(members),
                    local_rank=nodes[:rank].count(node),
                    local_world_size=nodes.count(node),
                    node_rank=order.index(node),
                    store_host=self._store_host,
                    store_port=self._store_port,
                    store_is_served=True,
                    device_index=0 if self._config.gpus_per_rank else -1,  # each sees its own alone
                )
            )
            for rank, node in enumerate(nodes)
        ]

    def order(self, member: int, order: Order) -> None:
        self._actors[member].tell("order", dict(order))

    def end(self, member: int) -> None:
        actor, ray = self._actors[member], self._ray
        if member in self._ended:
            return
        is_gone = False
        try:
            agent = self._agents[self._node(member)]
            if agent.is_silent:  # its node is gone with it, mostly: nobody waits for that
                agent.forget(member)
            else:
                is_gone = agent.end(member)
        except (KeyError, ray.exceptions.RayError) as error:
            log.warning("member %d: its node's agent could not end it: %s", member, error)
        if not is_gone:
            actor.kill()  # its node may be gone with it; if it is not, the fence keeps it from writing
        self._note_end(member, Exit(detail="ended by the launcher"))

    def request_stop(self) -> None:
        for actor in self._actors:
            actor.tell("request_stop")

    def dump_stacks(self, members: Sequence[int]) -> None:
        for member in members:
            self._actors[member].tell("dump_stacks")

    def kill(self) -> None:
        actors, self._actors = self._actors, []
        for agent in self._agents.values():
            agent.kill()
        self._agents.clear()
        for actor in actors:
            actor.kill()
        for index, printed in enumerate(bury_all(self._ray, actors)):
            self._append_log(index, printed)

    def _node(self, member: int) -> str:
        home = self._actors[member].home
        return "" if home is None else home.node_id

    def _settle(self, member: int, actor: Actor) -> None:
        """Let a member that has told where it lives begin, under the eyes of its node's agent."""
        home = actor.home
        assert home is not None
        if home.node_id not in self._agents:
            self._agents[home.node_id] = _Agent(self._ray, home.node_id)
        self._agents[home.node_id].watch(member, home)
        env = RankEnv(store_host=self._store_host, store_port=self._store_port, store_is_served=True)
        gpus = {"CUDA_VISIBLE_DEVICES": ",".join(home.gpu_ids)} if home.gpu_ids else {}
        actor.run(
            {
                "entry": self._job.entry,
                "payload": dict(self._job.payload),
                "sys_path": [os.path.abspath(path) for path in sys.path],
                "environ": {**env.to_environ(), **gpus},
                "heartbeat_interval_s": self._heartbeat_interval_s,
                "recovers": True,
            }
        )

    def _note_end(self, member: int, ended: Exit) -> None:
        if member not in self._ended:
            self._ended[member] = ended
            self._free.append(self._bundles[member])

    def _append_log(self, member: int, printed: bytes) -> None:
        if printed:
            append_printed(member_log(self._job, member), printed)


class _Agent:
    """A node's agent as the driver knows it.

    One that dies or falls silent is replaced before anybody takes its node for lost: what it looks after may be well.
    Silence is counted on a clock that stands still while the driver is busy, or suspended itself.
    """

    def __init__(self, ray: Any, node_id: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._ray, self._node_id, self._clock = ray, node_id, clock
        self._now_s, self._looked_s = 0.0, clock()
        self._homes: dict[int, Home] = {}
        self._pause_s = _AGENT_PAUSE_S
        self._seen: list[Vitals] = []
        self._seen_at_s = 0.0
        self._handle: Any = None
        self._ref: Any = None
        self._has_answered = self._was_heard = False
        """The one that is there; any."""
        self._in_vain = False
        """Whether the one before had been started again, and did not answer."""
        self._owes_an_end = False
        """Whether it was asked to end a member, and nothing was heard of it since."""
        self._begun_s = self._asked_s = 0.0
        self._begin()

    def watch(self, member: int, home: Home) -> None:
        """Let it look after one more member."""
        self._homes[member] = home
        self._handle.watch.remote(member, home)

    @property
    def is_silent(self) -> bool:
        """Whether it fell silent, was started again, and has not answered soon; or it was asked for an end in vain."""
        had_time = self._in_vain or self._now_s > self._begun_s + _SILENT_S
        return self._owes_an_end or (self._was_heard and not self._has_answered and had_time)

    def forget(self, member: int) -> None:
        """Let it look after a member no more, should it be started again."""
        self._homes.pop(member, None)

    def end(self, member: int) -> bool:
        """Let it end a member, stopped or not; whether that is gone. Raises: ray.exceptions.RayError."""
        self.forget(member)
        self._owes_an_end = True
        is_gone = bool(self._ray.get(self._handle.end.remote(member), timeout=_END_TIMEOUT_S))
        self._owes_an_end = False
        return is_gone

    def kill(self) -> None:
        self._ray.kill(self._handle, no_restart=True)

    def look(self) -> list[Vitals]:
        """What it saw last, with the age of that."""
        looked_s = self._clock()
        self._now_s += min(looked_s - self._looked_s, _BLIND_S)
        self._looked_s = looked_s
        self._take()  # an answer may long have been there
        if self._ref is not None and self._has_answered and self._now_s > self._asked_s + _SILENT_S:
            log.warning("the agent of node %s is silent, and is started again", self._node_id)
            self.kill()
            self._ref = None
        if self._ref is None and self._now_s > self._begun_s + self._pause_s:
            self._pause_s = min(2 * self._pause_s, _LONGEST_AGENT_PAUSE_S)  # its node may be gone, and not come back
            self._begin()
        age_s = self._now_s - self._seen_at_s
        return [replace(vitals, report_age_s=age_s) for vitals in self._seen]

    def _take(self) -> None:
        """Learn from the answer if it is there, and ask again."""
        if self._ref is None or not self._ray.wait([self._ref], timeout=0)[0]:
            return
        ref, self._ref = self._ref, None
        try:
            self._seen, self._seen_at_s = self._ray.get(ref), self._now_s
            self._has_answered, self._was_heard, self._in_vain, self._owes_an_end = True, True, False, False
            self._pause_s = _AGENT_PAUSE_S
            self._ask()
        except self._ray.exceptions.ActorUnavailableError:  # the network hiccuped
            self._ask()
        except self._ray.exceptions.RayError as error:
            log.warning("the agent of node %s is gone, and is started again: %s", self._node_id, error)

    def _begin(self) -> None:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        there = NodeAffinitySchedulingStrategy(self._node_id, soft=False)
        agent_class = self._ray.remote(num_cpus=0, max_restarts=0)(ray_rank.AgentActor)
        self._handle = agent_class.options(scheduling_strategy=there).remote()
        self._begun_s = self._now_s
        for member, home in self._homes.items():
            self._handle.watch.remote(member, home)
        self._in_vain = self._was_heard and not self._has_answered
        self._has_answered = False
        self._ask()

    def _ask(self) -> None:
        self._ref = self._handle.look.remote()
        self._asked_s = self._now_s
