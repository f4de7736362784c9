"""What is watched while a job runs, and from when on it counts as wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True, kw_only=True, slots=True)
class FaultTolConfig:
    """Heartbeats of every rank."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = {"extra": "forbid", "strict": True}

    heartbeat_interval_s: float = 0.5
    """Seconds between two signs of life of a rank's process; above 0, well under launch.frozen_timeout_s."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HealthConfig:
    """From when on a missing sign of life means something."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = {"extra": "forbid", "strict": True}

    lost_after_s: float = 5.0
    """Seconds without a report from a rank's machine until the rank counts as lost."""
    frozen_after_s: float = 1.5
    """Seconds without an answer of native code until a process that exists counts as frozen."""
    stuck_after_s: float = 5.0
    """Seconds without a sign of life of a Python thread until the rank counts as stuck in native code."""
    stalled_after_s: float = 10.0
    """Seconds without progress of the loop until the rank counts as stalled."""
    patience: float = 12.0
    """Factor on `stuck_after_s` and `stalled_after_s` in `patient_phases`."""
    patient_phases: tuple[str, ...] = ("start", "compile", "warmup", "checkpoint", "evaluation")
    """What a rank may do for long without being ill."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DetectorConfig:
    """Thresholds of the rules from events to findings; all durations are of one clock each."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = {"extra": "forbid", "strict": True}

    warmup_steps: int = 5
    """Steps after the start of a generation that no rule about speed looks at."""
    hang_after_s: float = 10.0
    """Seconds that a collective is open before it can count as hanging."""
    hang_factor: float = 10.0
    """A collective also has to be open for this many times the longest usual one of its kind."""
    confirmations: int = 2
    """Views in a row that must agree before a finding about a hang or about speed is reported."""
    window_steps: int = 16
    """Steps that a rule about speed looks at."""
    straggler_excess: float = 0.2
    """A straggler's local time exceeds its peers' by at least this share of the step."""
    straggler_floor_s: float = 0.002
    """... and by at least this many seconds."""
    straggler_share: float = 0.7
    """... and it comes last in at least this share of the steps of the window."""
    slow_excess: float = 0.3
    """A transfer is slow when it takes this share longer than it used to."""
    slow_floor_s: float = 0.001
    """... and at least this many seconds longer."""
    slow_windows: int = 4
    """Parts of a window that are compared apart; all but one have to be slow."""
    link_factor: float = 3.0
    """A cell of the delay matrix is slow at this multiple of its class's median."""
    link_floor_s: float = 0.001
    """... and at least this many seconds above it."""
    imbalance_correlation: float = 0.8
    """Local times that follow the tokens at least this closely are explained by them."""
    gradient_deviations: float = 8.0
    """A gradient norm this many (robust) deviations from its peers', on a log scale, is an outlier."""
