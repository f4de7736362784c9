"""Groups, rows and messages for the tests of sharing."""

from __future__ import annotations

from trainsys.rl import schema, tasks
from trainsys.rl.rollout import Completion, Group
from trainsys.rl.schema import Row


def group(seed: int, *, node: str = "anna", task: str = "reverse", right: int = 2, size: int = 4) -> Group:
    """Return a true group of `size` completions, of which `right` are the answer."""
    question = tasks.ask(task, seed)
    texts = [tasks.answer_of(question)] * right + [f"no{index}" for index in range(size - right)]
    return Group(
        question=question,
        completions=tuple(Completion(text, len(text) + 1, True) for text in texts),
        rewards=tuple(tasks.score(question, text) for text in texts),
        node=node,
        policy_version=3,
    )


def row(seed: int, *, node: str = "anna", sequence: int = 1, right: int = 2) -> Row:
    """Return a true row."""
    return schema.row_of(group(seed, node=node, right=right), sequence=sequence, model="tiny", created_ms=1000)


def message(*rows: Row) -> tuple[str, bytes]:
    """Return rows as (name, bytes), as their node would publish them."""
    encoded = schema.encode(rows)
    return schema.name_of(encoded, node=rows[0].node, sequence=rows[-1].sequence), encoded
