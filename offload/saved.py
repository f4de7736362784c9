"""What a streamed layer's forward keeps for its backward: references to weights, and what becomes of the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from offload.layers import LayerWeights


class SavedTensors(Protocol):
    """What becomes of the tensors that a layer's forward saves for its backward, but for weights."""

    def pack(self, index: int, tensor: torch.Tensor) -> Any:
        """Return what is kept in place of a tensor of layer `index`."""
        ...

    def unpack(self, kept: Any) -> torch.Tensor:
        """Return the tensor."""
        ...

    def before_backward(self, index: int) -> None:
        """Backward is about to come to layer `index`."""
        ...


@dataclass(frozen=True, slots=True)
class Weight:
    """What is kept of a saved tensor that lies in a slot."""

    layer: LayerWeights
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int
