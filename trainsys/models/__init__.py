"""Causal language models behind one contract, built from a configuration.

Every model maps `forward(tokens_BT, *, positions_BT=None, document_ids_BT=None)` to logits [B, T, V] in its
own dtype and an auxiliary loss (fp32 scalar, already weighted). Positions default to 0..T-1; attention
never crosses a change of document id, and without ids a row is one document.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from trainsys.config import ModelConfig
from trainsys.models.decoder import Decoder, build_decoder

__all__ = ["blocks", "build", "flops_per_token", "num_parameters"]

_BUILDERS: Mapping[str, Callable[..., nn.Module]] = {"decoder": build_decoder}


def build(
    config: ModelConfig, *, vocab_size: int, max_positions: int, activation_checkpointing: bool, seed: int
) -> nn.Module:
    """The model that `config` describes, on the CPU in fp32 with weights decided by `seed`.

    `vocab_size` is the tokenizer's; the model may have more rows. Under `torch.device("meta")` it has no
    weights.
    Raises: ConfigError naming every setting that does not fit.
    """
    return _BUILDERS[config.kind](
        config,
        vocab_size=vocab_size,
        max_positions=max_positions,
        activation_checkpointing=activation_checkpointing,
        seed=seed,
    )


def blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a built model, first to last."""
    assert isinstance(model, Decoder)
    return list(model.blocks)


def num_parameters(model: nn.Module) -> int:
    """Elements of all parameters, a shared one counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def flops_per_token(model: nn.Module, sequence_length: int) -> int:
    """Floating-point operations of forward and backward for one token of a causal sequence.

    6 x parameters a token meets in a product (embedding rows are looked up, not multiplied; the head
    counts, and so does its tied form) + 12 L T H E / 2 for scores and mixing, halved because a token sees
    half the sequence. Recomputation is not counted, document boundaries neither.
    """
    assert isinstance(model, Decoder)
    config = model.config
    active = num_parameters(model) - (0 if config.tied_head else model.embedding.weight.numel())
    attention = 6 * config.num_layers * sequence_length * config.num_heads * config.head_dim
    return 6 * active + attention
