"""What ranks of a pipeline do, piece by piece, and what must be there first. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Literal, NamedTuple

Work = Literal["forward", "backward", "backward_input", "backward_weight"]
"""`backward` is both of the other two at once."""


class Action(NamedTuple):
    """One piece of work of a rank."""

    work: Work
    stage: int
    micro_batch: int


def dependencies(action: Action, num_stages: int) -> Iterator[tuple[Action, ...]]:
    """Yield, for every thing that must be there before `action`, the actions of which any one provides it."""
    work, stage, micro_batch = action
    if work == "forward":
        if stage:
            yield (Action("forward", stage - 1, micro_batch),)
    elif work == "backward_weight":
        yield (Action("backward_input", stage, micro_batch),)
    else:
        yield (Action("forward", stage, micro_batch),)
        if stage + 1 < num_stages:
            yield (Action("backward", stage + 1, micro_batch), Action("backward_input", stage + 1, micro_batch))


def is_ready(action: Action, num_stages: int, done: Collection[Action]) -> bool:
    """Return whether everything that the action needs is done."""
    return all(any(one in done for one in ones) for ones in dependencies(action, num_stages))
