"""Notices ranks that died, froze or hang: signs of life of every rank, and injected faults to test with."""

from faulttol.config import FaultTolConfig
from faulttol.errors import FaultTolError, HeartbeatError
from faulttol.heartbeat import Heartbeat, HeartbeatView
from faulttol.heartbeat import read as read_heartbeat

__all__ = [
    "FaultTolConfig",
    "FaultTolError",
    "Heartbeat",
    "HeartbeatError",
    "HeartbeatView",
    "read_heartbeat",
]
