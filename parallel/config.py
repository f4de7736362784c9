"""Degrees of parallelism and how each kind works, as a recipe writes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

_STRICT: Mapping[str, Any] = {"extra": "forbid", "strict": True}


@dataclass(frozen=True, kw_only=True, slots=True)
class StagesConfig:
    """How pipeline stages are cut and scheduled; of no effect with `parallel.pipeline = 1`."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = _STRICT

    schedule: Literal["gpipe", "1f1b", "interleaved", "zb-h1", "zbv", "dualpipev"] = "1f1b"
    """Order of forwards and backwards. `interleaved` gives every rank `per_rank` stages, `zbv` and `dualpipev` two in
    a V; `zb-h1`, `zbv` and `dualpipev` put weight gradients into what would be the bubble."""
    per_rank: int = 2
    """schedule=interleaved: stages on each rank; at least 2."""
    layers: list[int] = field(default_factory=list)
    """Layers of each stage, first to last; empty cuts by estimated cost, embedding and head counted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """How many ranks share the work along each axis; the product (without `expert`) is the number of ranks."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = _STRICT

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
    node_size: int = 0
    """With expert > 1: consecutive ranks of those that share experts that make a node, to which a token is sent once
    whatever number of experts it has there; divides expert x tensor. 0 sends it to each of its experts."""
    stages: StagesConfig = field(default_factory=StagesConfig)
    """Pipeline stages."""
    sequence: bool = True
    """With tensor > 1: what lies between the shared matrices (norms, dropout, the residual stream) is shared along
    the sequence, which saves its memory; sums become reduce-scatter and all-gather of the same bytes."""
    attention: Literal["ring", "ulysses"] = "ring"
    """With context > 1: `ring` passes keys and values around, `ulysses` exchanges sequence for heads: context x tensor
    divides the query heads, and divides or is a multiple of the heads of keys and values."""
    overlap: bool = True
    """Overlap communication with computation: matrix products in chunks, gradients reduced during backward, messages
    of a pipeline received before they are needed."""
