"""The errors of reinforcement learning.

TrainsysError
└── RLError
    ├── TaskError       no such task, another version of it, or parameters that it does not take
    ├── PolicyError     a prompt or a completion does not fit the policy
    └── SharingError    a store of rollouts, a key or a swarm cannot be used as asked
"""

from __future__ import annotations

from trainsys.errors import TrainsysError


class RLError(TrainsysError):
    """Base of what reinforcement learning raises."""


class TaskError(RLError):
    """There is no such task, or it does not take these parameters."""


class PolicyError(RLError):
    """A prompt or a completion does not fit the policy."""


class SharingError(RLError):
    """A store of rollouts, a key or a swarm cannot be used as asked."""
