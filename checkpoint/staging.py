"""The copy of a rank's part of the state from which a save is written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from checkpoint.format import CHUNK_BYTES
from checkpoint.state import Piece


@dataclass(frozen=True, slots=True, eq=False)
class Staged:
    """A piece of the state whose values are held in host memory of its own."""

    piece: Piece
    data: torch.Tensor
    """uint8, one dimension, contiguous."""

    def chunks(self) -> Iterator[Any]:
        """Yields the bytes, CHUNK_BYTES at a time, as buffers over the staged memory."""
        flat = self.data.numpy()
        for start in range(0, len(flat), CHUNK_BYTES):
            yield flat[start : start + CHUNK_BYTES]


def stage(pieces: Sequence[Piece]) -> list[Staged]:
    """Copies the pieces to host memory; their tensors may be mutated when this returns."""
    with torch.no_grad():
        return [Staged(piece, _host_bytes(piece.tensor)) for piece in pieces]


def _host_bytes(tensor: torch.Tensor) -> torch.Tensor:
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    copy.copy_(tensor)
    return copy.reshape(-1).view(torch.uint8)
