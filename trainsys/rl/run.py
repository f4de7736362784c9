"""A run by reinforcement learning on one node: supervised steps, then rounds, evaluated, saved, resumable to the bit.

Everything random is decided by the recipe's seed, the node's name and the step, so a resumed run asks and draws what it
would have asked and drawn.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol

import checkpoint as ck
from launch import RankContext
from trainsys import metrics, models, recipe, schedule, setup, snapshot
from trainsys.check import num_ranks
from trainsys.config import RunConfig, ScheduleConfig
from trainsys.data import load_tokenizer
from trainsys.folder import RunFolder
from trainsys.metrics import Metrics
from trainsys.preemption import watched
from trainsys.rl.account import account
from trainsys.rl.learner import Accuracy, Learner, RoundStats, World
from trainsys.rl.model import PREFIX
from trainsys.rl.rollout import Group
from trainsys.saving import Saver
from trainsys.step import agree

_WEIGHTS = f"model.{PREFIX}"
_PATIENCE = 20
"""Rounds after which a node says that it has learnt nothing from others so far, and why."""


@dataclass(frozen=True, slots=True)
class Summary:
    """How a run ended."""

    outcome: str
    """`completed`, or `stopped` as asked with steps left."""
    step: int
    cumulative_reward: float
    """Mean reward of each round, summed over the rounds."""
    accuracy: dict[str, float]
    """Of greedy answers at the last evaluation, by task; empty without any."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where in the run a checkpoint was taken."""

    step: int
    cumulative_reward: float = 0.0
    generated_tokens: int = 0
    peers: Mapping[str, Any] = field(default_factory=dict)
    """What `Peers.state` returned: JSON values."""

    def shared(self) -> Mapping[str, Any]:
        """Return what `place_of` makes it from again."""
        return {
            "cumulative_reward": self.cumulative_reward,
            "generated_tokens": self.generated_tokens,
            "peers": dict(self.peers),
        }


def place_of(loaded: ck.Loaded) -> Place:
    """Return the place of a checkpoint."""
    return Place(loaded.step, **{key: loaded.shared[key] for key in ("cumulative_reward", "generated_tokens", "peers")})


class Peers(Protocol):
    """Other nodes, as the loop of one sees them: nothing here waits for any of them."""

    def num_own(self, round_index: int) -> int:
        """Return how many questions this node asks in a round."""
        ...

    def trade(self, round_index: int, own: Sequence[Group]) -> tuple[Sequence[Group], Sequence[Group]]:
        """Publish a round's groups; return (own groups to train on, others' groups to train on, scored here)."""
        ...

    def state(self) -> Mapping[str, Any]:
        """Return this node's place in the exchange as JSON values, for a checkpoint."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned; an empty one is a fresh start."""
        ...

    def record(self) -> Mapping[str, float]:
        """Return figures of the exchange by name, for the metrics of a round."""
        ...

    def close(self) -> None:
        """End the exchange; a second call does nothing."""
        ...


JoinPeers = Callable[[Learner, RunFolder], Peers]


def train_policy(
    context: RankContext,
    config: RunConfig,
    choose_folder: Callable[[], RunFolder],
    *,
    resume: bool,
    node: str = "local",
    join: JoinPeers | None = None,
) -> Summary:
    """Train on this rank of a checked `config`; every rank calls it, rank 0 alone calls `choose_folder`.

    `node` names this node among its peers, whom `join` finds; without it the node is alone.
    """
    met = setup.meet(config, choose_folder, context)
    with Run(context, met, resume=resume, node=node, join=join) as run:
        return run.run()


