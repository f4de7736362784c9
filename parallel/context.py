"""Context parallelism: ranks that share sequences, each with its own tokens of every one.

`Context` cuts batches, provides the attention core that lets tokens of different ranks see each other, and puts
outputs together. Everything else of a model works on a token at a time and needs to know only true positions.
"""

# Shapes: B batch, W tokens of a sequence, T = W / size tokens of it on one rank.

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional

from parallel.collectives import all_gather
from parallel.ring import Ring, in_order
from parallel.ulysses import Ulysses


class Core(Protocol):
    """What an attention layer hands its heads to."""

    def prepare(self, document_ids_BT: Tensor | None, positions_BT: Tensor | None, like: Tensor) -> Any:
        """Return what all layers of one forward share; `like` has the device and dtype of the activations."""

    def __call__(
        self, query_BTHE: Tensor, key_BTKE: Tensor, value_BTKE: Tensor, plan: Any, *, scale: float | None = None
    ) -> Tensor:
        """Return the mixed values [B, T, H, E]; `plan` is what `prepare` returned."""


def zigzag(length: int, rank: int, size: int) -> Tensor:
    """Return the indices, rising, of a rank's tokens in a sequence of `length`: chunks `rank` and 2 size - 1 - `rank`.

    Raises: ValueError if there are not 2 x size equal chunks.
    """
    if length < 1 or length % (2 * size):
        raise ValueError(
            f"parallel: context: a sequence of {length} tokens has no {2 * size} equal chunks, two for each of {size} "
            f"ranks; allowed: a length that {2 * size} divides"
        )
    chunk = length // (2 * size)
    first, second = rank * chunk, (2 * size - 1 - rank) * chunk
    return torch.cat((torch.arange(first, first + chunk), torch.arange(second, second + chunk)))


def number_documents(ids_BW: Tensor) -> Tensor:
    """Return the documents of whole sequences numbered from 0, rising: each change of id begins one."""
    return functional.pad(ids_BW[:, 1:] != ids_BW[:, :-1], (1, 0)).cumsum(1).to(torch.int32)


@dataclass(frozen=True, slots=True)
class Part:
    """One rank's tokens of a batch; all [B, T]."""

    tokens: Tensor
    positions: Tensor
    """As given, else counted from 0 in the whole sequence."""
    targets: Tensor | None
    document_ids: Tensor | None
    """Numbered along the whole sequence."""


class Context:
    """A rank among those that share sequences; with a group of one rank all is whole and nothing is sent.

    `core` is the attention for models (`Core`): "ring" takes any heads, "ulysses" those its ranks can share.
    """

    def __init__(self, group: ProcessGroup, method: Literal["ring", "ulysses"] = "ring") -> None:
        self.group = group
        self.rank, self.size = group.rank(), group.size()
        self.core: Core = Ring(group) if method == "ring" else Ulysses(group)

    def cut(self, x: Tensor, dim: int = 1) -> Tensor:
        """Return this rank's part of `x`, whose dimension `dim` is the sequence.

        Raises: ValueError if the sequence has no two equal chunks for each rank.
        """
        return x.index_select(dim, zigzag(x.shape[dim], self.rank, self.size).to(x.device))

    def cut_documents(self, ids_BW: Tensor) -> Tensor:
        """Return this rank's part [B, T] of the documents' numbers; a document ends wherever the id changes."""
        return self.cut(number_documents(ids_BW))

    def cut_batch(
        self,
        tokens_BW: Tensor,
        *,
        targets_BW: Tensor | None = None,
        positions_BW: Tensor | None = None,
        document_ids_BW: Tensor | None = None,
    ) -> Part:
        """Return this rank's part of a batch that all ranks of the group have alike."""
        if positions_BW is None:
            positions_BW = torch.arange(tokens_BW.shape[1], device=tokens_BW.device).expand_as(tokens_BW)
        return Part(
            tokens=self.cut(tokens_BW),
            positions=self.cut(positions_BW),
            targets=None if targets_BW is None else self.cut(targets_BW),
            document_ids=None if document_ids_BW is None else self.cut_documents(document_ids_BW),
        )

    def gather(self, x: Tensor) -> Tensor:
        """Return whole sequences [B, W, ...] from all ranks' parts [B, T, ...], outside of autograd."""
        return in_order(all_gather(x.detach()[None], 0, self.group))
