"""One node's learner: asks, samples, scores, and trains its policy on its own groups and those of others.

A node is a process group of one or more ranks that train one policy through one engine. Every rank calls every method;
questions and rows are shared out among the ranks, and figures are those of all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist

from parallel import MeshGroups, hybrid
from trainsys import meter, models
from trainsys.check import accumulation_steps, data_ranks
from trainsys.config import ModelConfig, RunConfig
from trainsys.data import StepBatch, Tokenizer
from trainsys.engines import DTYPES, Shares, Update, open_engine
from trainsys.errors import ConfigError
from trainsys.models.decoder import Decoder
from trainsys.models.huggingface import HuggingFaceModel
from trainsys.optim import Plan, build_optimizer, plan_of
from trainsys.rl import advantage, loss, questions, rows, tasks
from trainsys.rl.errors import RLError
from trainsys.rl.model import PREFIX, PolicyModel
from trainsys.rl.policy import Policy, Row
from trainsys.rl.rollout import Group, Question
from trainsys.rl.sampler import slot_core
from trainsys.setup import all_or_none

T = TypeVar("T")

_TRAINING, _HELD_OUT, _SHOWN, _SAMPLING = range(4)
"""What seeds are for: the first integer of their keys."""
_HELD_OUT_SAMPLES = 4
"""Completions of each held-out question at the temperature of training."""


@dataclass(frozen=True, slots=True)
class World:
    """Where a node's ranks are and meet."""

    rank: int
    device: torch.device
    groups: MeshGroups
    control: dist.ProcessGroup
    """gloo over all ranks of the node."""


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Mean scores on held-out questions, by task."""

    greedy: dict[str, float]
    """Of the most likely tokens."""
    sampled: dict[str, float]
    """Of completions at the temperature of training: the reward that rounds raise, on questions they never ask."""


@dataclass(frozen=True, slots=True)
class RoundStats:
    """What a round did, on all ranks together."""

    loss: float
    reward: float
    """Mean of the node's own completions, before penalties."""
    reward_of: Mapping[str, float]
    """By task, of the node's own completions."""
    signal_rate: float
    """Share of the node's own groups whose rewards differ."""
    num_groups: int
    """Own groups that were sampled."""
    num_trained: int
    """Groups that were trained on, own and others'."""
    num_external: int
    """Of these, others'."""
    num_tokens: int
    """Trained on in each update."""
    generated_tokens: int
    mean_tokens: float
    """Of the node's own completions."""
    finished: float
    """Share of the node's own completions that ended by themselves."""
    updates: int
    """0 where no group had a signal: nothing is to be learnt then, and momentum alone does not move the policy."""
    gradient_norm: float
    """Of the last update."""
    clipped: float
    """Share of tokens that the clip kept from moving."""
    kl_to_start: float
    """Nats per token from the round's start, over its updates."""
    importance: float
    """Mean weight of a token."""


