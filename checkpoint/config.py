"""How often checkpoints are written, how many are kept, and what an error does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """Cadence, retention and failure policy of one Checkpointer."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = {"extra": "forbid", "strict": True}

    every: int = 100
    """Steps between two saves; 0 saves only at the end and when asked to stop."""
    keep_last: int = 2
    """Newest sound checkpoints that stay; at least 1. Nothing goes before its successor is committed."""
    keep_every: int = 0
    """Checkpoints whose step is a multiple of this stay for ever; 0 keeps none beyond `keep_last`."""
    on_error: Literal["raise", "warn"] = "raise"
    """What a failed save does to the training that asked for it."""
    commit_timeout_s: float = 600.0
    """Seconds rank 0 waits for the other ranks' votes before the save fails, naming those missing; above 0.

    The others wait twice as long for rank 0, so that it is the one who tells what is missing."""
    load_buffer_bytes: int = 4 << 30
    """Host memory in which a load from a remote storage keeps bytes until all are verified; the rest is read twice.

    From a local disk everything is: its second reading comes from the kernel's cache."""
