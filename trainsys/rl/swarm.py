"""A swarm by one command: N nodes as Ray actors, each a run of its own that shares rollouts with the others.

Nodes are independent jobs: one that dies is started again from its newest checkpoint, as often as the recipe says, and
the others do not notice. Everything lies in the run's folder:

RUN/nodes/<node>/    the run of each node, as `trainsys train` writes it
RUN/store/           what they share (or an actor, or any URL)
RUN/report/          tables and curves, written at the end
"""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from launch import Job, LaunchConfig, ray_actors, ray_cluster, signals
from launch.entry import Raised, Returned
from launch.errors import LaunchError
from launch.supervisor import Ranks, StopWish
from launch.verdict import RankReport
from trainsys import folder, recipe
from trainsys.check import check
from trainsys.config import RunConfig
from trainsys.errors import RunError
from trainsys.folder import RunFolder
from trainsys.recipe import Resolved
from trainsys.rl import ray_mailbox
from trainsys.session import ENTRY, rank_payload, threads_per_rank

State = Literal["starting", "running", "done", "stopped", "died", "failed"]

_POLL_S = 0.2
_MAILBOX_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True)
class NodeView:
    """What the driver knows of one node."""

    name: str
    folder: Path
    state: State
    step: int
    restarts: int
    detail: str
    """Why it died or failed; empty otherwise."""


class Watcher(Protocol):
    """Who is told how the swarm gets on."""

    def begin(self, url: str, views: list[NodeView]) -> None:
        """The nodes are being started; `url` is where others can join them."""

    def update(self, views: list[NodeView]) -> None:
        """Take what is known now; called several times a second."""


def run_swarm(resolved: Resolved, *, resume: bool, watch: Watcher) -> tuple[RunFolder, list[NodeView]]:
    """Start the nodes of a recipe, and return when every one has ended: the run's folder, and what became of each.

    SIGTERM or SIGINT asks all to save and leave; a second SIGINT ends them at once.

    Raises:
        ConfigError, RunError: before anything starts; launch.LaunchError: Ray is not there, or has no room.
    """
    config = resolved.config
    check(config, sources=resolved.sources)
    with contextlib.ExitStack() as stack:
        run = stack.enter_context(folder.open_run(resolved, resume=resume))
        if stack.enter_context(ray_cluster.joined(config.launch.ray_address)):
            _require_room(config)
        url = stack.enter_context(_store(config, run))
        nodes = [_Node(part, stack) for part in _parts(resolved, run, url, resume=resume, stack=stack)]
        wish = StopWish()
        with signals.caught(wish.note):
            watch.begin(url, [node.view for node in nodes])
            _watch(nodes, wish, watch, config)
    return run, [node.view for node in nodes]


def _watch(nodes: list[_Node], wish: StopWish, watch: Watcher, config: RunConfig) -> None:
    """Poll the nodes until all have ended; those that die are started again."""
    asked_at_s: float | None = None
    for node in nodes:
        node.start()
    while any(node.is_open for node in nodes):
        for node in nodes:
            node.poll(may_restart=asked_at_s is None)
        watch.update([node.view for node in nodes])
        if wish.requested and asked_at_s is None:
            asked_at_s = time.monotonic()
            for node in nodes:
                node.request_stop()
        if wish.impatient or (asked_at_s and time.monotonic() - asked_at_s > config.launch.stop_grace_s):
            for node in nodes:
                node.give_up()
        time.sleep(_POLL_S)
    watch.update([node.view for node in nodes])


@contextlib.contextmanager
def _store(config: RunConfig, run: RunFolder) -> Iterator[str]:
    """Yield the URL of the store: the recipe's, an actor's, or the folder in the run's."""
    sharing = config.rl.sharing
    if sharing.store == "ray":
        name = f"{config.name}-{run.record()['run_id'][:8]}"
        with ray_mailbox.serve(name, keep_s=sharing.keep_s, budget_bytes=_MAILBOX_BYTES) as url:
            yield url
    else:
        yield sharing.store or str(run.path / "store")


@dataclass(frozen=True, slots=True)
class _Part:
    """One node's own run."""

    name: str
    config: RunConfig
    folder: RunFolder
    resume: bool


def _parts(
    resolved: Resolved, run: RunFolder, url: str, *, resume: bool, stack: contextlib.ExitStack
) -> Iterator[_Part]:
    """Yield each node's run, its folder made and held as long as `stack` is open."""
    nodes = [node_config(resolved.config, run, number, url) for number in range(resolved.config.rl.swarm.nodes)]
    for node in nodes:
        again = resume and RunFolder(Path(node.run_dir)).exists()
        own = stack.enter_context(folder.open_run(dataclasses.replace(resolved, config=node), resume=again))
        yield _Part(node.rl.sharing.node, node, own, again)


