"""Errors that a user of `trainsys` can cause, as a tree.

TrainsysError
├── ConfigError            a recipe or an override is wrong; exit code 2
├── RunError               a run's folder cannot be used as asked (exists, missing, another run's)
├── NumericsError          the loss is not a number
└── MissingExtraError      an optional dependency is not installed
"""

from __future__ import annotations

from collections.abc import Iterable


class TrainsysError(Exception):
    """Base of every error of this package."""


class ConfigError(TrainsysError):
    """One or more settings are wrong; one line each, `source: key: what is wrong; what is allowed`."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = sorted(set(problems))
        super().__init__("\n".join(self.problems))


class RunError(TrainsysError):
    """A run's folder cannot be used as asked."""


class NumericsError(TrainsysError):
    """The loss or the gradient norm is not finite, so no further step can help."""


class MissingExtraError(TrainsysError):
    """An optional dependency is not installed; the message says what to type."""

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(f"{feature} needs an extra: pip install 'trainsys[{extra}]'")
