"""Causal attention over packed documents: masks, rotary positions, grouped queries, a key/value cache."""

# Shapes: B batch, T query tokens, S key tokens, D model width, H query heads, K key/value heads, E head
# width.

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from parallel import kernels
from trainsys.models.layers import Linear


class Core(Protocol):
    """What attention layers hand their heads to; one serves all layers of a model.

    `parallel.context` has cores for ranks that share sequences.
    """

    def prepare(self, document_ids_BT: Tensor | None, positions_BT: Tensor | None, like: Tensor) -> Any:
        """What all layers of one forward share, found once; `like` has the device and dtype of activations."""

    def __call__(
        self, query_BTHE: Tensor, key_BTKE: Tensor, value_BTKE: Tensor, plan: Any, *, scale: float | None = None
    ) -> Tensor:
        """The mixed values [B, T, H, E]: causal, inside documents; `plan` is what `prepare` returned.

        `scale` is that of the scores, by default E^-1/2.
        """


class PlainCore:
    """Attention of whole sequences on one device.

    Packed documents are an additive mask; on CUDA in bf16 or fp16 with head widths that flash attention takes
    (`parallel.kernels.choose`) they are the bounds that its kernel for packed sequences reads, since a mask
    excludes flash attention and takes T x T elements a row.
    """

    def __init__(self, head_dim: int) -> None:
        self.head_dim = head_dim

    def prepare(
        self, document_ids_BT: Tensor | None, positions_BT: Tensor | None, like: Tensor
    ) -> Tensor | kernels.Documents | None:
        """Documents or a mask; None where causal says it all. The host waits for an accelerator once."""
        if kernels.choose(like.new_empty(0, self.head_dim)) == "flash":
            return kernels.documents(document_ids_BT, like)
        return document_mask(document_ids_BT, like.dtype)

    def __call__(
        self,
        query_BTHE: Tensor,
        key_BTKE: Tensor,
        value_BTKE: Tensor,
        plan: Tensor | kernels.Documents | None,
        *,
        scale: float | None = None,
    ) -> Tensor:
        """The mixed values [B, T, H, E]; a mask may also be one of fewer queries than keys."""
        if isinstance(plan, kernels.Documents):
            return kernels.packed_attention(query_BTHE, key_BTKE, value_BTKE, plan, scale=scale)
        query_BHTE, key_BKTE, value_BKTE = (x.transpose(1, 2) for x in (query_BTHE, key_BTKE, value_BTKE))
        return attend(query_BHTE, key_BKTE, value_BKTE, plan, scale).transpose(1, 2)


class KVCache:
    """Keys and values of the tokens seen so far, for generation; grows as they come.

    Attention writes behind `length` and reads all; the model moves `length` once all layers have written.
    """

    def __init__(self, num_layers: int) -> None:
        self.length = 0
        self._slots: list[Tensor | None] = [None] * num_layers

    def append(self, layer: int, key_BTKE: Tensor, value_BTKE: Tensor) -> tuple[Tensor, Tensor]:
        """Writes the new keys and values of a layer and returns all of that layer's, [B, S, K, E]."""
        end = self.length + key_BTKE.shape[1]
        slot = self._slots[layer]
        if slot is None or slot.shape[2] < end:
            batch, _, kv_heads, head_dim = key_BTKE.shape
            larger = key_BTKE.new_empty(2, batch, max(64, 2 * end), kv_heads, head_dim)
            if slot is not None:
                larger[:, :, : self.length] = slot[:, :, : self.length]
            self._slots[layer] = slot = larger
        slot[0, :, self.length : end] = key_BTKE
        slot[1, :, self.length : end] = value_BTKE
        return slot[0, :, :end], slot[1, :, :end]


_MOST_SCORES = 2**24
"""Most scores (B x H x T x S) that `attend` keeps as a matrix for backward; 32 MiB in bf16."""


