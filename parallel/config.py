"""Degrees of parallelism, as a recipe writes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """How many ranks share the work along each axis; the product is the number of ranks."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = {"extra": "forbid", "strict": True}

    pipeline: int = 1
    """Stages that hold consecutive layers; at least 1."""
    replicate: int = 1
    """Data-parallel replicas, each with its own part of every batch; at least 1."""
    shard: int = 1
    """Data-parallel ranks over which one replica's state is sharded; at least 1."""
    context: int = 1
    """Ranks that share one sequence; at least 1."""
    tensor: int = 1
    """Ranks that share one matrix; at least 1."""
    expert: int = 1
    """Ranks over which experts are spread; divides replicate x shard, adds no ranks of its own."""
