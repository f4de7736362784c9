"""Keys and values of many sequences of different lengths, one a slot, and the attention that reads and fills them.

A slot holds the tokens of its sequence from position 0, without padding, so a sequence's numbers do not depend on its
neighbours. Buffers stay where they are: a step on them can be captured in a CUDA graph.
"""

# Shapes: C slots, B slots of a call (the first ones, or those that are being filled), T query tokens, S positions,
# H query heads, K key/value heads, G = H / K, E head width.

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from trainsys.models.attention import PlainCore


class SlotCache:
    """Keys and values of all layers, [C, K, S, E] each, allocated as layers are first seen."""

    def __init__(self, num_slots: int, span: int) -> None:
        self.num_slots, self.span = num_slots, span
        self._layers: list[tuple[Tensor, Tensor]] = []

    def layer(self, index: int, like_BTKE: Tensor) -> tuple[Tensor, Tensor]:
        """Return a layer's keys and values; `like_BTKE` says heads, width, dtype and device."""
        if index == len(self._layers):
            shape = (self.num_slots, like_BTKE.shape[2], self.span, like_BTKE.shape[3])
            self._layers.append((like_BTKE.new_zeros(shape), like_BTKE.new_zeros(shape)))
        return self._layers[index]

    def move(self, sources: Tensor, destinations: Tensor, length: int) -> None:
        """Copy the first `length` positions of some slots over others."""
        for layer in self._layers:
            for stored in layer:
                stored[destinations, :, :length] = stored[sources, :, :length]


class Fill:
    """One forward over whole prompts, whose keys and values go into the slots of every copy of each prompt."""

    def __init__(self, cache: SlotCache, slots: Tensor, prompts: Tensor) -> None:
        """`slots` [N] are filled with rows `prompts` [N] of the forward's batch."""
        self._cache, self._slots, self._prompts = cache, slots, prompts
        self._next_layer = 0

    def attend(
        self, plain: PlainCore, query_BTHE: Tensor, key_BTKE: Tensor, value_BTKE: Tensor, scale: float | None
    ) -> Tensor:
        """Causal attention inside the prompts; padding is on the right, where no token before it looks."""
        keys, values = self._cache.layer(self._next_layer, key_BTKE)
        self._next_layer += 1
        length = key_BTKE.shape[1]
        keys[self._slots, :, :length] = key_BTKE.transpose(1, 2)[self._prompts]
        values[self._slots, :, :length] = value_BTKE.transpose(1, 2)[self._prompts]
        return plain(query_BTHE, key_BTKE, value_BTKE, None, scale=scale)


class Step:
    """One forward over the next token of each of the first B slots, at positions `lengths_B` of theirs."""

    def __init__(self, cache: SlotCache, lengths_B: Tensor, span: int, dtype: torch.dtype) -> None:
        """`span` is more than the largest length; positions from there on are not read."""
        self._cache, self._lengths_B, self._span = cache, lengths_B, span
        self._slots_B = torch.arange(len(lengths_B), device=lengths_B.device)
        unseen_BS = torch.arange(span, device=lengths_B.device) > lengths_B[:, None]
        self._mask_B11S = torch.zeros(unseen_BS.shape, dtype=dtype, device=lengths_B.device).masked_fill_(
            unseen_BS, float("-inf")
        )[:, None, None]
        self._next_layer = 0

    def attend(
        self, plain: PlainCore, query_BTHE: Tensor, key_BTKE: Tensor, value_BTKE: Tensor, scale: float | None
    ) -> Tensor:
        """Attention of one query a slot; the query heads that share a key head are the queries of one product."""
        del plain
        keys, values = self._cache.layer(self._next_layer, key_BTKE)
        self._next_layer += 1
        batch, kv_heads = len(self._lengths_B), key_BTKE.shape[2]
        keys[self._slots_B, :, self._lengths_B] = key_BTKE[:, 0]
        values[self._slots_B, :, self._lengths_B] = value_BTKE[:, 0]
        query_BKGE = query_BTHE.reshape(batch, kv_heads, -1, query_BTHE.shape[-1])
        mixed_BKGE = functional.scaled_dot_product_attention(
            query_BKGE,
            keys[:batch, :, : self._span],
            values[:batch, :, : self._span],
            attn_mask=self._mask_B11S.expand(-1, -1, query_BKGE.shape[2], -1),
            scale=scale,
        )
        return mixed_BKGE.flatten(1, 2)[:, None]


class SlotCore:
    """A trainsys.models.attention.Core: plain attention, but for forwards inside `using`, which go through a cache."""

    def __init__(self, head_dim: int) -> None:
        self._plain = PlainCore(head_dim)
        self._current: Fill | Step | None = None

    def forward(self, call: Any, current: Fill | Step, *operands: Any) -> Any:
        """Return call(*operands), one forward of the model, with attention by `current`."""
        self._current = current
        try:
            return call(*operands)
        finally:
            self._current = None

    def prepare(self, document_ids_BT: Tensor | None, positions_BT: Tensor | None, like: Tensor) -> Any:
        """What all layers of one forward share."""
        if self._current is not None:
            return self._current
        return self._plain.prepare(document_ids_BT, positions_BT, like)

    def __call__(
        self, query_BTHE: Tensor, key_BTKE: Tensor, value_BTKE: Tensor, plan: Any, *, scale: float | None = None
    ) -> Tensor:
        """The mixed values [B, T, H, E]."""
        if isinstance(plan, Fill | Step):
            return plan.attend(self._plain, query_BTHE, key_BTKE, value_BTKE, scale)
        return self._plain(query_BTHE, key_BTKE, value_BTKE, plan, scale=scale)
