"""Which questions a run asks: drawn from seeds, with a part of every task held out for evaluation.

Whether a question is held out is decided by its prompt alone, so all nodes hold out the same ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import xxhash

from trainsys.rl import tasks
from trainsys.rl.errors import TaskError
from trainsys.rl.rollout import Question

_HELD_OUT = 8
"""One prompt in so many is held out."""
_TRIES = 1000
_NUM_SEEDS = 2**63


@dataclass(frozen=True, slots=True)
class TaskSpec:
    """A task with its parameters, as a recipe says it."""

    name: str
    parameters: str = "{}"
    """As in Question.parameters."""


def parse_spec(text: str) -> TaskSpec:
    """Return the task of `NAME` or `NAME:key=value,…`, the values being JSON or plain text.

    Raises:
        TaskError: no such task, or it does not take the parameters.
        MissingExtraError: it needs a package that is not installed.
    """
    name, _, settings = text.partition(":")
    parameters: dict[str, Any] = {}
    for setting in filter(None, settings.split(",")):
        key, equals, value = setting.partition("=")
        if not (key and equals):
            raise TaskError(f"{text[:80]}: '{setting[:40]}' is no setting; allowed: NAME:key=value,key=value")
        parameters[key.strip()] = tasks.value_of(value.strip())
    tasks.ask(name, 0, parameters)
    return TaskSpec(name, tasks.canonical(parameters))


def is_held_out(question: Question) -> bool:
    """Return whether a question is for evaluation, not for training; one in eight is."""
    return xxhash.xxh3_64_intdigest(f"{question.task}\n{question.prompt}".encode("utf-8", "replace")) % _HELD_OUT == 0


def draw(
    specs: Sequence[TaskSpec], count: int, key: Sequence[int], *, first: int = 0, held_out: bool = False
) -> list[Question]:
    """Return `count` questions, of the tasks in turn from number `first` on, decided by the integers of `key`.

    Raises:
        TaskError: a task has too few different questions to hold some out.
    """
    return [_draw(specs[(first + index) % len(specs)], (*key, index), held_out) for index in range(count)]


def seed_of(*key: int) -> int:
    """Return a seed, 0 to 2^63 - 1, that is as good as independent of those of other keys."""
    return xxhash.xxh3_64_intdigest(",".join(map(str, key)).encode()) % _NUM_SEEDS


def _draw(spec: TaskSpec, key: Sequence[int], held_out: bool) -> Question:
    parameters = tasks.parse(spec.parameters)
    for attempt in range(_TRIES):
        question = tasks.ask(spec.name, seed_of(*key, attempt), parameters)
        if is_held_out(question) == held_out:
            return question
    kind = "held-out" if held_out else "training"
    raise TaskError(f"{spec.name}: {spec.parameters}: no {kind} question in {_TRIES}; it has too few different ones")
