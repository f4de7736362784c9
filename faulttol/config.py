"""What is watched while a job runs."""

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
