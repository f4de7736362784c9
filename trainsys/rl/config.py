"""Settings of reinforcement learning: the `rl` section of a recipe. Without tasks a run is not one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

_STRICT: Mapping[str, Any] = {"extra": "forbid", "strict": True}


@dataclass(frozen=True, kw_only=True, slots=True)
class WarmStartConfig:
    """Supervised steps on the right answers before the first round: a policy that never succeeds learns nothing."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = _STRICT

    steps: int = 0
    """Of the run's steps, those at the start that are supervised; 0 starts with rounds."""
    lr: float = 1e-3
    """Peak learning rate of these steps, which rises over `schedule.warmup_steps` and falls to a tenth."""
    tasks: list[str] = field(default_factory=list)
    """What is shown, as in `rl.tasks`; empty takes those."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationConfig:
    """How completions are drawn."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = _STRICT

    max_new_tokens: int = 16
    """Tokens of a completion, the end included; prompt and completion must fit `data.sequence_length`."""
    temperature: float = 1.0
    """Softmax temperature of sampling, and of the log-probabilities that are trained on; above 0."""
    slots: int = 256
    """Completions drawn at the same time, which decides the size of the cache; others wait for a free slot."""
    cuda_graphs: bool = True
    """On CUDA replay each step from a graph instead of launching its kernels one by one; nothing on a CPU."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """What a round minimises."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = _STRICT

    kind: Literal["grpo", "dr_grpo", "dapo"] = "grpo"
    """`grpo`: advantages over the group's standard deviation, mean over each completion's tokens, then over
    completions (arXiv 2402.03300); `dr_grpo`: neither division (arXiv 2503.20783); `dapo`: mean over all tokens
    (arXiv 2503.14476)."""
    clip_low: float = 0.2
    """A token's probability counts down to 1 - clip_low times that of the round's start."""
    clip_high: float = 0.28
    """And up to 1 + clip_high times."""
    kl_weight: float = 0.0
    """Weight of the KL divergence from the policy of `rl.start_from`; 0 needs no reference."""
    importance: Literal["none", "proximal", "behaviour"] = "proximal"
    """What is assumed of data by other policies. `none`: nothing, every ratio is 1 at each update; `proximal`: the
    ratio is to the policy at the round's start; `behaviour`: that, and tokens are weighed by how likely this policy
    was to draw them, where the sampler says its own log-probabilities."""
    importance_limit: float = 2.0
    """importance=behaviour: largest weight of a token (truncated importance sampling); above 0."""
    external: Literal["signed", "positive", "clipped"] = "positive"
    """Advantages of groups that others sampled: as they are; without the negative ones, which would push down tokens
    that this policy never draws; or limited to `external_limit`."""
    external_limit: float = 1.0
    """external=clipped: largest size of an advantage; above 0."""
    overlong: Literal["keep", "mask", "penalise"] = "keep"
    """Completions that did not end: train on them, leave them out, or lower the reward linearly over the last
    `overlong_tokens` (DAPO's soft punishment)."""
    overlong_tokens: int = 4
    """overlong=penalise: tokens before the limit at which the reward begins to fall."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SharingConfig:
    """Rollouts shared with other nodes, each with a policy of its own; nobody waits for anybody."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = _STRICT

    store: str = ""
    """Where nodes meet: a folder or any fsspec URL, or `ray-actor://HOST:PORT/NAME`; empty: this node is alone, or
    `rl.swarm` says where. `ray` with `rl.swarm.nodes` keeps messages in an actor instead of the run's folder."""
    node: str = ""
    """This node's name among the others, different from theirs: small letters, digits, hyphens."""
    external: int = 0
    """Of the `rl.questions` groups that a round trains on, those of other nodes (J); the node samples the rest (I)."""
    fill: bool = True
    """Where fewer have come the node samples more itself; without it a round is smaller."""
    per_peer: int = 2
    """Groups of one peer in one round; 1 or more."""
    max_age_rounds: int = 8
    """Rounds of this node that a group may have waited; 0 or more."""
    filter_uniform: bool = True
    """Take from others only groups whose rewards differ; without it many that teach nothing fill the round."""
    tokens: bool = False
    """Also share token ids and log-probabilities, which peers with the same tokenizer need for
    rl.loss.importance = behaviour; others read the text."""
    keep_s: float = 600.0
    """Seconds for which a shared group is offered; above 0."""
    poll_interval_s: float = 1.0
    """Seconds between two looks at the store, in the background; above 0."""
    deadline_s: float = 30.0
    """Seconds after which a call of the store is given up; above 0."""
    strikes: int = 3
    """Lies (a wrong reward, a question that is not the task's) until a peer is banned; 1 or more."""
    sign: bool = False
    """Sign what is shared and hear only who signs (Ed25519, extra `rl`); the node is called by its public key. The
    private key is made in `RUN/node.key`."""
    peers: list[str] = field(default_factory=list)
    """Hear only these nodes; empty hears all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SwarmConfig:
    """Several nodes started by one `trainsys launch`, each a Ray actor with a policy of its own."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = _STRICT

    nodes: int = 0
    """Nodes to start; 0 trains one policy."""
    skills_per_node: int = 0
    """Tasks that the warm start of a node shows, of `rl.tasks` in turn from its own number on; 0 shows all."""
    variants: list[str] = field(default_factory=list)
    """Settings that differ: node number n also gets variant n modulo their number, `key=value key=value …`, so that
    policies may have other sizes and tokenizers."""
    restarts: int = 1
    """How often a node that dies is started again, from its newest checkpoint; the others go on meanwhile."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RLConfig:
    """Reinforcement learning on verifiable tasks; a step of the run is a round: sample, score, update."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = _STRICT

    tasks: list[str] = field(default_factory=list)
    """`NAME` or `NAME:key=value,…` each (`trainsys.rl.tasks`); empty: the run learns from text instead."""
    questions: int = 8
    """Groups that a round trains on, all ranks together; a multiple of the data ranks."""
    group_size: int = 8
    """Completions of each question; 2 or more."""
    updates: int = 1
    """Optimizer steps per round, each over all of its groups."""
    drop_uniform: bool = True
    """Leave out groups whose rewards are all equal, so that they do not count in any mean."""
    resamples: int = 0
    """How often a round may ask as many questions again, until as many groups have differing rewards (DAPO's dynamic
    sampling)."""
    start_from: str = ""
    """Model folder to begin with, as a run writes it (`RUN/model`); empty begins with initial weights."""
    evaluation_questions: int = 40
    """Held-out questions of each task, answered greedily every `evaluation.every` steps and at the end."""
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    sharing: SharingConfig = field(default_factory=SharingConfig)
    swarm: SwarmConfig = field(default_factory=SwarmConfig)