def attend(
    query_BHTE: Tensor, key_BKSE: Tensor, value_BKSE: Tensor, mask: Tensor | None, scale: float | None = None
) -> Tensor:
    """Softmax attention [B, H, T, E]; `mask` is additive, None is causal (all keys for a single query).

    On a CPU in bf16 the fused kernel computes at the fp32 rate; three plain products, with the scores rounded
    to bf16, take a third of its time while the scores are few enough to keep (`trainsys.bench.decoder`).
    """
    (batch, heads, num_queries, _), num_keys = query_BHTE.shape, key_BKSE.shape[2]
    bf16_on_cpu = query_BHTE.device.type == "cpu" and query_BHTE.dtype == torch.bfloat16
    if not bf16_on_cpu or num_queries == 1 or batch * heads * num_queries * num_keys > _MOST_SCORES:
        return functional.scaled_dot_product_attention(
            query_BHTE,
            key_BKSE,
            value_BKSE,
            attn_mask=mask,
            is_causal=mask is None and num_queries > 1,
            enable_gqa=heads != key_BKSE.shape[1],
            scale=scale,
        )
    if mask is None:
        mask = query_BHTE.new_full((num_queries, num_keys), float("-inf")).triu_(1)
    if (group := heads // key_BKSE.shape[1]) > 1:
        key_BKSE, value_BKSE = key_BKSE.repeat_interleave(group, 1), value_BKSE.repeat_interleave(group, 1)
    query, key, value = (x.flatten(0, 1) for x in (query_BHTE, key_BKSE, value_BKSE))
    bias = mask.expand(batch, heads, num_queries, num_keys).flatten(0, 1)
    scores = torch.baddbmm(bias, query, key.mT, alpha=scale or query.shape[-1] ** -0.5)
    return torch.bmm(scores.softmax(-1), value).view(batch, heads, num_queries, -1)


def document_mask(document_ids_BT: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Additive mask [B, 1, T, T] of causal attention inside documents; None where causal says it all.

    A document ends wherever the id changes, also when an id comes back later. Additive, because the attention
    kernels would turn a boolean mask into one again in every layer. Looks at the values, so the host waits
    for an accelerator once a forward.
    """
    if document_ids_BT is None:
        return None
    change_BT = functional.pad(document_ids_BT[:, 1:] != document_ids_BT[:, :-1], (1, 0))
    if not bool(change_BT.any()):
        return None
    document_BT = change_BT.cumsum(1)
    visible_BTT = (document_BT[:, :, None] == document_BT[:, None, :]).tril_()
    return torch.zeros_like(visible_BTT, dtype=dtype).masked_fill_(~visible_BTT, float("-inf"))[:, None]


def continuation_mask(num_queries: int, num_keys: int, like: Tensor) -> Tensor | None:
    """Additive causal mask [T, S] for queries that are the last of the keys; None where they are all."""
    if num_queries == num_keys:
        return None
    mask_TS = like.new_full((num_queries, num_keys), float("-inf"))
    return mask_TS.triu_(num_keys - num_queries + 1)


def rotation(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles, each [..., T, 1, E/2], for positions [..., T].

    Angles are taken in float64 each forward: exact at any position, free of the model's dtype (a buffer would
    be cast to bf16 with the weights), and under a thousandth of a step.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device) / head_dim
    angles = positions[..., None, None].double() * theta**-exponents
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x_BTHE: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each pair (x[i], x[i + E/2]) by its angle."""
    first, second = x_BTHE.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; queries, keys and values come from one product.

    `num_heads` and `num_kv_heads` are those that are here, which tensor parallelism makes fewer. `core` may be
    replaced (`set_core`).
    """

    def __init__(self, dim: int, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.plain = PlainCore(head_dim)
        self.core: Core = self.plain
        self.qkv = Linear(dim, num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim)
        self.output = Linear(num_heads * head_dim, dim)

    def forward(
        self,
        x_BTD: Tensor,
        cos: Tensor,
        sin: Tensor,
        plan: Any = None,
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """Mixes tokens; `plan` is what the core prepared, with a cache an additive mask [T, S] (None: causal).

        With a cache every rank has whole sequences, which the plain core mixes.
        """
        heads, kv_heads = self.num_heads, self.num_kv_heads
        qkv = self.qkv(x_BTD)
        qkv = qkv.view(*qkv.shape[:2], heads + 2 * kv_heads, self.head_dim)
        query_key, value_BSKE = torch.split(qkv, [heads + kv_heads, kv_heads], dim=2)
        query_BTHE, key_BSKE = torch.split(rotate(query_key, cos, sin), [heads, kv_heads], dim=2)
        if cache is None:
            mixed_BTHE = self.core(query_BTHE, key_BSKE, value_BSKE, plan)
        else:
            mixed_BTHE = self.plain(query_BTHE, *cache.append(layer, key_BSKE, value_BSKE), plan)
        return self.output(mixed_BTHE.flatten(2))  # type: ignore[no-any-return]


def set_core(model: nn.Module, core: Core) -> None:
    """Lets all attention layers of a model (or of a pipeline stage) use `core`.

    Raises: TypeError if it has none, as Hugging Face models do (`trainsys.models.context`).
    """
    layers = [module for module in model.modules() if isinstance(module, Attention)]
    if not layers:
        raise TypeError(f"{type(model).__name__} has no attention layer of this package")
    for layer in layers:
        layer.core = core
