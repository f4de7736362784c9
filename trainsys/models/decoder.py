"""The built-in decoder: RMSNorm before each sub-layer, rotary grouped-query attention, SwiGLU or experts."""

# Shapes: B batch, T tokens, D model width, V vocabulary rows.

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainsys.config import ModelConfig
from trainsys.errors import ConfigError
from trainsys.models.attention import Attention, KVCache, continuation_mask, rotation
from trainsys.models.initialisation import initialise, spread
from trainsys.models.layers import Embedding, Head, RMSNorm, SwiGLU
from trainsys.models.moe import MoE
from trainsys.models.recompute import Recompute, as_recompute, run


def resolve(config: ModelConfig, vocab_size: int) -> ModelConfig:
    """The configuration with every size that 0 stands for filled in; `vocab_size` is the tokenizer's.

    Raises: ConfigError if the model has fewer rows than the tokenizer has tokens.
    """
    rows = config.vocab_size or -(-vocab_size // 64) * 64
    if rows < vocab_size:
        problem = f"{rows} is under the tokenizer's {vocab_size} tokens; allowed: 0, or {vocab_size} and up"
        raise ConfigError([f"config: model.vocab_size: {problem}"])
    ffn_dim = config.ffn_dim or -(-8 * config.dim // (3 * 64)) * 64
    return replace(
        config,
        num_kv_heads=config.num_kv_heads or config.num_heads,
        head_dim=config.head_dim or config.dim // config.num_heads,
        ffn_dim=ffn_dim,
        vocab_size=rows,
        moe=replace(config.moe, ffn_dim=config.moe.ffn_dim or ffn_dim),
    )


def _no_loss(x: Tensor) -> Tensor:
    return x.new_zeros((), dtype=torch.promote_types(x.dtype, torch.float32))


class Block(nn.Module):
    """Attention, then feed-forward, each normalised before and added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int, recompute: Recompute = "none") -> None:
        super().__init__()
        self.layer = layer
        self.recompute = recompute
        self.dropout = config.dropout
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config.dim, config.num_heads, config.num_kv_heads, config.head_dim)
        self.feed_forward_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward: SwiGLU | MoE
        if config.moe.num_experts and layer >= config.moe.first_dense_layers:
            self.feed_forward = MoE(config.moe, config.dim)
        else:
            self.feed_forward = SwiGLU(config.dim, config.ffn_dim)

    def forward(
        self,
        x_BTD: Tensor,
        cos: Tensor,
        sin: Tensor,
        plan: Any = None,
        cache: KVCache | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The residual stream after this block, and its share of the auxiliary loss."""
        how = self.recompute if cache is None else "none"
        return run(self._run, how, x_BTD, cos, sin, plan, cache)  # type: ignore[no-any-return]

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Let torch.compile have this block.

        Of a checkpoint torch compiles all or, silently, nothing; around a core that runs outside of compiled code, as
        those of `parallel.context` do, it is therefore given what the checkpoint runs.
        """
        if self.recompute == "none" or self.attention.core is self.attention.plain:
            super().compile(*args, **kwargs)
        else:
            self.__dict__["_run"] = torch.compile(self._run, *args, **kwargs)

    def _run(self, x_BTD: Tensor, cos: Tensor, sin: Tensor, plan: Any, cache: KVCache | None) -> tuple[Tensor, Tensor]:
        # Compiled code is compiled anew for every number that it has read of a block, and soon not at all.
        layer = 0 if cache is None else self.layer
        mixed_BTD = self.attention(self.attention_norm(x_BTD), cos, sin, plan, cache, layer)
        x_BTD = x_BTD + self._drop(mixed_BTD)
        normed_BTD = self.feed_forward_norm(x_BTD)
        if isinstance(self.feed_forward, MoE):
            mapped_BTD, aux_loss = self.feed_forward(normed_BTD)
        else:
            mapped_BTD, aux_loss = self.feed_forward(normed_BTD), _no_loss(x_BTD)
        return x_BTD + self._drop(mapped_BTD), aux_loss

    def _drop(self, x_BTD: Tensor) -> Tensor:
        return functional.dropout(x_BTD, self.dropout, self.training) if self.dropout else x_BTD


class Decoder(nn.Module):
    """Tokens in, logits out; weights are unset until `initialise` or a state dict fills them.

    `max_positions` is the most tokens of a row (None: any number). `recompute` is what backward computes
    again.
    """

    def __init__(self, config: ModelConfig, *, max_positions: int | None, recompute: Recompute) -> None:
        super().__init__()
        self.config = config
        self.max_positions = max_positions
        how = as_recompute(recompute)
        self.embedding = Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config, layer, how) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.head = Head(config.dim, config.vocab_size)
        if config.tied_head:
            self.head.weight = self.embedding.weight

    def forward(
        self,
        tokens_BT: Tensor,
        *,
        positions_BT: Tensor | None = None,
        document_ids_BT: Tensor | None = None,
        targets_BT: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Logits [B, T, V] in the model's dtype, and the weighted auxiliary loss summed over the blocks.

        With `targets_BT` their summed cross-entropy in nats (a scalar of at least fp32; targets of -100 count
        nothing) takes the place of the logits, which are never all there. The auxiliary loss is a scalar of at least
        fp32, 0 when dense. Positions default to 0..T-1, or to what follows the cache. Attention never crosses a
        change of document id; without ids a row is one document. With a `cache` (then no document ids) the tokens
        continue it.
        """
        x_BTD, aux_loss = self.features(
            tokens_BT, positions_BT=positions_BT, document_ids_BT=document_ids_BT, cache=cache
        )
        return self.head(x_BTD, targets_BT), aux_loss

    def features(
        self,
        tokens_BT: Tensor,
        *,
        positions_BT: Tensor | None = None,
        document_ids_BT: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> tuple[Tensor, Tensor]:
        """What goes into the head, [B, T, D], and the auxiliary loss; see `forward`."""
        num_tokens = tokens_BT.shape[1]
        start = cache.length if cache is not None else 0
        limit = self.max_positions
        if limit is not None and start + num_tokens > limit:
            raise ValueError(f"{start + num_tokens} tokens do not fit the model's limit of {limit} positions")
        x_BTD = self.embedding(tokens_BT)
        if positions_BT is None:
            positions_BT = torch.arange(start, start + num_tokens, device=tokens_BT.device)
        cos, sin = rotation(positions_BT, self.config.head_dim, self.config.rope_theta, x_BTD.dtype)
        if cache is None:
            first = self.blocks[0]
            assert isinstance(first, Block)
            plan = first.attention.core.prepare(document_ids_BT, positions_BT, x_BTD)
        else:
            assert document_ids_BT is None, "a cache holds one document per row"
            plan = continuation_mask(num_tokens, start + num_tokens, x_BTD)
        aux_loss = _no_loss(x_BTD)
        for block in self.blocks:
            x_BTD, aux = block(x_BTD, cos, sin, plan, cache)
            aux_loss = aux_loss + aux
        if cache is not None:
            cache.length += num_tokens
        return self.norm(x_BTD), aux_loss

    def new_cache(self) -> KVCache:
        """An empty cache for `forward`."""
        return KVCache(self.config.num_layers)


def build_decoder(
    config: ModelConfig,
    *,
    vocab_size: int,
    max_positions: int,
    recompute: Recompute,
    seed: int,
) -> Decoder:
    """A decoder with its initial weights (`initialisation.spread`)."""
    model = Decoder(
        resolve(config, vocab_size),
        max_positions=max_positions,
        recompute=recompute,
    )
    initialise(model, num_layers=config.num_layers, seed=seed, std=spread(config.dim))
    return model
