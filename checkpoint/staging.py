"""The copy of a rank's part of the state from which a save is written."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from checkpoint.format import CHUNK_BYTES
from checkpoint.state import Piece


@dataclass(frozen=True, slots=True, eq=False)
class Staged:
    """A piece of the state, its values held in host memory of their own."""

    piece: Piece
    """Its tensor is the copy, contiguous, not the one handed to save."""

    def chunks(self) -> Iterator[Any]:
        """Yield the bytes, CHUNK_BYTES at a time, as buffers over the staged memory."""
        flat = self.piece.tensor.reshape(-1).view(torch.uint8).numpy()
        for start in range(0, len(flat), CHUNK_BYTES):
            yield flat[start : start + CHUNK_BYTES]


class Staging:
    """Host memory for one save at a time, kept from save to save: touching fresh pages costs most."""

    def __init__(self) -> None:
        self._buffers: dict[int, torch.Tensor] = {}

    def copy(self, pieces: Sequence[Piece]) -> list[Staged]:
        """Copy the pieces; their tensors may be mutated when this returns.

        The copies of the call before are overwritten: its save must have ended.
        """
        old, self._buffers = self._buffers, {}
        staged = []
        with torch.no_grad():
            for i, piece in enumerate(pieces):
                tensor = piece.tensor
                copy = old.get(i)
                if copy is None or (copy.shape, copy.dtype) != (tensor.shape, tensor.dtype):
                    copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                copy.copy_(tensor)
                self._buffers[i] = copy
                staged.append(Staged(dataclasses.replace(piece, tensor=copy)))
        return staged

    def release(self) -> None:
        """Give the memory back."""
        self._buffers = {}
