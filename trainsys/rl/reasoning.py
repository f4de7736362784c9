"""Tasks of the reasoning-gym package (extra `rl`) as tasks of this one."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from typing import Any

from trainsys.errors import MissingExtraError
from trainsys.rl.errors import TaskError

PREFIX = "reasoning_gym."
_OWN = ("seed", "size")
_MAX_COMPLETION = 8192


class ReasoningTask:
    """A task of reasoning-gym: `parameters` are its dataset's settings, `seed` the seed of a dataset of one entry."""

    def __init__(self, name: str) -> None:
        """Find `reasoning_gym.NAME`.

        Raises:
            MissingExtraError: reasoning-gym is not installed.
            TaskError: it has no such task.
        """
        try:
            import reasoning_gym
            from reasoning_gym.factory import DATASETS
        except ImportError as error:
            raise MissingExtraError("a task of reasoning_gym", "rl") from error
        self.name = name
        self.version = f"reasoning-gym {metadata.version('reasoning-gym')}"
        self._gym: Any = reasoning_gym
        self._dataset = name.removeprefix(PREFIX)
        if self._dataset not in DATASETS:
            raise TaskError(f"{name[:80]}: no such task in {self.version}")

    def ask(self, seed: int, parameters: Mapping[str, Any]) -> tuple[str, str]:
        """Return (prompt, answer); an answer that the package does not tell is empty.

        Raises:
            TaskError: the package does not take the parameters.
        """
        entry = self._entry(seed, parameters)[1]
        return str(entry["question"]), str(entry["answer"] or "")

    def score(self, seed: int, parameters: Mapping[str, Any], completion: str) -> float:
        """Return the package's own score of what the completion says, 0 to 1."""
        dataset, entry = self._entry(seed, parameters)
        if len(completion) > _MAX_COMPLETION:
            return 0.0
        return min(1.0, max(0.0, float(dataset.score_answer(answer=completion.strip(), entry=entry))))

    def _entry(self, seed: int, parameters: Mapping[str, Any]) -> tuple[Any, Any]:
        if taken := sorted(set(parameters) & set(_OWN)):
            raise TaskError(f"{self.name}: parameters: {', '.join(taken)}: decided by the question; leave out")
        try:
            dataset = self._gym.create_dataset(self._dataset, seed=seed, size=1, **parameters)
            return dataset, dataset[0]
        except (AssertionError, TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            raise TaskError(f"{self.name}: parameters: {str(error)[:200]}") from error