class Run:
    """One rank of a run, from its start or its newest checkpoint to its end."""

    def __init__(
        self,
        context: RankContext,
        met: setup.Meeting,
        *,
        resume: bool,
        node: str = "local",
        join: JoinPeers | None = None,
    ) -> None:
        """Build policy, engine and checkpointer; with `resume` continue from the newest checkpoint, if any."""
        self._context, self._config, self._met, self._settings = context, met.config, met, met.config.rl
        self._rank = context.env.rank
        self._accuracy: tuple[int, Accuracy] = (-1, Accuracy({}, {}))
        self._first_accuracy = Accuracy({}, {})
        self._started = (0, time.perf_counter())
        with contextlib.ExitStack() as stack:
            self._build(stack, resume, node, join)
            self._closing = stack.pop_all()

    def _build(self, stack: contextlib.ExitStack, resume: bool, node: str, join: JoinPeers | None) -> None:
        config, met = self._config, self._met
        self._context.heartbeat.beat(step=0, phase="build")
        snapshot.seed_generators(config.seed, self._rank)
        self._tokenizer = load_tokenizer(config.data.tokenizer)
        world = World(self._rank, met.device, met.groups, met.control)
        self._learner = Learner(config, world, self._tokenizer, node=node)
        stack.callback(self._learner.close)
        self._checkpointer = ck.Checkpointer(
            met.folder.checkpoints,
            config=config.checkpoint,
            rank=self._rank,
            world_size=num_ranks(config.parallel),
            run_id=met.launch_id,
        )
        lost = ck.SaveFailed("given up: the job lost a rank, and goes on from the checkpoint before")
        stack.enter_context(self._context.releasing(lambda: self._checkpointer.cancel(lost)))
        stack.enter_context(self._checkpointer)
        self._place = Place(step=0)
        if resume:
            self._resume()
        self._peers = join(self._learner, met.folder) if join is not None else None
        if self._peers is not None:
            stack.callback(self._peers.close)
            self._peers.restore(self._place.peers)
        self._metrics = self._open_metrics()
        stack.callback(self._metrics.close)
        self._saver = Saver(
            self._checkpointer,
            self._learner.engine,
            self._metrics.write,
            control=met.control,
            lasting=("local", "remote") if config.checkpoint.remote.url else ("local",),
            saved_step=self._place.step,
        )
        stack.enter_context(watched(self._context.stop_requested, self._saver.preempt))
        self._started = (self._place.step, time.perf_counter())

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for pending saves (after an error only briefly), flush metrics, release the engine."""
        self._closing.__exit__(kind, error, trace)

    def run(self) -> Summary:
        """Train to the last step or until any rank is asked to stop; either way all is saved when this returns."""
        self._greet()
        stopped = False
        if self._place.step == self._settings.warm_start.steps == 0:
            self._evaluate()
        while self._place.step < self._config.steps:
            stopped = agree(self._met.control, 0, self._context.stop_requested()).stop
            if stopped:
                break
            step = self._place.step + 1
            if step <= self._settings.warm_start.steps:
                self._supervise(step)
            else:
                self._round(step)
            if step == self._settings.warm_start.steps or _due(step, self._config.evaluation.every):
                self._evaluate()
            self._beat("save")
            self._saver.after_step(self._place)
        self._beat("save")
        self._saver.finish(self._place)
        if stopped:
            self._metrics.say(f"stopped after step {self._place.step} as asked; --resume continues from there")
        else:
            self._finish()
        return Summary(
            outcome="stopped" if stopped else "completed",
            step=self._place.step,
            cumulative_reward=self._place.cumulative_reward,
            accuracy=self._accuracy[1].greedy,
        )

    def _supervise(self, step: int) -> None:
        self._beat("train", step)
        started = time.perf_counter()
        factor = self._lr_factor(step)
        loss, update = self._learner.supervise(step, lr_factor=factor)
        self._place = dataclasses.replace(self._place, step=step)
        record = metrics.warm_start_record(loss, factor * self._config.optim.lr, update.gradient_norm)
        self._write(step, record, started)

    def _round(self, step: int) -> None:
        self._beat("sample", step)
        started = time.perf_counter()
        index = step - self._settings.warm_start.steps
        sampled = self._learner.rollouts(index, None if self._peers is None else self._peers.num_own(index))
        sampling_s = time.perf_counter() - started
        local, external = sampled, list[Group]()
        if self._peers is not None:
            mine, others = self._peers.trade(index, sampled)
            local, external = list(mine), list(others)
            self._say_of_others(step)
        self._beat("train", step)
        factor = self._lr_factor(step)
        stats = self._learner.round(local, external, sampled=sampled, lr_factor=factor)
        self._place = Place(
            step=step,
            cumulative_reward=self._place.cumulative_reward + stats.reward,
            generated_tokens=self._place.generated_tokens + stats.generated_tokens,
            peers={} if self._peers is None else self._peers.state(),
        )
        self._write(step, self._record(stats, factor, sampling_s), started)

    def _say_of_others(self, step: int) -> None:
        """Say it once where nothing came of others: a node that trains alone by mistake should not look well."""
        record = self._record_of_others()
        if step - max(self._started[0], self._settings.warm_start.steps) == _PATIENCE and not record["sharing/taken"]:
            self._metrics.say(f"round {_PATIENCE} since the start: {account(record)}")

    def _record_of_others(self) -> Mapping[str, float]:
        return self._peers.record() if self._peers is not None else {}

    def _record(self, stats: RoundStats, factor: float, sampling_s: float) -> metrics.Record:
        record = metrics.round_record(
            stats,
            lr=factor * self._config.optim.lr,
            cumulative_reward=self._place.cumulative_reward,
            generated_tokens=self._place.generated_tokens,
            sampling_s=sampling_s,
        )
        return {**record, **self._record_of_others()}

    def _write(self, step: int, record: metrics.Record, started: float) -> None:
        if not (_due(step, self._config.metrics.every) or step == self._config.steps):
            return
        now = time.perf_counter()
        first, since = self._started
        eta_s = (now - since) / (step - first) * (self._config.steps - step)
        self._metrics.write(step, {**record, "time/step_s": now - started, "time/eta_s": eta_s})

    def _lr_factor(self, step: int) -> float:
        """Return the learning rate as a share of `optim.lr`: a schedule for each of the two parts of the run."""
        warm = self._settings.warm_start
        if step > warm.steps:
            return schedule.factor(self._config.schedule, step - warm.steps, self._config.steps - warm.steps)
        rising = ScheduleConfig(
            kind="cosine", warmup_steps=min(self._config.schedule.warmup_steps, max(0, warm.steps - 1))
        )
        return schedule.factor(rising, step, warm.steps) * warm.lr / self._config.optim.lr

    def _evaluate(self) -> None:
        if not self._settings.evaluation_questions:
            return
        self._beat("evaluate")
        started = time.perf_counter()
        accuracy = self._learner.evaluate()
        self._accuracy = (self._place.step, accuracy)
        if self._place.step <= self._settings.warm_start.steps:
            self._first_accuracy = accuracy
        self._metrics.write(self._place.step, metrics.accuracy_record(accuracy, time.perf_counter() - started))

    def _resume(self) -> None:
        self._context.heartbeat.beat(step=0, phase="load")
        loaded = snapshot.restore(self._checkpointer, self._learner.engine, self._met.control)
        if loaded is not None:
            self._place = place_of(loaded)

    def _finish(self) -> None:
        if self._accuracy[0] < self._place.step:
            self._evaluate()
        for line in _table(self._first_accuracy, self._accuracy[1]):
            self._metrics.say(line)
        if record := self._record_of_others():
            self._metrics.say(account(record, resumed_after=self._started[0]))
        self._beat("export")
        setup.all_or_none(self._export if self._rank == 0 else lambda: None, self._met.control)

    def _export(self) -> None:
        info = self._checkpointer.latest()
        assert info is not None, "the last step was saved and waited for"
        state = {name.removeprefix(_WEIGHTS): tensor for name, tensor in ck.read(info, f"{_WEIGHTS}*").items()}
        folder = self._met.folder.model
        models.save_pretrained(
            self._learner.model_config, state, folder, self._tokenizer, max_positions=self._learner.policy.max_positions
        )
        self._metrics.say(f"model: {folder}")

    def _open_metrics(self) -> Metrics:
        if self._rank != 0:
            return Metrics([])
        return metrics.open_metrics(
            self._config,
            self._met.folder.path,
            self._met.run_id,
            recipe.to_tree(self._config),
            after_step=self._place.step,
            stream=sys.stdout,
        )

    def _greet(self) -> None:
        config, place = self._config, self._place.step
        start = f"resumes after step {place}" if place else "starts"
        self._metrics.say(
            f"{config.name} {start}: {self._learner.num_parameters:,} parameters in {self._met.precision}, "
            f"ZeRO {config.engine.zero_stage}, {num_ranks(config.parallel)} rank(s) on {self._met.device.type}; "
            f"tasks {', '.join(config.rl.tasks)}; folder {self._met.folder.path}"
        )
        if self._met.precision.warning:
            self._metrics.say(self._met.precision.warning)

    def _beat(self, phase: str, step: int | None = None) -> None:
        self._context.heartbeat.beat(step=self._place.step if step is None else step, phase=phase)


def _table(before: Accuracy, after: Accuracy) -> Iterator[str]:
    """Yield lines that say the held-out accuracy of each task, and what it was before the first round."""
    if not after.greedy:
        return
    width = max(map(len, (*after.greedy, "mean")))
    yield "held-out accuracy, before the first round and now: greedy; sampled as in training"
    for task in (*after.greedy, "mean"):
        cells = [_percent(figures, task) for of in ("greedy", "sampled") for figures in _both(before, after, of)]
        yield f"  {task:<{width}}  {cells[0]} {cells[1]};  {cells[2]} {cells[3]}"


def _both(before: Accuracy, after: Accuracy, kind: str) -> tuple[dict[str, float], dict[str, float]]:
    return getattr(before, kind), getattr(after, kind)


def _percent(by_task: Mapping[str, float], task: str) -> str:
    if not by_task:
        return "     -"
    value = sum(by_task.values()) / len(by_task) if task == "mean" else by_task[task]
    return f"{value:6.1%}"


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
