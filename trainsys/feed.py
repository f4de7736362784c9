"""Micro-batches as this rank's part of a model takes them, and its losses as the trainer counts them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from parallel.hybrid import Hybrid
from trainsys.data import MicroBatch


class Feed:
    """Cuts a micro-batch to this rank's tokens and brings it to the device."""

    def __init__(self, hybrid: Hybrid, device: torch.device) -> None:
        self._context = hybrid.context
        self._in_pipeline = hybrid.pipeline is not None
        self._tells = hybrid.tells
        self._device = device

    def __call__(self, micro: MicroBatch) -> dict[str, Any]:
        """Return the keyword arguments of a forward with targets, on the device."""
        if self._context is None:
            tokens, targets = micro.tokens, micro.targets
            positions, documents = micro.positions, micro.document_ids
        else:
            part = self._context.cut_batch(
                micro.tokens,
                targets_BW=micro.targets,
                positions_BW=micro.positions,
                document_ids_BW=micro.document_ids,
            )
            assert part.targets is not None
            tokens, targets, positions, documents = part.tokens, part.targets, part.positions, part.document_ids
        if positions is None and self._in_pipeline:  # a later stage may see fewer tokens than there are positions
            positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        return {
            "tokens_BT": self._send(tokens),
            "targets_BT": self._send(targets),
            "positions_BT": None if positions is None else self._send(positions),
            "document_ids_BT": None if documents is None else self._send(documents),
            **{name: self._send(tensor) for name, tensor in micro.extras.items()},
        }

    def told(self, sums: Tensor) -> Tensor:
        """Return the sums, or zeros where another rank has the same tokens and tells of them."""
        return sums if self._tells else torch.zeros_like(sums)

    def _send(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device, non_blocking=True)
