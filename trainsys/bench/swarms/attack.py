"""Who lies, and who believes: what validation is measured against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from trainsys.rl import questions, schema, tasks
from trainsys.rl.bounds import Bounds
from trainsys.rl.rollout import Completion, Group, Question
from trainsys.rl.schema import Row
from trainsys.rl.sharing import Exchange
from trainsys.rl.validation import Accepted, Rejection, Validator

_WRONG = Completion("0", 2, True)


class Liar(Exchange):
    """Shares, as well formed as anybody's, one wrong answer to every question and claims that it alone is right."""

    def share(self, groups: Sequence[Group]) -> None:
        super().share([_poisoned(group) for group in groups])


def _poisoned(group: Group) -> Group:
    half = len(group.completions) // 2
    completions = (_WRONG,) * half + group.completions[half:]
    return replace(group, completions=completions, rewards=(1.0,) * half + (0.0,) * (len(completions) - half))


class Crowder(Exchange):
    """Shares nothing but the truth, and too much of it: every round as many groups as others keep of a peer.

    All are of the one task of the bench that policies of this size do not learn in a run, whoever shows it.
    """

    _GROUPS = 16

    def share(self, groups: Sequence[Group]) -> None:
        first = groups[0]
        key = (first.question.seed, *first.node.encode())
        asked = questions.draw([questions.TaskSpec("add")], self._GROUPS, key)
        super().share([_easy(first, question) for question in asked])


def _easy(pattern: Group, question: Question) -> Group:
    """Return a group as large as another, half of it right."""
    half = len(pattern.completions) // 2
    right = tasks.answer_of(question)
    texts = [right] * half + ["0"] * (len(pattern.completions) - half)
    completions = tuple(Completion(text, len(text) + 1, True) for text in texts)
    rewards = tuple(tasks.score(question, text) for text in texts)
    return Group(question, completions, rewards, pattern.node, pattern.policy_version)


class Believer(Validator):
    """Takes rewards as they are claimed: the reference implementation scores by the peer's own answer."""

    def check(self, name: str, message: bytes) -> tuple[list[Accepted], list[Rejection]]:
        return [self._believed(row) for row in schema.decode(message, Bounds())], []

    def _believed(self, row: Row) -> Accepted:
        group = Group(row.question, row.completions, row.claimed_rewards, row.node, row.policy_version)
        return Accepted(group, row.digest, row.content_digest, row.created_ms)
