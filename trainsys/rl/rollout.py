"""What travels between a task, a policy, a learner and other nodes: questions, and groups of attempts at them.

Values only: no tensors, no files, nothing of a model. A question is decided by (task, version, seed, parameters), so
whoever has the task makes the same one again, prompt and answer; the answer is therefore never part of a value here.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Question:
    """One problem, as asked; `trainsys.rl.tasks.regenerate` makes it from the first four fields."""

    task: str
    """Name of the task in `trainsys.rl.tasks`."""
    version: str
    """Of the task's generator and scorer; others may make other questions of the same seed."""
    seed: int
    """0 to 2^63 - 1."""
    parameters: str
    """The task's settings as JSON: an object with sorted keys, no spaces (`tasks.canonical`)."""
    prompt: str
    """What the policy is given, without chat template."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One attempt: text always; tokens and their log-probabilities where its sampler's tokenizer is ours."""

    text: str
    num_tokens: int
    """Tokens that its sampler drew, the end token included."""
    finished: bool
    """Whether it ended by itself; False was cut at the limit of new tokens."""
    token_ids: tuple[int, ...] = ()
    """The tokens drawn, in the sampler's tokenizer, the end token included; empty where only text is known."""
    log_probs: tuple[float, ...] = ()
    """Natural log-probability of each token under the policy and temperature that drew it; empty, or as many."""

    def __post_init__(self) -> None:
        assert len(self.token_ids) in (0, self.num_tokens)
        assert len(self.log_probs) in (0, len(self.token_ids))


@dataclass(frozen=True, slots=True)
class Group:
    """A question and its attempts, all by one policy: the unit in which advantages are taken and rollouts shared."""

    question: Question
    completions: tuple[Completion, ...]
    rewards: tuple[float, ...]
    """Of each completion, scored on this node."""
    node: str
    """Who sampled it."""
    policy_version: int
    """Updates that the sampler's policy had seen."""

    def __post_init__(self) -> None:
        assert len(self.rewards) == len(self.completions) > 0

    @property
    def has_signal(self) -> bool:
        """Whether the rewards differ: where all are equal every advantage is zero."""
        return min(self.rewards) != max(self.rewards)

    @property
    def mean_reward(self) -> float:
        """The mean of the rewards."""
        return statistics.fmean(self.rewards)
