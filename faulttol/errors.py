"""What faulttol raises.

FaultTolError
├── HeartbeatError      a heartbeat file that cannot be what it is taken for
├── RecorderError       a second recorder in one process; a call of one that is not installed
├── RingError           a file that is no ring of this version, or is damaged
├── RunError            a run of which nothing is recorded
├── ShipError           a place for events that no file system knows
├── Corrupted           numbers of a rank are not what they must be; with the ranks that have them
├── Fenced (fence)      a rank of an older generation wants to write
└── InjectedFault       what a scheduled fault of kind `raise` raises
"""

from __future__ import annotations


class FaultTolError(Exception):
    """Base of every error of this package."""


class HeartbeatError(FaultTolError):
    """A heartbeat file is malformed, or is written from a process that does not own it."""


class RecorderError(FaultTolError):
    """A process has one recorder at most, and what is asked of it needs it installed."""


class RingError(FaultTolError):
    """A ring of records is malformed or cut short."""


class RunError(FaultTolError):
    """Nothing is known of a run, or of the part of it that was asked for."""


class ShipError(FaultTolError):
    """Events cannot be shipped to, or read from, the place that was named."""


class Corrupted(FaultTolError):
    """Silent data corruption: what a rank computed or holds is not what it must be. Raised on every rank alike."""

    def __init__(self, message: str, ranks: tuple[int, ...]) -> None:
        """`ranks` have the wrong numbers; none where replicas differ and nobody can tell which is right."""
        super().__init__(message)
        self.ranks = ranks


class InjectedFault(FaultTolError):
    """A scheduled fault of kind `raise`."""
