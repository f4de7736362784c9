"""A learner trains on what its formulas say, alike on one rank and on two, and takes others' groups as text."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist

from parallel import Mesh, MeshGroups
from parallel.hybrid import GROUPS
from tests.ranks import run_ranks
from tests.test_trainsys.test_hf import write_jsonl, write_llama
from trainsys import models, recipe
from trainsys.config import ModelConfig, RunConfig
from trainsys.data import load_tokenizer
from trainsys.errors import ConfigError, TrainsysError
from trainsys.rl import rows, tasks
from trainsys.rl.config import LossConfig
from trainsys.rl.errors import PolicyError, RLError
from trainsys.rl.learner import Learner, World
from trainsys.rl.model import PolicyModel
from trainsys.rl.peers import SharedPeers
from trainsys.rl.policy import Row
from trainsys.rl.rollout import Completion, Group
from trainsys.rl.sharing import Exchange, Identity, Pace
from trainsys.rl.stores import Mailbox
from trainsys.rl.validation import Rules, Validator

_BASE = {
    "name": "learner",
    "steps": 4,
    "model.num_layers": 1,
    "model.dim": 32,
    "model.num_heads": 2,
    "model.ffn_dim": 64,
    "data.sequence_length": 32,
    "rl.tasks": '["largest:length=2","increment:digits=2"]',
    "rl.questions": 4,
    "rl.group_size": 4,
    "rl.evaluation_questions": 6,
    "rl.generation.max_new_tokens": 6,
    "batch.global_sequences": 16,
    "batch.micro_sequences": 4,
    "optim.lr": 1e-2,
    "optim.weight_decay": 0.0,
    "schedule.warmup_steps": 0,
    "evaluation.every": 2,
    "engine.device": "cpu",
}


def _config(**changes: Any) -> RunConfig:
    values = {**_BASE, **{key.replace("__", "."): value for key, value in changes.items()}}
    return recipe.load([], [f"--{key}={value}" for key, value in values.items()]).config


@contextlib.contextmanager
def _learner(config: RunConfig, rank: int = 0, world_size: int = 1, node: str = "me") -> Iterator[Learner]:
    assert dist.group.WORLD is not None
    with MeshGroups(Mesh(config.parallel, world_size)) as groups:
        groups.prepare(*GROUPS)
        world = World(rank, torch.device("cpu"), groups, dist.group.WORLD)
        learner = Learner(config, world, load_tokenizer(config.data.tokenizer), node=node)
        try:
            yield learner
        finally:
            learner.close()


def _learn(rank: int, world_size: int, backend: str, stage: int) -> list[Any]:
    config = _config(
        parallel__replicate=world_size, engine__backend=backend, engine__zero_stage=stage, rl__updates=2,
        rl__loss__importance="behaviour",
    )  # fmt: skip
    with _learner(config, rank, world_size) as learner:
        told: list[Any] = [learner.supervise(step)[0] for step in range(30)]
        for index in (1, 2, 3):
            stats = learner.round(learner.rollouts(index), lr_factor=0.1)
            told.append(dataclasses.asdict(stats))
        return [*told, dataclasses.asdict(learner.evaluate()), learner.version]


def test_two_ranks_learn_what_one_does() -> None:
    (alone,) = run_ranks(_learn, 1, "deepspeed", 1)
    (of_torch,) = run_ranks(_learn, 1, "torch", 0)
    first, second = run_ranks(_learn, 2, "deepspeed", 1)
    assert first == second, "figures are those of all ranks"
    assert alone[-1] > 30, "some rounds had a signal"
    for other in (of_torch, first):
        # Sums are in another order; the policies stay near enough to draw the same.
        assert alone[:30] == pytest.approx(other[:30], rel=1e-3)
        for one, two in zip(alone[30:33], other[30:33], strict=True):
            assert one["reward_of"] == two["reward_of"]
            numbers = [{key: value for key, value in told.items() if key != "reward_of"} for told in (one, two)]
            assert numbers[0] == pytest.approx(numbers[1], rel=2e-2, abs=1e-4)
        assert alone[-2:] == other[-2:]


def _exchange(rank: int, world_size: int) -> dict[str, Any]:
    question = tasks.ask("largest", 3, {"length": 2})
    answer = tasks.answer_of(question)
    texts = (answer, answer, "12", "13")
    completions = tuple(Completion(text, 3, finished=True) for text in texts)
    foreign = Group(question, completions, (1.0, 1.0, 0.0, 0.0), "peer", 7)
    found: dict[str, Any] = {}
    with _learner(_config(rl__loss__importance="behaviour", rl__loss__external="positive")) as learner:
        own = learner.rollouts(1)
        found["node"], found["own"] = own[0].node, len(own)
        found["turns"] = [learner.ask(index, 1)[0].task for index in range(4)]
        row = learner.policy.rows(foreign)[3]
        assert row is not None
        found["text"] = len(row.completion), row.behaviour
        before = _log_prob(learner, foreign)
        learner.round([], [foreign])
        found["right"] = _log_prob(learner, foreign) - before
        # Of a peer whose policy says more than this one can, and more often: what fits, the most telling first.
        long = Completion(f"     {answer}", 7, finished=True)
        mixed = dataclasses.replace(foreign, completions=(completions[0], long, *completions[2:]))
        found["mixed"] = [row is None for row in learner.policy.rows(mixed)], _advantages(learner, mixed)
        many = dataclasses.replace(
            foreign, completions=completions[2:] * 7 + completions[:2], rewards=(0.0,) * 14 + (1.0,) * 2
        )
        found["larger"] = _advantages(learner, many), learner.round([], [many] * 4).num_external
        quiet = dataclasses.replace(foreign, rewards=(1.0,) * 4)
        found["quiet"] = dataclasses.asdict(learner.round([], [quiet]))["updates"], learner.version
        for name, group in {
            "many": foreign,
            "ids": dataclasses.replace(
                foreign, completions=(dataclasses.replace(completions[0], num_tokens=1, token_ids=(999,)),) * 4
            ),
            "prompt": dataclasses.replace(foreign, question=dataclasses.replace(question, prompt="x" * 40)),
        }.items():
            try:
                learner.round([], [group] * (5 if name == "many" else 1))
            except RLError as error:
                found[name] = type(error), str(error)
    return found


def _advantages(learner: Learner, group: Group) -> list[float]:
    return [round(one.advantage, 3) for one in learner._trained(group, foreign=True)]


def _strangers(rank: int, world_size: int, llama: str) -> dict[str, Any]:
    """Let a byte-level decoder that knows something and a Llama with a tokenizer of its own learn from each other."""
    box = Mailbox(keep_s=60, budget_bytes=2**20)
    shape = {"rl__tasks": '["largest:length=2"]', "rl__sharing__external": 2, "rl__sharing__store": "here"}
    foreign = {"model__kind": "hf", "model__path": llama, "data__tokenizer": llama, "rl__generation__max_new_tokens": 8}
    kinds: dict[str, dict[str, str | int]] = {"anna": {}, "bert": foreign}
    configs = {name: _config(**shape, **more, rl__sharing__node=name) for name, more in kinds.items()}
    found: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        learners = {name: stack.enter_context(_learner(config, node=name)) for name, config in configs.items()}
        for step in range(30):
            learners["anna"].supervise(step)
        met = {}
        for name, learner in learners.items():
            identity = Identity(node=name, model="", tokenizer=name[:1].encode() * 32)
            exchange = Exchange(box, Validator(name, Rules()), identity, Pace())
            met[name] = SharedPeers(configs[name], learner.policy, exchange)
        for index in range(1, 11):
            for name, learner in learners.items():
                local, external = met[name].trade(index, learner.rollouts(index, 2))
                met[name]._exchange.publish_waiting()
                met[name]._exchange.poll()
                before = [_log_prob(learner, group) for group in external]
                stats = learner.round(local, external)
                after = [_log_prob(learner, group) for group in external]
                found.setdefault(name, []).append((stats.num_external, sum(after) - sum(before)))
        found["ids"] = [
            completion.token_ids for group in external for completion in group.completions if completion.token_ids
        ]
    return found


def test_policies_with_other_models_and_tokenizers_learn_from_each_others_text(tmp_path: Path) -> None:
    ((found),) = run_ranks(_strangers, 1, str(write_llama(tmp_path / "llama", write_jsonl(tmp_path))))
    taken = [gain for number, gain in found["bert"] if number]
    assert len(taken) > 5
    assert sum(taken) > 0.5, "what the decoder got right, first of each group, has become likelier to the Llama"
    assert found["ids"] == [], "tokens of another tokenizer mean nothing here"


def _log_prob(learner: Learner, group: Group) -> float:
    """Of the first of the best completions."""
    best = group.rewards.index(max(group.rewards))
    row = learner.policy.rows(group)[best]
    assert row is not None
    (piece,) = rows.parts([row], micro_rows=1, num_parts=1)
    with torch.no_grad():
        model = learner.engine.module
        assert isinstance(model, PolicyModel)
        return float(model.log_probs(piece.batch.tokens, piece.batch.targets)[0].sum())


def test_groups_of_others_come_as_text_and_teach_what_they_reward() -> None:
    (found,) = run_ranks(_exchange, 1)
    assert (found["node"], found["own"]) == ("me", 4)
    assert found["turns"] == ["largest", "increment"] * 2, "a task comes round, however few questions a round asks"
    assert found["text"] == (3, None), "two characters and the end, without log-probabilities"
    assert found["mixed"] == ([False, True, False, False], [1, 0, 0]), "a reward is for a whole completion, none is cut"
    assert found["larger"] == ([2.646, 2.646, 0, 0], 4), "as many as ours, of advantages among all of theirs"
    assert found["right"] > 0.05, "the rewarded answer has become likelier"
    assert found["quiet"] == (0, 2), "a group without signal moves nothing"
    assert found["many"][0] is RLError
    assert "its batch holds 16" in found["many"][1]
    assert found["ids"][0] is found["prompt"][0] is PolicyError
    assert "ids outside the tokenizer's 0 to 256" in found["ids"][1]
    assert "32 positions" in found["prompt"][1]


def _disagree(rank: int, world_size: int) -> list[str]:
    """Let one rank alone meet what does not fit, at every place where ranks work on their own."""
    found = []
    with _learner(_config(parallel__replicate=2, engine__zero_stage=0), rank, world_size) as learner:
        fine = learner.rollouts(1)
        decoder: Any = learner.policy._sampler._model
        asked = dataclasses.replace(fine[0].question, prompt="x" * 40)
        unfit = dataclasses.replace(fine[0], question=asked, rewards=(1.0, 0.0, 0.0, 0.0))
        acts = [
            lambda: learner.rollouts(2),
            lambda: learner.supervise(1),
            learner.evaluate,
            lambda: learner.round(fine, [] if rank else [unfit]),
        ]
        for act in acts:
            if rank == 0:
                learner.policy.max_positions = decoder.max_positions = 8
            try:
                act()
            except TrainsysError as error:
                found.append(f"{type(error).__name__}: {error}")
    return found


def test_ranks_of_which_one_meets_a_prompt_that_does_not_fit_all_hear_of_it() -> None:
    mine, others = run_ranks(_disagree, 2)
    assert len(mine) == len(others) == 4
    for own, told in zip(mine, others, strict=True):
        assert own.startswith("PolicyError: ")
        assert told == own.replace("PolicyError: ", "TrainsysError: rank 0: ")


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "dapo"])
def test_the_loss_over_padded_micro_batches_is_the_formula_row_by_row(kind: str) -> None:
    settings = LossConfig(kind=kind, kl_weight=0.1)  # type: ignore[arg-type]
    described = ModelConfig(num_layers=1, dim=32, num_heads=2, ffn_dim=64)
    policy = models.build(described, vocab_size=40, max_positions=16, recompute="none", seed=0).double()
    model = PolicyModel(policy, vocab_size=40, temperature=0.8, loss=settings)
    examples = [Row((1, 2, 3), (4, 5)), Row((6,), (7, 8, 9, 10)), Row((11, 12), (13,)), Row((3, 3, 3), ())]
    generator = torch.Generator().manual_seed(1)

    def some() -> list[torch.Tensor]:
        return [torch.randn(len(row.completion), dtype=torch.float64, generator=generator) for row in examples]

    names = ("advantages_BT", "weights_BT", "start_BT", "importance_BT", "reference_BT")
    extras = dict(zip(names, (some() for _ in names), strict=True))
    extras["weights_BT"] = [weight.abs() + 0.1 for weight in extras["weights_BT"]]
    extras["start_BT"] = [start * 0.1 - math.log(40) for start in extras["start_BT"]]
    extras["reference_BT"] = [reference * 0.1 - math.log(40) for reference in extras["reference_BT"]]

    wanted = torch.zeros((), dtype=torch.float64)
    for index, row in enumerate(examples):
        if not row.completion:
            continue
        tokens = torch.tensor([row.prompt + row.completion])
        logits = policy(tokens)[0][0, len(row.prompt) - 1 : -1, :40] / 0.8
        own = logits.log_softmax(-1).gather(1, torch.tensor(row.completion)[:, None])[:, 0]
        advantage, weight, start, importance, reference = (extras[name][index] for name in names)
        ratio = (own - start).exp()
        gain = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage)
        kl = (reference - own).exp() - (reference - own) - 1
        wanted = wanted + (weight * (-importance * gain + 0.1 * kl)).sum()
    parameters = list(policy.parameters())
    wanted_gradients = torch.autograd.grad(wanted, parameters)

    pieces = rows.parts(examples, micro_rows=2, num_parts=3)
    assert [len(piece.indices) for piece in pieces] == [2, 2, 0]
    batches = [rows.with_extras(piece, extras) for piece in pieces]
    losses = [model(b.tokens, targets_BT=b.targets, **b.extras)[0] for b in batches]
    torch.testing.assert_close(sum(losses), wanted, rtol=1e-12, atol=0)
    gradients = torch.autograd.grad(sum(losses), parameters)  # type: ignore[arg-type]
    for one, other in zip(gradients, wanted_gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-14)
    assert sum(int(told.num_tokens) for told in model.take_ratios()) == 7


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        ({"batch.global_sequences": 12}, ["batch.global_sequences: 12 is not rl.questions x rl.group_size (4 x 4)"]),
        ({"rl.group_size": 1, "rl.loss.clip_low": 2.0}, ["rl.group_size: 1 is out", "rl.loss.clip_low: 2.0 is out"]),
        ({"rl.tasks": '["ad"]'}, ["rl.tasks: ad: no such task; allowed: add"]),
        ({"rl.tasks": "[]"}, ["rl.tasks: missing"]),
        ({"rl.tasks": '["add:digits=99"]'}, ["rl.tasks: add: parameters: digits = 99; allowed: digits = 1 to 12"]),
        ({"rl.tasks": '["increment:digits=1"]'}, ['rl.tasks: increment: {"digits":1}: no held-out question in 1000']),
        ({"rl.warm_start.tasks": '["add"]'}, ["rl.warm_start.tasks: shown in no step"]),
        ({"rl.warm_start.steps": 9}, ["rl.warm_start.steps: 9 is over the run's 4 steps"]),
        ({"rl.loss.kl_weight": 0.1}, ["rl.loss.kl_weight: no policy to stay near"]),
        ({"engine.zero_stage": 3}, ["engine.zero_stage: 3 shards the weights that a policy samples with"]),
        ({"engine.backend": "torch"}, ["engine.zero_stage: 1: backend = torch shards weights too; allowed: 0"]),
        ({"data.sequence_length": 6}, ["data.sequence_length: 6 has no room for a prompt"]),
        ({"rl.resamples": 1, "rl.drop_uniform": "false"}, ["rl.resamples: 1 with groups without signal kept"]),
        ({"rl.loss.overlong": "penalise", "rl.loss.overlong_tokens": 7}, ["rl.loss.overlong_tokens: 7 is over"]),
        ({"engine.compile": "true"}, ["engine.compile: true: blocks that sample"]),
        ({"profile.start_step": 1}, ["profile.start_step: 1: not with rl.tasks"]),
        ({"rl.generation.temperature": 0.0}, ["rl.generation.temperature: 0.0 is out of range; allowed: above 0"]),
    ],
)
def test_settings_that_cannot_take_effect_are_refused(changes: dict[str, Any], messages: list[str]) -> None:
    from trainsys.check import check

    config = recipe.load([], [f"--{key}={value}" for key, value in {**_BASE, **changes}.items()]).config
    with pytest.raises(ConfigError) as caught:
        check(config)
    for message in messages:
        assert f"config: {message}" in str(caught.value)


def _improve(rank: int, world_size: int) -> list[float]:
    config = _config(
        rl__tasks='["largest:length=2"]', rl__questions=16, rl__group_size=8, batch__global_sequences=128,
        batch__micro_sequences=128, rl__evaluation_questions=40,
    )  # fmt: skip
    with _learner(config) as learner:
        for step in range(12):
            learner.supervise(step)
        before = learner.evaluate().sampled
        for index in range(50):
            learner.round(learner.rollouts(index), lr_factor=0.2)
        return [before["largest,length=2"], learner.evaluate().sampled["largest,length=2"]]


def test_rounds_raise_the_reward_of_questions_that_are_never_asked() -> None:
    ((before, after),) = run_ranks(_improve, 1)
    assert after > before + 0.2