class Learner:
    """A policy, its engine, and how a round trains it."""

    def __init__(self, config: RunConfig, world: World, tokenizer: Tokenizer, *, node: str = "local") -> None:
        """Build the policy and its engine. `node` names who samples in `Group.node`, and its random choices.

        Raises:
            ConfigError, TaskError: a model or a task that is not as the recipe says.
        """
        self._config, self._settings, self._world = config, config.rl, world
        self.node = node
        self._specs = [questions.parse_spec(text) for text in config.rl.tasks]
        self._shown = [questions.parse_spec(text) for text in config.rl.warm_start.tasks] or self._specs
        self._num_ranks, self._num_parts = data_ranks(config.parallel), accumulation_steps(config)
        self._seed = questions.seed_of(config.seed, *node.encode())
        self._phases = meter.Phases(world.device)
        with contextlib.ExitStack() as stack:
            model = _build(config, tokenizer)
            self.model_config = _config_of(config, model)
            self.num_parameters = models.num_parameters(model)
            wrapped = PolicyModel(
                model,
                vocab_size=tokenizer.vocab_size,
                temperature=config.rl.generation.temperature,
                loss=config.rl.loss,
            )
            plan = _prefixed(plan_of(model, config.optim))
            part = hybrid.apply(wrapped, world.groups, models.Anatomy(config.data.sequence_length), place=self._place)
            stack.callback(part.close)
            self.engine = open_engine(part, config, lambda module: build_optimizer(module, config.optim, plan))
            stack.callback(self.engine.close)
            self._model = wrapped
            self.policy = Policy(wrapped.policy, tokenizer, config.rl.generation)
            self._reference = self._load_reference(config, tokenizer)
            self._closing = stack.pop_all()

    def close(self) -> None:
        """Release the engine; a second call does nothing."""
        self._closing.close()

    @property
    def version(self) -> int:
        """Updates that the policy has seen."""
        return int(self.engine.counters()["steps_taken"])

    @property
    def num_local(self) -> int:
        """Questions that this rank asks in a round without others' groups."""
        return self._settings.questions // self._num_ranks

    def rollouts(self, round_index: int, count: int | None = None) -> list[Group]:
        """Ask, sample and score for a round on this rank: `count` groups, by default `num_local`.

        With `rl.resamples` more, until so many groups have a signal.

        Raises:
            PolicyError: a prompt that does not fit; on the other ranks a TrainsysError that names this one.
        """
        return self._agreed(lambda: self._rollouts(round_index, count))

    def _rollouts(self, round_index: int, count: int | None) -> list[Group]:
        count = self.num_local if count is None else count
        groups = self.sample(self.ask(round_index, count), round_index)
        for attempt in range(1, self._settings.resamples + 1):
            if sum(group.has_signal for group in groups) >= count:
                break
            groups += self.sample(self.ask(round_index, count, attempt), round_index)
        return groups

    def ask(self, round_index: int, count: int, attempt: int = 0) -> list[Question]:
        """Return this rank's `count` questions of a round, of all tasks in turn, each round from another task on."""
        key = (self._seed, _TRAINING, round_index, attempt)
        drawn = questions.draw(self._specs, count * self._num_ranks, key, first=round_index + attempt)
        return drawn[self._world.rank :: self._num_ranks]

    def sample(self, asked: Sequence[Question], round_index: int) -> list[Group]:
        """Return a scored group of `group_size` completions of each question, by the policy as it is."""
        seed = questions.seed_of(self._seed, _SAMPLING, round_index)
        version, groups = self.version, []
        for question, completions in zip(
            asked, self.policy.sample(asked, self._settings.group_size, seed), strict=True
        ):
            rewards = tuple(tasks.score(question, completion.text) for completion in completions)
            groups.append(Group(question, completions, rewards, self.node, version))
        return groups

    def round(
        self,
        local: Sequence[Group],
        external: Sequence[Group] = (),
        *,
        sampled: Sequence[Group] | None = None,
        lr_factor: float = 1.0,
    ) -> RoundStats:
        """Train on this rank's own groups and on those of other nodes, whose rewards this node has scored.

        Both together may be `rl.questions` / ranks groups; fewer are fine. Of an external group with more than
        `rl.group_size` completions those are taken whose advantages are the largest, of all of its. Of own groups that
        were resampled the first that fit are taken. `sampled` are all own groups, which figures are of; by default
        `local`.

        Raises:
            RLError: more completions than that; on the other ranks, of this and the next, a TrainsysError.
            PolicyError: an external group whose tokens or prompt this policy does not take.
            NumericsError: the loss or the gradient is not finite.
        """
        settings = self._settings
        kept = [group for group in local if group.has_signal or not settings.drop_uniform]
        kept = kept[: self.num_local] if settings.resamples else kept
        trained = [(group, False) for group in kept]
        trained += [(group, True) for group in external if group.has_signal or not settings.drop_uniform]
        taken = self._agreed(lambda: self._fitting(trained))
        figures = self._figures(local if sampled is None else sampled, len(trained), len(trained) - len(kept))
        return self._learn(figures, taken, lr_factor)

    def supervise(self, step: int, *, lr_factor: float = 1.0) -> tuple[float, Update]:
        """Train one step on right answers to fresh questions; return (loss in nats per token, what it did)."""
        count = self._settings.questions * self._settings.group_size
        shown = questions.draw(self._shown, count, (self._seed, _SHOWN, step))[self._world.rank :: self._num_ranks]
        examples = self._agreed(lambda: [self.policy.example(asked, tasks.answer_of(asked)) for asked in shown])
        batch = self._batch(self._parts(examples), {})
        total = int(self._summed(torch.tensor([batch.num_targets]))[0])
        sums = self.engine.train(batch, Shares(total, self._num_ranks * self._num_parts), self._phases)
        mean = float(self._summed(sums[:1].cpu())[0]) / total
        return mean, self.engine.update(lr_factor)

    def evaluate(self) -> Accuracy:
        """Return the mean scores of answers to held-out questions, the same ones every time. Raises as `rollouts`."""
        number = max(self._settings.evaluation_questions, 1)
        names = [f"{spec.name}{_suffix(spec)}" for spec in self._specs]
        greedy, at_temperature = (self._summed(self._agreed(self._scores)) / number).tolist()
        return Accuracy(dict(zip(names, greedy, strict=True)), dict(zip(names, at_temperature, strict=True)))

    def _scores(self) -> Tensor:
        """Return this rank's sums of scores of held-out questions, [2, tasks]: greedy, and at temperature."""
        number = self._settings.evaluation_questions
        sums = torch.zeros(2, len(self._specs), dtype=torch.float64)
        for index, spec in enumerate(self._specs):
            asked = questions.draw([spec], number, (_HELD_OUT,), held_out=True)[self._world.rank :: self._num_ranks]
            sampled = self.policy.sample(asked, _HELD_OUT_SAMPLES, _HELD_OUT)
            for question, answer, others in zip(asked, self.policy.answer(asked), sampled, strict=True):
                sums[0, index] += tasks.score(question, answer.text)
                sums[1, index] += sum(tasks.score(question, other.text) for other in others) / _HELD_OUT_SAMPLES
        return sums

    def _place(self, part: nn.Module) -> nn.Module:
        return part.to(device=self._world.device, dtype=DTYPES[self._config.engine.precision])

    def _load_reference(self, config: RunConfig, tokenizer: Tokenizer) -> PolicyModel | None:
        if not config.rl.loss.kl_weight:
            return None
        frozen = PolicyModel(
            _build(config, tokenizer),
            vocab_size=tokenizer.vocab_size,
            temperature=config.rl.generation.temperature,
            loss=config.rl.loss,
        )
        return self._place(frozen).eval().requires_grad_(False)  # type: ignore[return-value]

    def _fitting(self, trained: Sequence[tuple[Group, bool]]) -> list[_Trained]:
        """Return what a round trains on, of (group, whether it is another node's). Raises as `round`."""
        taken = [one for group, foreign in trained for one in self._trained(group, foreign)]
        room = self._num_parts * self._config.batch.micro_sequences
        if len(taken) > room:
            raise RLError(
                f"a round of {len(taken)} completions on this rank; its batch holds {room} "
                "(rl.questions x rl.group_size / ranks)"
            )
        return taken

    def _trained(self, group: Group, foreign: bool) -> list[_Trained]:
        """Return the completions of a group that this policy can read, with their advantages among all of them."""
        settings = self._settings.loss
        rewards = torch.tensor(group.rewards, dtype=torch.float64)
        limit = self._settings.generation.max_new_tokens
        own = self.policy.rows(group)
        lengths = torch.tensor([len(row.completion) if row else limit for row in own])
        if settings.overlong == "penalise":
            rewards = rewards + advantage.overlong_penalty(
                lengths.double(), max_new_tokens=limit, overlong_tokens=settings.overlong_tokens
            )
        advantages = advantage.group_advantages(rewards[None], divide_by_std=settings.kind != "dr_grpo")[0]
        if foreign:
            advantages = advantage.external_advantages(advantages, settings.external, limit=settings.external_limit)
        masks = settings.overlong == "mask"
        found = [
            _Trained(row, value, counts=completion.finished or not masks)
            for row, value, completion in zip(own, advantages.tolist(), group.completions, strict=True)
            if row is not None
        ]
        return sorted(found, key=lambda one: -abs(one.advantage))[: self._settings.group_size] if foreign else found

    def _learn(self, figures: RoundStats, taken: list[_Trained], lr_factor: float) -> RoundStats:
        settings = self._settings
        weights = self._weights(taken)
        if not int(self._summed(torch.tensor([sum(int((w != 0).sum()) for w in weights)]))[0]):
            return figures
        pieces = self._parts([one.row for one in taken])
        extras: dict[str, Sequence[Tensor]] = {
            "advantages_BT": [torch.full((len(one.row.completion),), one.advantage).double() for one in taken],
            "weights_BT": weights,
        }
        importance = settings.loss.importance
        if importance == "behaviour" or (importance == "proximal" and settings.updates > 1):
            start = self._log_probs(self._model, pieces, len(taken))
            if importance == "behaviour":
                extras["importance_BT"] = self._importance(taken, start)
            if settings.updates > 1:
                extras["start_BT"] = start
        if self._reference is not None:
            extras["reference_BT"] = self._log_probs(self._reference, pieces, len(taken))
        batch = self._batch(pieces, extras)
        losses, norm = [], 0.0
        for _ in range(settings.updates):
            sums = self.engine.train(batch, Shares(1, self._num_ranks * self._num_parts), self._phases)
            losses.append(float(self._summed(sums[:1].cpu())[0]))
            norm = self.engine.update(lr_factor).gradient_norm
        ratios = torch.stack([torch.stack([value.double() for value in told]) for told in self._model.take_ratios()])
        tokens, clipped, kl, _, weight = self._summed(ratios.sum(0).cpu()).tolist()
        return replace(
            figures,
            loss=sum(losses) / len(losses),
            updates=settings.updates,
            num_tokens=round(tokens / settings.updates),
            gradient_norm=norm,
            clipped=clipped / tokens,
            kl_to_start=kl / tokens,
            importance=weight / tokens,
        )

    def _weights(self, taken: Sequence[_Trained]) -> list[Tensor]:
        """Return what each token of each row counts, so that the loss is a mean over all ranks."""
        lengths = [len(one.row.completion) * one.counts for one in taken]
        counted = self._summed(torch.tensor([sum(length > 0 for length in lengths), sum(lengths)]))
        return [
            loss.token_weights(
                torch.full((1, len(one.row.completion)), one.counts),
                self._settings.loss.kind,
                num_completions=int(counted[0]),
                num_tokens=int(counted[1]),
                longest=self._settings.generation.max_new_tokens,
            )[0]
            for one in taken
        ]

    def _importance(self, taken: Sequence[_Trained], start: Sequence[Tensor]) -> list[Tensor]:
        """Return the truncated weight of each token; 1 where its sampler does not say its log-probabilities."""
        limit = self._settings.loss.importance_limit
        return [
            torch.ones_like(own)
            if one.row.behaviour is None
            else loss.importance_weights(own, torch.tensor(one.row.behaviour, dtype=own.dtype), limit=limit)
            for one, own in zip(taken, start, strict=True)
        ]

    @torch.no_grad()
    def _log_probs(self, model: PolicyModel, pieces: Sequence[rows.Part], num_rows: int) -> list[Tensor]:
        """Return the log-probability of each token of each row under a model, on the CPU."""
        found: dict[int, Tensor] = {}
        training = model.training
        model.eval()
        for piece in pieces:
            tokens, targets = (t.to(self._world.device) for t in (piece.batch.tokens, piece.batch.targets))
            found.update(rows.spread(piece, model.log_probs(tokens, targets)[0].cpu()))
        model.train(training)
        return [found[index] for index in range(num_rows)]

    def _parts(self, examples: Sequence[Row]) -> list[rows.Part]:
        return rows.parts(examples, micro_rows=self._config.batch.micro_sequences, num_parts=self._num_parts)

    def _batch(self, pieces: Sequence[rows.Part], extras: Mapping[str, Sequence[Tensor]]) -> StepBatch:
        batches = [rows.with_extras(piece, extras) for piece in pieces]
        return StepBatch(0, batches, sum(batch.num_targets for batch in batches))

    def _figures(self, local: Sequence[Group], trained: int, external: int) -> RoundStats:
        names = sorted({spec.name for spec in self._specs})
        completions = [completion for group in local for completion in group.completions]
        by_task = [[r for g in local if g.question.task == name for r in g.rewards] for name in names]
        own = torch.tensor(
            [
                len(local),
                sum(group.has_signal for group in local),
                trained,
                external,
                len(completions),
                sum(completion.num_tokens for completion in completions),
                sum(completion.finished for completion in completions),
                *map(len, by_task),
                *map(sum, by_task),
            ],
            dtype=torch.float64,
        )
        groups, signal, trained, external, number, tokens, finished, *rest = self._summed(own).tolist()
        counts, sums = rest[: len(names)], rest[len(names) :]
        return RoundStats(
            loss=0.0,
            reward=sum(sums) / max(number, 1),
            reward_of={name: total / count for name, count, total in zip(names, counts, sums, strict=True) if count},
            signal_rate=signal / max(groups, 1),
            num_groups=int(groups),
            num_trained=int(trained),
            num_external=int(external),
            num_tokens=0,
            generated_tokens=int(tokens),
            mean_tokens=tokens / max(number, 1),
            finished=finished / max(number, 1),
            updates=0,
            gradient_norm=0.0,
            clipped=0.0,
            kl_to_start=0.0,
            importance=1.0,
        )

    def _agreed(self, action: Callable[[], T]) -> T:
        """Return what `action` returns here once no rank's has failed: one that raised alone would hang the others."""
        return all_or_none(action, self._world.control) if self._num_ranks > 1 else action()

    def _summed(self, values: Tensor) -> Tensor:
        """Return values summed over the ranks; every rank calls it."""
        if self._num_ranks > 1:
            values = values.clone()
            dist.all_reduce(values, group=self._world.control)
        return values


