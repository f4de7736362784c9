"""Names the rank or the link that is bad: records every collective, tells what is wrong, and what to do about it."""

from faulttol.config import FaultTolConfig
from faulttol.errors import FaultTolError, HeartbeatError, RecorderError, RingError
from faulttol.events import CollectiveEvent, RankRecord, StepMark
from faulttol.heartbeat import Heartbeat, HeartbeatView
from faulttol.heartbeat import read as read_heartbeat
from faulttol.process import install, mark_phase, mark_step, mark_step_end, uninstall
from faulttol.ring import read as read_ring
from faulttol.ring import ring_path

__all__ = [
    "CollectiveEvent",
    "FaultTolConfig",
    "FaultTolError",
    "Heartbeat",
    "HeartbeatError",
    "HeartbeatView",
    "RankRecord",
    "RecorderError",
    "RingError",
    "StepMark",
    "install",
    "mark_phase",
    "mark_step",
    "mark_step_end",
    "read_heartbeat",
    "read_ring",
    "ring_path",
    "uninstall",
]
