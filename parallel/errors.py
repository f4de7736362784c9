"""Errors that a user of `parallel` can cause, as a tree.

ParallelError
└── MeshError          degrees that do not fit the ranks or each other; an axis that does not exist
"""

from __future__ import annotations


class ParallelError(Exception):
    """Base of every error of this package."""


class MeshError(ParallelError, ValueError):
    """Degrees do not fit the ranks or each other, or an axis does not exist; one line a problem."""
