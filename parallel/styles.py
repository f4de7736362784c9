"""How each module of a model is shared over the tensor ranks; a plan says it by module names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """A linear layer whose outputs the ranks share."""

    row_splits: tuple[int, ...] = ()
    """Heights of the matrices stacked in it, each of which is cut by itself; empty: one."""
    head_dim: int = 1
    """Rows that stay together; with 1 a height that the ranks do not divide is padded."""
    copied: tuple[int, ...] = ()
    """Stacked matrices (by index) of key and value heads: with fewer heads than ranks they are copied."""
    entered: bool = False
    """Its input already is all tokens, and gradients are summed where it came in (`Region`)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A linear layer whose inputs the ranks share: they come from column layers."""

    head_dim: int = 1
    """Features that stay together; with 1 a width that the ranks do not divide is padded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VocabularyEmbedding:
    """An embedding whose rows the ranks share."""

    scatters: bool = True
    """With a sequence shard its output is one; else it is all tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VocabularyHead:
    """The last linear layer: with targets it returns their summed cross-entropy, without them all logits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceNorm:
    """A module that sees a sequence shard: the gradients of its own parameters are summed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadNorm:
    """A module that sees this rank's heads, sequence shard or not: the gradients of its own parameters are summed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Heads:
    """An attention module, which must know how many heads it has."""

    num_heads: int
    num_kv_heads: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Region:
    """A module of whose input each rank computes its features; its column layers are `entered`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FirstBlock:
    """A module in front of which tokens that are equal on all ranks become a sequence shard."""


Style = Column | Row | VocabularyEmbedding | VocabularyHead | SequenceNorm | HeadNorm | Heads | Region | FirstBlock

Plan = Mapping[str, tuple[Style, ...]]
"""Pattern (fnmatch) of dotted module names -> what is done to each such module, in this order."""
