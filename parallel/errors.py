"""Errors that a user of `parallel` can cause, as a tree.

ParallelError
├── GroupError         ranks of a group did not make it together
├── MeshError          degrees that do not fit the ranks or each other; an axis that does not exist
├── PipelineError      a schedule that does not exist for these numbers, or does not add up
└── PlanError          layers that the tensor ranks cannot share
"""

from __future__ import annotations


class ParallelError(Exception):
    """Base of every error of this package."""


class GroupError(ParallelError, RuntimeError):
    """Ranks of a group did not make it together; names who is missing and what they did instead."""


class MeshError(ParallelError, ValueError):
    """Degrees do not fit the ranks or each other, or an axis does not exist; one line a problem."""


class PipelineError(ParallelError, ValueError):
    """A pipeline schedule does not exist for these numbers, or its actions do not add up; one line a problem."""


class PlanError(ParallelError, ValueError):
    """Layers that the tensor ranks cannot share, or that no plan knows; one line a problem."""