@dataclass(frozen=True, slots=True)
class _Trained:
    """One completion that a round trains on."""

    row: Row
    advantage: float
    counts: bool
    """False keeps its tokens out of the loss."""


def _suffix(spec: questions.TaskSpec) -> str:
    """Return what tells a task with parameters from the plain one."""
    settings = tasks.parse(spec.parameters)
    return "".join(f",{key}={value}" for key, value in settings.items())


def _build(config: RunConfig, tokenizer: Tokenizer) -> nn.Module:
    """Return the policy's model on the CPU in fp32, from `rl.start_from` or initial values."""
    model = _load(config, tokenizer)
    slot_core(model)
    return model


def _load(config: RunConfig, tokenizer: Tokenizer) -> nn.Module:
    if not config.rl.start_from:
        return models.build(
            config.model,
            vocab_size=tokenizer.vocab_size,
            max_positions=config.data.sequence_length,
            recompute=config.engine.recompute,
            seed=config.seed,
        )
    model = models.load_pretrained(Path(config.rl.start_from)).float().train()
    rows = _rows_of(model)
    if rows < tokenizer.vocab_size:
        raise ConfigError(
            [
                f"config: rl.start_from: '{config.rl.start_from}' has {rows} rows, under the tokenizer's "
                f"{tokenizer.vocab_size} tokens; give its own tokenizer (data.tokenizer)"
            ]
        )
    return model


def _rows_of(model: nn.Module) -> int:
    if isinstance(model, Decoder):
        return model.config.vocab_size
    assert isinstance(model, HuggingFaceModel)
    return int(model.config.get_text_config().vocab_size)


def _config_of(config: RunConfig, model: nn.Module) -> ModelConfig:
    """Return what the model is written with."""
    if not config.rl.start_from:
        return config.model
    return model.config if isinstance(model, Decoder) else ModelConfig(kind="hf", path=config.rl.start_from)


def _prefixed(plan: Plan) -> Plan:
    return Plan(
        {f"{PREFIX}{name}": group for name, group in plan.group_of.items()},
        {f"{PREFIX}{name}": heights for name, heights in plan.row_splits.items()},
    )
