"""What faulttol raises.

FaultTolError
├── HeartbeatError      a heartbeat file that cannot be what it is taken for
└── InjectedFault       what a scheduled fault of kind `raise` raises
"""

from __future__ import annotations


class FaultTolError(Exception):
    """Base of every error of this package."""


class HeartbeatError(FaultTolError):
    """A heartbeat file is malformed, or is written from a process that does not own it."""


class InjectedFault(FaultTolError):
    """A scheduled fault of kind `raise`."""