def node_config(config: RunConfig, run: RunFolder, number: int, url: str) -> RunConfig:
    """Return the settings of one node: those of the run, with its variant, its skills, its name and folder.

    Raises:
        ConfigError: a variant that is wrong, alone or beside the other settings.
    """
    swarm, name = config.rl.swarm, f"node{number}"
    if swarm.variants:
        variant = shlex.split(swarm.variants[number % len(swarm.variants)])
        config = recipe.load([str(run.config)], [f"--{setting}" for setting in variant]).config
    tasks = config.rl.tasks
    shown = [tasks[(number + offset) % len(tasks)] for offset in range(swarm.skills_per_node)]
    rl = config.rl
    node = dataclasses.replace(
        config,
        name=f"{config.name}-{name}",
        run_dir=str(run.path / "nodes" / name),
        metrics=dataclasses.replace(config.metrics, console="plain"),
        rl=dataclasses.replace(
            rl,
            warm_start=dataclasses.replace(rl.warm_start, tasks=shown or rl.warm_start.tasks),
            sharing=dataclasses.replace(rl.sharing, store=url, node=name),
            swarm=dataclasses.replace(swarm, nodes=0, skills_per_node=0, variants=[]),
        ),
    )
    check(node, sources={key: name for key, _ in recipe.leaves(recipe.to_tree(node))})
    return node


class _Node:
    """One node's job, over all its starts."""

    def __init__(self, part: _Part, stack: contextlib.ExitStack) -> None:
        self._part = part
        self._state: State = "starting"
        self._step = self._restarts = 0
        self._detail = ""
        self._ranks: Ranks | None = None
        self._closing = stack.enter_context(contextlib.ExitStack())

    @property
    def view(self) -> NodeView:
        part = self._part
        return NodeView(part.name, part.folder.path, self._state, self._step, self._restarts, self._detail)

    @property
    def is_open(self) -> bool:
        return self._ranks is not None

    def start(self) -> None:
        """Start the actor."""
        part = self._part
        launch: LaunchConfig = part.config.launch
        job = Job(
            entry=ENTRY,
            payload=rank_payload(
                part.config,
                part.folder,
                resume=part.resume or self._restarts > 0,
                threads=threads_per_rank(part.config),
            ),
            log_dir=part.folder.logs if not self._restarts else part.folder.logs / f"restart{self._restarts}",
            name=part.config.name,
        )
        job.log_dir.mkdir(parents=True, exist_ok=True)
        self._state = "starting"
        interval_s = part.config.faulttol.heartbeat_interval_s
        self._ranks = self._closing.enter_context(ray_actors.start(job, launch, interval_s))

    def poll(self, *, may_restart: bool) -> None:
        """Learn how the node is; start it again where it died and may be."""
        if self._ranks is None:
            return
        (report,) = self._ranks.poll()
        if report.pulse is not None:
            self._state, self._step = "running", report.pulse.step
        if report.outcome is None and report.exit is None:
            return
        self._end(report)
        if self._state == "died" and may_restart and self._restarts < self._part.config.rl.swarm.restarts:
            self._restarts += 1
            try:
                self.start()
            except LaunchError as error:  # no room for it any more: the others go on without it
                self._state, self._detail = "died", f"not started again: {error}"
                self._release()

    def request_stop(self) -> None:
        """Ask the node to save and leave."""
        if self._ranks is not None:
            self._ranks.request_stop()

    def give_up(self) -> None:
        """End the node as it is."""
        if self._ranks is not None:
            self._state, self._detail = "died", "killed: it had not left in time"
            self._release()

    def _end(self, report: RankReport) -> None:
        if isinstance(report.outcome, Returned):
            is_done = report.outcome.value["outcome"] == "completed"
            self._state, self._step = "done" if is_done else "stopped", report.outcome.value["step"]
        elif isinstance(report.outcome, Raised):
            self._state, self._detail = "failed", report.outcome.summary
        else:
            assert report.exit is not None
            self._state, self._detail = "died", report.exit.summary
        self._release()

    def _release(self) -> None:
        self._ranks = None
        self._closing.close()


def outcome_of(views: list[NodeView]) -> Literal["completed", "stopped"]:
    """Return how the swarm ended: completed where no node was stopped.

    Raises:
        RunError: nodes died for good or failed; the reason of each.
    """
    bad = [view for view in views if view.state in ("died", "failed")]
    if bad:
        told = (f"{view.name}: {view.state}: {view.detail}; its log is in {view.folder / 'logs'}" for view in bad)
        raise RunError("\n".join(told))
    return "stopped" if any(view.state == "stopped" for view in views) else "completed"


def _require_room(config: RunConfig) -> None:
    """Refuse more nodes than a Ray of our own, which cannot grow, has CPUs or GPUs for."""
    has = ray_cluster.import_ray().cluster_resources()
    launch, nodes = config.launch, config.rl.swarm.nodes
    for name, each in (("CPU", launch.cpus_per_rank), ("GPU", launch.gpus_per_rank)):
        if nodes * each > has.get(name, 0.0):
            raise RunError(
                f"{nodes} nodes of {each:g} {name} each do not fit this machine's {has.get(name, 0.0):g}; "
                f"lower launch.{name.lower()}s_per_rank or rl.swarm.nodes"
            )
