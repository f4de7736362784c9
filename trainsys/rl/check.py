"""What must hold between the settings of a run by reinforcement learning."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from trainsys.errors import MissingExtraError
from trainsys.rl.bounds import Bounds, is_node_name
from trainsys.rl.errors import TaskError
from trainsys.rl.questions import draw, parse_spec

if TYPE_CHECKING:
    from trainsys.config import RunConfig

Problem = tuple[str, str]
"""(dotted key, what is wrong; what is allowed)."""

_LEAST = {
    "questions": 1,
    "group_size": 2,
    "updates": 1,
    "resamples": 0,
    "evaluation_questions": 0,
    "warm_start.steps": 0,
    "generation.max_new_tokens": 1,
    "generation.slots": 1,
    "loss.overlong_tokens": 1,
    "sharing.external": 0,
    "sharing.per_peer": 1,
    "sharing.max_age_rounds": 0,
    "sharing.strikes": 1,
    "swarm.nodes": 0,
    "swarm.skills_per_node": 0,
    "swarm.restarts": 0,
}
_ABOVE_ZERO = (
    *("warm_start.lr", "generation.temperature", "loss.importance_limit", "loss.external_limit"),
    *("sharing.keep_s", "sharing.poll_interval_s", "sharing.deadline_s"),
)


def problems(config: RunConfig) -> Iterator[Problem]:
    """Yield what is wrong with the `rl` section and with the others beside it; nothing where no tasks are set."""
    if not config.rl.tasks:
        if config.rl != type(config.rl)():
            yield "rl.tasks", "missing; give the tasks, or leave the whole section out"
        return
    yield from _ranges(config)
    yield from _tasks(config)
    yield from _batch(config)
    yield from _loss(config)
    yield from _others(config)
    yield from _sharing(config)


def _ranges(config: RunConfig) -> Iterator[Problem]:
    for key, least in _LEAST.items():
        if (value := _value(config, key)) < least:
            yield f"rl.{key}", f"{value} is out of range; allowed: {least} or more"
    for key in _ABOVE_ZERO:
        if not 0 < (number := _value(config, key)) < math.inf:
            yield f"rl.{key}", f"{number} is out of range; allowed: above 0, finite"
    loss = config.rl.loss
    if not 0 <= loss.clip_low <= 1:
        yield "rl.loss.clip_low", f"{loss.clip_low} is out of range; allowed: 0 to 1"
    for key in ("loss.clip_high", "loss.kl_weight"):
        if not 0 <= (number := _value(config, key)) < math.inf:
            yield f"rl.{key}", f"{number} is out of range; allowed: 0 or more, finite"


def _value(config: RunConfig, key: str) -> float:
    node: object = config.rl
    for part in key.split("."):
        node = getattr(node, part)
    assert isinstance(node, (int, float))
    return node


def _tasks(config: RunConfig) -> Iterator[Problem]:
    for key, texts in (("rl.tasks", config.rl.tasks), ("rl.warm_start.tasks", config.rl.warm_start.tasks)):
        for text in texts:
            try:
                spec = parse_spec(text)
                draw([spec], 1, (0,))
                if config.rl.evaluation_questions and key == "rl.tasks":
                    draw([spec], 1, (0,), held_out=True)
            except (TaskError, MissingExtraError) as error:
                yield key, str(error)
    warm = config.rl.warm_start
    if warm.tasks and not warm.steps:
        yield "rl.warm_start.tasks", "shown in no step; set rl.warm_start.steps as well"
    if warm.steps > config.steps:
        yield "rl.warm_start.steps", f"{warm.steps} is over the run's {config.steps} steps"
    if warm.steps and not config.optim.lr:
        yield "optim.lr", "0 with rl.warm_start.steps; allowed: above 0"
    rounds = config.steps - warm.steps
    needed = config.schedule.warmup_steps + (config.schedule.kind == "cosine")
    if 0 < rounds < needed:
        yield "schedule.warmup_steps", f"{config.schedule.warmup_steps} does not fit {rounds} rounds"


def _batch(config: RunConfig) -> Iterator[Problem]:
    rl, ranks = config.rl, config.parallel.replicate * config.parallel.shard
    rows = rl.questions * rl.group_size
    if config.batch.global_sequences != rows:
        yield (
            "batch.global_sequences",
            f"{config.batch.global_sequences} is not rl.questions x rl.group_size ({rl.questions} x {rl.group_size}); "
            f"allowed: {rows}",
        )
    if ranks > 0 and rl.questions % ranks:
        yield "rl.questions", f"{rl.questions} is not a multiple of the {ranks} data ranks"
    if config.data.sequence_length <= rl.generation.max_new_tokens:
        yield (
            "data.sequence_length",
            f"{config.data.sequence_length} has no room for a prompt beside rl.generation.max_new_tokens "
            f"({rl.generation.max_new_tokens})",
        )


def _loss(config: RunConfig) -> Iterator[Problem]:
    rl, loss = config.rl, config.rl.loss
    if loss.kl_weight and not (rl.start_from or config.model.kind == "hf"):
        yield "rl.loss.kl_weight", "no policy to stay near; set rl.start_from, or 0"
    if loss.kl_weight and rl.warm_start.steps:
        yield (
            "rl.loss.kl_weight",
            "its reference is the policy before rl.warm_start; allowed: 0, or no warm start",
        )
    if loss.overlong == "penalise" and loss.overlong_tokens > rl.generation.max_new_tokens:
        yield (
            "rl.loss.overlong_tokens",
            f"{loss.overlong_tokens} is over rl.generation.max_new_tokens ({rl.generation.max_new_tokens})",
        )
    if rl.resamples and not rl.drop_uniform:
        yield "rl.resamples", f"{rl.resamples} with groups without signal kept; set rl.drop_uniform = true, or 0"


def _others(config: RunConfig) -> Iterator[Problem]:
    degrees = config.parallel
    for axis in ("pipeline", "context", "tensor", "expert"):
        if getattr(degrees, axis) > 1:
            yield f"parallel.{axis}", f"{getattr(degrees, axis)}: a policy samples whole on each rank; allowed: 1"
    if config.engine.zero_stage == 3:
        yield "engine.zero_stage", "3 shards the weights that a policy samples with; allowed: 0, 1, 2"
    elif config.engine.backend == "torch" and config.engine.zero_stage:
        yield "engine.zero_stage", f"{config.engine.zero_stage}: backend = torch shards weights too; allowed: 0"
    if config.model.moe.num_experts and config.rl.generation.cuda_graphs and config.engine.device != "cpu":
        yield "rl.generation.cuda_graphs", "true: routing to experts is no fixed graph; allowed: false"
    if config.engine.compile:
        yield "engine.compile", "true: blocks that sample through a cache are not compiled; allowed: false"
    if config.checkpoint.memory.every:
        yield "checkpoint.memory.every", f"{config.checkpoint.memory.every}: not with rl.tasks; allowed: 0"
    if config.profile.start_step:
        yield "profile.start_step", f"{config.profile.start_step}: not with rl.tasks; allowed: 0"
    if config.faulttol.mode != "off":
        yield "faulttol.mode", f"{config.faulttol.mode}: not with rl.tasks; allowed: off"


def _sharing(config: RunConfig) -> Iterator[Problem]:
    """Yield what is wrong between nodes; whether a node that shares has a store is for who starts it to say."""
    rl, sharing, swarm = config.rl, config.rl.sharing, config.rl.swarm
    if not sharing.external and (sharing.store or swarm.nodes):
        yield "rl.sharing.external", f"0 with others to learn from; allowed: 1 to {rl.questions - 1}"
    if sharing.external and not (sharing.store or swarm.nodes):
        yield "rl.sharing.store", "missing; give the URL of the swarm to join, or set rl.swarm.nodes to start one"
    if sharing.external >= rl.questions:
        yield (
            "rl.sharing.external",
            f"{sharing.external} leaves none of rl.questions ({rl.questions}) to this node; "
            f"allowed: up to {rl.questions - 1}",
        )
    if sharing.external and config.parallel.replicate * config.parallel.shard > 1:
        yield "rl.sharing.external", f"{sharing.external}: a node that shares is one rank; allowed: 0"
    bounds = Bounds()
    if sharing.external and rl.group_size > bounds.completions:
        yield "rl.group_size", f"{rl.group_size} completions of a question are shared; allowed: {bounds.completions}"
    if sharing.external and rl.generation.max_new_tokens > bounds.completion_bytes:
        yield (
            "rl.generation.max_new_tokens",
            f"{rl.generation.max_new_tokens}: completions are shared; allowed: up to {bounds.completion_bytes}",
        )
    if sharing.node and not is_node_name(sharing.node):
        yield "rl.sharing.node", f"{sharing.node!r} is no name; allowed: 1 to 64 small letters, digits, hyphens"
    if swarm.nodes and config.launch.kind != "ray":
        yield "launch.kind", f"{config.launch.kind}: the nodes of a swarm are Ray actors; allowed: ray"
    if swarm.skills_per_node > len(rl.tasks):
        yield "rl.swarm.skills_per_node", f"{swarm.skills_per_node} is over the {len(rl.tasks)} tasks of rl.tasks"
    if swarm.skills_per_node and rl.warm_start.tasks:
        yield "rl.swarm.skills_per_node", "not with rl.warm_start.tasks, which say the same; leave one of them out"
