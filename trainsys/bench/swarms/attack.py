"""Who lies, and who believes: what validation is measured against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from trainsys.rl import schema
from trainsys.rl.rollout import Completion, Group
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


class Believer(Validator):
    """Takes rewards as they are claimed: the reference implementation scores by the peer's own answer."""

    def check(self, name: str, message: bytes) -> tuple[list[Accepted], list[Rejection]]:
        return [self._believed(row) for row in schema.decode(message, schema.Bounds())], []

    def _believed(self, row: Row) -> Accepted:
        group = Group(row.question, row.completions, row.claimed_rewards, row.node, row.policy_version)
        return Accepted(group, row.digest, row.content_digest, row.created_ms)
