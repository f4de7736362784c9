"""One scenario: swarms of several seeds, side by side in one stack, from the warm start to the last round."""

# Shapes: P policies (seed after seed, node after node), B rows of each, T columns.

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from trainsys.bench.swarms import alphabet
from trainsys.bench.swarms.alphabet import SKILLS
from trainsys.bench.swarms.attack import Believer, Crowder, Liar
from trainsys.bench.swarms.stack import PAD, Adam, Shape, Stack
from trainsys.rl import questions, tasks
from trainsys.rl.advantage import external_advantages, group_advantages
from trainsys.rl.loss import policy_loss, token_weights
from trainsys.rl.rollout import Completion, Group, Question
from trainsys.rl.selection import Candidate, Quota
from trainsys.rl.sharing import Exchange, Identity, Pace
from trainsys.rl.stores import Mailbox
from trainsys.rl.validation import Rules, Validator

_PROMPT_COLUMNS = 8
_NEW_COLUMNS = 5
_SPECS = [questions.TaskSpec(skill) for skill in SKILLS]


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What all scenarios of a grid have in common."""

    nodes: int = 5
    seeds: int = 5
    rounds: int = 200
    groups: int = 8
    """Groups that a node trains on in a round: I + J."""
    group_size: int = 8
    dim: int = 64
    num_layers: int = 2
    warm_steps: int = 150
    warm_rows: int = 64
    warm_lr: float = 2e-3
    lr: float = 3e-4
    questions_per_skill: int = 40
    evaluate_every: int = 50


@dataclass(frozen=True, kw_only=True, slots=True)
class Scenario:
    """One way to run a swarm."""

    name: str
    swarm: Literal["skill-gap", "homogeneous"] = "skill-gap"
    """What nodes are warm-started on: two skills each, or all."""
    num_local: int = 8
    num_external: int = 0
    fill: bool = True
    """Whether nodes sample more themselves where others' groups do not fill a round."""
    oversample: int = 1
    """Groups generated for each local one that is trained on."""
    filter_local: bool = False
    filter_external: bool = True
    external: Literal["signed", "positive"] = "positive"
    liars: tuple[int, ...] = ()
    """Nodes that share a wrong answer as the right one."""
    crowders: tuple[int, ...] = ()
    """Nodes that share many true groups of one task, again and again."""
    validated: bool = True
    """Whether rewards are scored by who receives them, or believed."""
    absent: tuple[int, ...] = ()
    """Nodes that share nothing."""
    period: tuple[int, ...] = ()
    """Ticks that a round of each node takes, over and over; empty: one each. A run has as many rounds in all."""
    killed: tuple[int, ...] = ()
    """Nodes that do nothing any more after half of the rounds."""


@dataclass(frozen=True, slots=True)
class NodeResult:
    """What came of one node."""

    seed: int
    node: int
    rounds: int
    start: dict[str, float]
    """Held-out accuracy by skill after the warm start."""
    accuracy: dict[str, float]
    """At the end, greedy."""
    own_skills: list[str]
    cumulative_reward: float
    """Sum over rounds of the mean reward of the node's own completions."""
    generated: int
    """Groups."""
    local_signal: float
    """Share of its own groups whose rewards differ."""
    external: int
    """Groups of others that it trained on."""
    mean_age: float
    """Of these, in its own rounds."""
    rejected: dict[str, int]
    curve: list[tuple[int, float]] = field(default_factory=list)
    """(rounds, mean held-out accuracy)."""


def own_skills(scenario: Scenario, node: int) -> list[str]:
    """Return what a node is warm-started on."""
    if scenario.swarm == "homogeneous":
        return list(SKILLS)
    return [SKILLS[(node + offset) % len(SKILLS)] for offset in range(2)]


