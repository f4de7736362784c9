"""Procedural tasks whose answers can be checked: a question and its answer are made from a seed, anywhere, alike.

The built-in ones are small enough for a byte-level decoder of a million parameters. `reasoning_gym.NAME` is the task
NAME of the reasoning-gym package (extra `rl`).
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from trainsys.rl.errors import TaskError
from trainsys.rl.rollout import Question

_MAX_PARAMETERS = 4096
_MAX_SEED = 2**63


class Task(Protocol):
    """Makes and scores questions; stateless, deterministic on every machine, and safe with any parameters."""

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> str:
        """Changes whenever a question, an answer or a score does."""

    def ask(self, seed: int, parameters: Mapping[str, Any]) -> tuple[str, str]:
        """Return (prompt, answer).

        Raises:
            TaskError: the parameters are not this task's, or out of bounds; found in bounded time.
        """

    def score(self, seed: int, parameters: Mapping[str, Any], completion: str) -> float:
        """Return the reward of a completion, 0 to 1; of any text, in bounded time."""


def find(name: str) -> Task:
    """Return the task of that name.

    Raises:
        TaskError: there is none; naming those there are.
        MissingExtraError: it is of reasoning-gym, which is not installed.
    """
    if name.startswith("reasoning_gym."):
        from trainsys.rl.reasoning import ReasoningTask

        return ReasoningTask(name)
    if name not in BUILT_IN:
        raise TaskError(f"{name[:80]}: no such task; allowed: {', '.join(sorted(BUILT_IN))}, reasoning_gym.NAME")
    return BUILT_IN[name]


def ask(name: str, seed: int, parameters: Mapping[str, Any] | None = None) -> Question:
    """Return a question of a task; its defaults take the place of parameters that are not given."""
    task = find(name)
    given = parameters or {}
    prompt, _ = task.ask(seed, given)
    return Question(name, task.version, seed, canonical(given), prompt)


def answer_of(question: Question) -> str:
    """Return the right answer, made anew. Raises as `regenerate`."""
    return _made(question)[1]


def regenerate(question: Question) -> Question:
    """Return the question that its task, version, seed and parameters stand for, whatever its prompt says.

    Raises:
        TaskError: no such task or version here, or parameters that are no canonical JSON or not the task's.
    """
    return Question(question.task, question.version, question.seed, question.parameters, _made(question)[0])


def score(question: Question, completion: str) -> float:
    """Return the reward of a completion, 0 to 1, by this node's own scorer. Raises as `regenerate`."""
    task = _of_version(question)
    return task.score(question.seed, parse(question.parameters), completion)


def canonical(parameters: Mapping[str, Any]) -> str:
    """Return parameters as `Question.parameters` holds them."""
    return json.dumps(dict(parameters), sort_keys=True, separators=(",", ":"), allow_nan=False)


