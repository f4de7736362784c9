"""Causal language models behind one contract, built from a configuration.

Every model maps `forward(tokens_BT, *, positions_BT=None, document_ids_BT=None, targets_BT=None)` to logits
[B, T, V] in its own dtype, or with targets to their summed cross-entropy (a scalar of at least fp32; targets of -100
count nothing), and to an auxiliary loss (fp32 scalar, already weighted). Positions default to 0..T-1; attention never
crosses a change of document id, and without ids a row is one document.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from parallel.tensor import ParallelHead
from trainsys.config import ModelConfig
from trainsys.models.decoder import Block, build_decoder
from trainsys.models.folder import load_pretrained, save_pretrained
from trainsys.models.huggingface import blocks_of, build_huggingface
from trainsys.models.layers import Head
from trainsys.models.materialise import materialise
from trainsys.models.recompute import Recompute
from trainsys.models.size import flops_per_token, hidden_matrices, num_parameters
from trainsys.models.stages import Anatomy

__all__ = [
    "Anatomy",
    "blocks",
    "build",
    "compile_parts",
    "flops_per_token",
    "hidden_matrices",
    "load_pretrained",
    "materialise",
    "num_parameters",
    "save_pretrained",
]

_BUILDERS: Mapping[str, Callable[..., nn.Module]] = {"decoder": build_decoder, "hf": build_huggingface}


def build(
    config: ModelConfig,
    *,
    vocab_size: int,
    max_positions: int,
    recompute: Recompute,
    seed: int,
) -> nn.Module:
    """The model that `config` describes, on the CPU in fp32 with weights decided by `seed`.

    `vocab_size` is the tokenizer's; the model may have more rows. Under `torch.device("meta")` it has no
    weights; `materialise` gives it those that it has otherwise. `recompute` says what backward computes
    again.
    Raises: ConfigError naming every setting that does not fit.
    """
    return _BUILDERS[config.kind](
        config,
        vocab_size=vocab_size,
        max_positions=max_positions,
        recompute=recompute,
        seed=seed,
    )


def blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a built model or of the stages of one, first to last."""
    if hasattr(getattr(model, "config", None), "get_text_config"):  # transformers' own
        return blocks_of(model)
    return [module for module in model.modules() if isinstance(module, Block)]


def compile_parts(model: nn.Module) -> None:
    """Let torch.compile have what a built model repeats, its blocks, and the passes over its logits."""
    for block in blocks(model):
        block.compile()
    for module in model.modules():
        if isinstance(module, Head | ParallelHead):
            module.compiled = True