class Swarms:
    """The swarms of a scenario, one for each seed."""

    def __init__(self, scenario: Scenario, settings: Settings, *, first_seed: int, device: torch.device) -> None:
        self._scenario, self._settings, self._device = scenario, settings, device
        self._seeds = list(range(first_seed, first_seed + settings.seeds))
        self._num = settings.seeds * settings.nodes
        self._generator = torch.Generator(device=device).manual_seed(first_seed)
        shape = Shape(
            vocab_size=alphabet.VOCAB_SIZE,
            columns=_PROMPT_COLUMNS + _NEW_COLUMNS,
            dim=settings.dim,
            num_layers=settings.num_layers,
        )
        on_host = torch.Generator().manual_seed(first_seed)
        self._stack = Stack(shape, self._num, generator=on_host, device=device)
        self._nodes = [self._node(index) for index in range(self._num)]

    def _node(self, index: int) -> _Node:
        settings, scenario = self._settings, self._scenario
        seed, number = self._seeds[index // settings.nodes], index % settings.nodes
        if number == 0:
            self._mailbox = Mailbox(keep_s=1e9, budget_bytes=2**24)
        name = f"node{number}"
        validator = Validator(name, Rules()) if scenario.validated else Believer(name, Rules())
        pace = Pace(deadline_s=600, pool_per_peer=2 * settings.groups)
        kind = Liar if number in scenario.liars else Crowder if number in scenario.crowders else Exchange
        return _Node(
            seed=seed,
            number=number,
            exchange=kind(
                self._mailbox,
                validator,
                Identity(node=name, model="stack"),
                pace,
                generator=random.Random(f"{seed}/{number}/polls"),
            ),
            random=random.Random(f"{seed}/{number}"),
        )

    def warm_start(self) -> None:
        """Teach every node its own skills by examples."""
        settings = self._settings
        optimizer = Adam(self._stack, settings.warm_lr)
        everyone = torch.ones(self._num, device=self._device)
        for step in range(settings.warm_steps):
            rows = [self._examples(node, step) for node in self._nodes]
            tokens_PBT, pads_PB, counts_PBT = self._tensors(rows)
            log_probs_PBT = self._log_probs(None, tokens_PBT, pads_PB)
            weights_PBT = counts_PBT / counts_PBT.sum((1, 2), keepdim=True)
            (-(log_probs_PBT * weights_PBT).sum()).backward()  # type: ignore[no-untyped-call]
            optimizer.step(everyone)

    def state(self) -> dict[str, Tensor]:
        """Return the weights, to begin another scenario with."""
        return {name: weight.detach().cpu().clone() for name, weight in self._stack.weights.items()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Take up weights."""
        with torch.no_grad():
            for name, weight in self._stack.weights.items():
                weight.copy_(state[name])

    def run(self) -> list[NodeResult]:
        """Run all rounds and return what came of each node."""
        settings, scenario = self._settings, self._scenario
        period = scenario.period or (1,)
        optimizer = Adam(self._stack, settings.lr)
        start = self._evaluate()
        rest = sum(self._limit(node) for node in self._nodes)
        tick = 0
        while rest:
            active = [index for index, node in enumerate(self._nodes) if tick % period[node.number % len(period)] == 0]
            active = [index for index in active if self._limit(self._nodes[index]) > self._nodes[index].rounds]
            self._round(active[:rest] if scenario.period else active, optimizer)
            rest -= len(active[:rest])
            tick += 1
            if tick % settings.evaluate_every == 0:
                for node, accuracy in zip(self._nodes, self._evaluate(), strict=True):
                    node.curve.append((node.rounds, sum(accuracy.values()) / len(SKILLS)))
        return [self._result(*item) for item in zip(self._nodes, start, self._evaluate(), strict=True)]

    def _limit(self, node: _Node) -> int:
        """Return how many rounds a node makes: of nodes at different speeds, the fast ones as many as are left."""
        scenario, rounds = self._scenario, self._settings.rounds
        if node.number in scenario.killed:
            return rounds // 2
        return rounds * self._num if scenario.period and not node.rounds < rounds else rounds

    def _round(self, active: list[int], optimizer: Adam) -> None:
        """Make a round of some nodes: ask, sample, share, take, update."""
        scenario, settings = self._scenario, self._settings
        nodes = [self._nodes[index] for index in active]
        policies = None if len(active) == self._num else torch.tensor(active, device=self._device)
        quota = Quota(
            num_local=scenario.num_local,
            num_external=scenario.num_external,
            per_peer=max(2, -(-scenario.num_external // (settings.nodes - 1))),
            filter_local=scenario.filter_local,
            filter_external=scenario.filter_external,
        )
        own = self._own(active, quota)
        for node, groups in zip(nodes, own, strict=True):
            if node.number not in scenario.absent:
                node.exchange.share(groups)
                node.exchange.publish_waiting()
        rows: list[list[_Row]] = []
        for node, groups in zip(nodes, own, strict=True):
            chosen = node.exchange.take(groups, quota, now_round=node.rounds, generator=node.random)
            node.count(groups, chosen.external)
            external = [candidate.group for candidate in chosen.external]
            rows.append(self._rows(chosen.local, "signed") + self._rows(external, scenario.external))
        self._update(active, policies, rows, optimizer)

    def _own(self, active: Sequence[int], quota: Quota) -> list[list[Group]]:
        """Return what active nodes sample in a round, when they have read what has come since the last."""
        asked = [self._questions(self._nodes[index], quota) for index in active]
        groups: dict[int, list[Group]] = {}
        for count in sorted({len(of_node) for of_node in asked}):
            some = [(index, of_node) for index, of_node in zip(active, asked, strict=True) if len(of_node) == count]
            which = [index for index, _ in some]
            policies = None if len(which) == self._num else torch.tensor(which, device=self._device)
            questions_of = [of_node for _, of_node in some]
            drawn = self._sample(policies, questions_of, self._settings.group_size, self._generator)
            for index, item in zip(which, zip(questions_of, drawn, strict=True), strict=True):
                groups[index] = _groups(self._nodes[index], item)
        return [groups[index] for index in active]

    def _questions(self, node: _Node, quota: Quota) -> list[Question]:
        """Return what a node asks in its next round: the skills in turn, going on where the last round ended."""
        count = self._scenario.num_local * self._scenario.oversample
        if self._scenario.num_external:
            node.exchange.poll()
            if self._scenario.fill:
                count += node.exchange.num_missing(quota, now_round=node.rounds)
        first, node.asked = node.asked, node.asked + count
        return questions.draw(_SPECS, count, (node.seed, node.number, node.rounds), first=first)

    def _sample(
        self,
        policies: Tensor | None,
        asked: Sequence[Sequence[Question]],
        num_each: int,
        generator: torch.Generator | None,
    ) -> list[list[list[list[int]]]]:
        """Return the tokens of completions by policy, question and attempt."""
        tokens = torch.full((len(asked), len(asked[0]), _PROMPT_COLUMNS), PAD)
        pads = torch.zeros(tokens.shape[:2], dtype=torch.long)
        for policy, of_policy in enumerate(asked):
            for place, question in enumerate(of_policy):
                prompt = alphabet.encode(question.prompt)
                pads[policy, place] = _PROMPT_COLUMNS - len(prompt)
                tokens[policy, place, _PROMPT_COLUMNS - len(prompt) :] = torch.tensor(prompt)
        with torch.no_grad():
            drawn = self._stack.sample(
                self._stack.at(policies),
                tokens.to(self._device),
                pads.to(self._device),
                num_each=num_each,
                num_new=_NEW_COLUMNS,
                generator=generator,
            )
        found: list[list[list[list[int]]]] = drawn.tolist()
        return found

    def _rows(self, groups: Sequence[Group], rule: Literal["signed", "positive"]) -> list[_Row]:
        """Return the completions of the groups with signal, as `rl.drop_uniform` does by default."""
        groups = [group for group in groups if group.has_signal]
        if not groups:
            return []
        rewards_NG = torch.tensor([group.rewards for group in groups])
        advantages_NG = external_advantages(group_advantages(rewards_NG), rule).tolist()
        return [
            _Row(group.question.prompt, completion.text, completion.finished, advantage)
            for group, advantages in zip(groups, advantages_NG, strict=True)
            for completion, advantage in zip(group.completions, advantages, strict=True)
        ]

    def _update(self, active: list[int], policies: Tensor | None, rows: list[list[_Row]], optimizer: Adam) -> None:
        if not any(rows):
            return
        tokens_PBT, pads_PB, counts_PBT = self._tensors(rows)
        log_probs_PBT = self._log_probs(policies, tokens_PBT, pads_PB)
        advantages_PB = torch.zeros(pads_PB.shape)
        weights_PBT = torch.zeros(counts_PBT.shape)
        for policy, of_policy in enumerate(rows):
            advantages_PB[policy, : len(of_policy)] = torch.tensor([row.advantage for row in of_policy])
            weights_PBT[policy] = token_weights(
                counts_PBT[policy].cpu(),
                "grpo",
                num_completions=len(of_policy),
                num_tokens=0,
                longest=_NEW_COLUMNS,
            )
        loss, _ = policy_loss(
            log_probs_PBT.flatten(0, 1),
            log_probs_PBT.detach().flatten(0, 1),  # one update a round: the policy is the round's start
            advantages_PB.to(self._device).flatten()[:, None].expand(-1, counts_PBT.shape[2]),
            weights_PBT.to(self._device).flatten(0, 1),
        )
        loss.backward()  # type: ignore[no-untyped-call]
        is_active = torch.zeros(self._num)
        is_active[[index for index, of_policy in zip(active, rows, strict=True) if of_policy]] = 1
        optimizer.step(is_active.to(self._device))

    def _tensors(self, rows: Sequence[Sequence[_Row]]) -> tuple[Tensor, Tensor, Tensor]:
        """Return tokens, columns of padding, and which columns predict a token of a completion; [P, B, T - 1] that."""
        width = _PROMPT_COLUMNS + _NEW_COLUMNS
        most = max(1, *map(len, rows))
        tokens = [[_padded(row) for row in of_policy] for of_policy in rows]
        empty = ([PAD] * width, width - 1, [0.0] * (width - 1))
        filled = [of_policy + [empty] * (most - len(of_policy)) for of_policy in tokens]
        tokens_PBT, pads_PB, counts_PBT = (
            torch.tensor([[row[part] for row in of_policy] for of_policy in filled]) for part in range(3)
        )
        return tokens_PBT.to(self._device), pads_PB.to(self._device), counts_PBT.to(self._device)

    def _log_probs(self, policies: Tensor | None, tokens_PBT: Tensor, pads_PB: Tensor) -> Tensor:
        """Return the log-probability of every token but the first, [P, B, T - 1]."""
        weights = self._stack.at(policies)
        logits_PBTV = self._stack.logits(weights, tokens_PBT[..., :-1], pads_PB)
        flat = functional.cross_entropy(logits_PBTV.flatten(0, 2), tokens_PBT[..., 1:].flatten(), reduction="none")
        return -flat.view(tokens_PBT[..., 1:].shape)

    def _examples(self, node: _Node, step: int) -> list[_Row]:
        count = self._settings.warm_rows
        specs = [questions.TaskSpec(skill) for skill in own_skills(self._scenario, node.number)]
        asked = questions.draw(specs, count, (node.seed, node.number, step, -1))
        return [_Row(question.prompt, tasks.answer_of(question), True, 0.0) for question in asked]

    def _evaluate(self) -> list[dict[str, float]]:
        """Return each node's greedy accuracy on held-out questions, the same for all, by skill."""
        each = self._settings.questions_per_skill
        asked = questions.draw(_SPECS, each * len(SKILLS), (0,), held_out=True)
        drawn = self._sample(None, [asked] * self._num, 1, None)
        found = []
        for of_policy in drawn:
            right: Counter[str] = Counter()
            for question, (tokens,) in zip(asked, of_policy, strict=True):
                right[question.task] += int(tasks.score(question, alphabet.decode(tokens)[0]))
            found.append({skill: right[skill] / each for skill in SKILLS})
        return found

    def _result(self, node: _Node, start: dict[str, float], accuracy: dict[str, float]) -> NodeResult:
        return NodeResult(
            seed=node.seed,
            node=node.number,
            rounds=node.rounds,
            start=start,
            accuracy=accuracy,
            own_skills=own_skills(self._scenario, node.number),
            cumulative_reward=node.reward,
            generated=node.generated,
            local_signal=node.with_signal / max(1, node.generated),
            external=node.external,
            mean_age=node.age / max(1, node.external),
            rejected=dict(node.exchange.stats().rejected),
            curve=node.curve,
        )


@dataclass(slots=True)
class _Node:
    """What one node keeps between rounds beside its policy."""

    seed: int
    number: int
    exchange: Exchange
    random: random.Random
    rounds: int = 0
    asked: int = 0
    """Questions so far, which say whose turn the next is."""
    reward: float = 0.0
    generated: int = 0
    with_signal: int = 0
    external: int = 0
    age: int = 0
    curve: list[tuple[int, float]] = field(default_factory=list)

    def count(self, own: Sequence[Group], external: Sequence[Candidate]) -> None:
        """Note what a round generated and took."""
        self.reward += sum(group.mean_reward for group in own) / len(own)
        self.generated += len(own)
        self.with_signal += sum(group.has_signal for group in own)
        self.external += len(external)
        self.age += sum(self.rounds - candidate.arrived_round for candidate in external)
        self.rounds += 1


@dataclass(frozen=True, slots=True)
class _Row:
    """A completion to train on."""

    prompt: str
    completion: str
    finished: bool
    advantage: float


def _groups(node: _Node, asked_and_drawn: tuple[Sequence[Question], list[list[list[int]]]]) -> list[Group]:
    found = []
    for question, drawn in zip(*asked_and_drawn, strict=True):
        completions = tuple(Completion(*alphabet.decode(tokens)) for tokens in drawn)
        scores = {text: tasks.score(question, text) for text in {completion.text for completion in completions}}
        rewards = tuple(scores[completion.text] for completion in completions)
        found.append(Group(question, completions, rewards, f"node{node.number}", node.rounds))
    return found


def _padded(row: _Row) -> tuple[list[int], int, list[float]]:
    """Return a row's tokens, its columns of padding, and 1 where a column predicts a token of the completion."""
    prompt = alphabet.encode(row.prompt)
    completion = alphabet.encode(row.completion)[:_NEW_COLUMNS]
    pads = _PROMPT_COLUMNS - len(prompt)
    counted = min(_NEW_COLUMNS, len(completion) + row.finished)
    tokens = [PAD] * pads + [*prompt, *completion] + [PAD] * (_NEW_COLUMNS - len(completion))
    counts = [0.0] * (_PROMPT_COLUMNS - 1) + [1.0] * counted + [0.0] * (_NEW_COLUMNS - counted)
    return tokens, pads, counts