def value_of(text: str) -> Any:
    """Return a parameter's value as JSON, or the text itself where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def parse(parameters: str) -> dict[str, Any]:
    """Return the parameters that `canonical` wrote.

    Raises:
        TaskError: it did not write that.
    """
    if len(parameters) > _MAX_PARAMETERS:
        raise TaskError(f"parameters: {len(parameters)} characters; allowed: up to {_MAX_PARAMETERS}")
    try:
        found = json.loads(parameters)
        if isinstance(found, dict) and canonical(found) == parameters:
            return found
    except (ValueError, RecursionError) as error:
        raise TaskError(f"parameters: {parameters[:80]!r} is not JSON") from error
    raise TaskError(f"parameters: {parameters[:80]!r} is no JSON object in canonical form")


def _of_version(question: Question) -> Task:
    task = find(question.task)
    if task.version != question.version:
        raise TaskError(f"{question.task}: version {question.version[:40]!r} asked for, here is {task.version!r}")
    if not 0 <= question.seed < _MAX_SEED:
        raise TaskError(f"{question.task}: seed {question.seed} is out of range; allowed: 0 to 2^63 - 1")
    return task


def _made(question: Question) -> tuple[str, str]:
    return _of_version(question).ask(question.seed, parse(question.parameters))


@dataclass(frozen=True, slots=True)
class _Size:
    """An integer parameter of a built-in task."""

    default: int
    largest: int


@dataclass(frozen=True, slots=True)
class BuiltIn:
    """A task on digits with one integer parameter: its answer is a short text, right or wrong."""

    name: str
    parameter: str
    size: _Size
    make: Callable[[random.Random, int], tuple[str, str]]
    """(generator, size) -> (what is asked, answer)."""
    version: str = "1"

    def ask(self, seed: int, parameters: Mapping[str, Any]) -> tuple[str, str]:
        """Return (prompt, answer): `name operands=` and what should follow."""
        # Text seeds are hashed by SHA-512: nearby seeds give unrelated questions, on every version of Python.
        generator = random.Random(f"{self.name}/{self.version}/{seed}")
        asked, answer = self.make(generator, self._size(parameters))
        return f"{self.name} {asked}=", answer

    def score(self, seed: int, parameters: Mapping[str, Any], completion: str) -> float:
        """Return 1 for the answer, but for white space around it, and 0 for anything else."""
        return float(completion[:256].strip() == self.ask(seed, parameters)[1] and len(completion) <= 256)

    def _size(self, parameters: Mapping[str, Any]) -> int:
        size = parameters.get(self.parameter, self.size.default)
        allowed = f"{self.parameter} = 1 to {self.size.largest}"
        if unknown := sorted(set(parameters) - {self.parameter}):
            raise TaskError(f"{self.name}: parameters: {', '.join(unknown)[:80]}: unknown; allowed: {allowed}")
        if type(size) is not int or not 1 <= size <= self.size.largest:
            raise TaskError(f"{self.name}: parameters: {self.parameter} = {str(size)[:20]}; allowed: {allowed}")
        return size


def _digits(generator: random.Random, length: int) -> str:
    return "".join(generator.choices("0123456789", k=length))


def _number(generator: random.Random, digits: int) -> int:
    return generator.randrange(10**digits)


def _add(generator: random.Random, digits: int) -> tuple[str, str]:
    first, second = _number(generator, digits), _number(generator, digits)
    return f"{first}+{second}", str(first + second)


def _subtract(generator: random.Random, digits: int) -> tuple[str, str]:
    first, second = _number(generator, digits), _number(generator, digits)
    return f"{first}-{second}", str(first - second)


def _increment(generator: random.Random, digits: int) -> tuple[str, str]:
    number = _number(generator, digits)
    return str(number), str(number + 1)


def _reverse(generator: random.Random, length: int) -> tuple[str, str]:
    digits = _digits(generator, length)
    return digits, digits[::-1]


def _sort(generator: random.Random, length: int) -> tuple[str, str]:
    digits = _digits(generator, length)
    return digits, "".join(sorted(digits))


def _largest(generator: random.Random, length: int) -> tuple[str, str]:
    digits = _digits(generator, length)
    return digits, max(digits)


def _count(generator: random.Random, length: int) -> tuple[str, str]:
    digits = _digits(generator, length)
    wanted = generator.choice(digits)
    return f"{wanted} in {digits}", str(digits.count(wanted))


BUILT_IN: Mapping[str, Task] = {
    task.name: task
    for task in (
        BuiltIn("add", "digits", _Size(2, 12), _add),
        BuiltIn("subtract", "digits", _Size(2, 12), _subtract),
        BuiltIn("increment", "digits", _Size(3, 12), _increment),
        BuiltIn("reverse", "length", _Size(4, 32), _reverse),
        BuiltIn("sort", "length", _Size(4, 32), _sort),
        BuiltIn("largest", "length", _Size(5, 32), _largest),
        BuiltIn("count", "length", _Size(5, 32), _count),
    )
}
"""The tasks that need nothing installed, by name."""
