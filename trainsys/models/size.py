"""How large a model is, and what a token of it costs."""

from __future__ import annotations

from torch import nn

from trainsys.models.decoder import Decoder
from trainsys.models.moe import Experts


def num_parameters(model: nn.Module) -> int:
    """Elements of all parameters, a shared one counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def flops_per_token(model: nn.Module, sequence_length: int) -> int:
    """Floating-point operations of forward and backward for one token of a causal sequence.

    6 x elements of the matrices a token is multiplied with (of the experts, those it visits; the head counts,
    also when tied; looking up an embedding costs nothing) + 12 L T H E / 2 for scores and mixing, halved
    because a token sees half the sequence on average. Norms, recomputation and document boundaries are not
    counted.
    """
    assert isinstance(model, Decoder)
    config = model.config
    spared = 0 if config.tied_head else model.embedding.weight.numel()
    for module in model.modules():
        if isinstance(module, Experts):
            idle = config.moe.num_experts - config.moe.top_k
            spared += num_parameters(module) * idle // config.moe.num_experts
    matrices = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim > 1)
    attention = 6 * config.num_layers * sequence_length * config.num_heads * config.head_dim
    return 6 * (matrices - spared) + attention
