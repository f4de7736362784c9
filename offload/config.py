"""Where training state lives when it does not fit on the device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class OffloadConfig:
    """Tier of each kind of state."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = {"extra": "forbid", "strict": True}

    optimizer: Literal["device", "cpu"] = "device"
    """Tier of the fp32 master weights and optimizer moments; `cpu` needs engine.zero_stage >= 1."""
