"""How large a model is, what a token of it costs, and which of its parameters are matrices between layers."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from trainsys.models.decoder import Decoder
from trainsys.models.huggingface import HuggingFaceModel
from trainsys.models.moe import Router


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
    shape = _shape_of(model)
    looked_up = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    products = 0
    for parameter in model.parameters():
        if parameter.ndim == 3 and len(parameter) == shape.num_experts:
            products += parameter.numel() * shape.top_k // shape.num_experts
        elif parameter.ndim > 1 and (parameter is shape.head or id(parameter) not in looked_up):
            products += parameter.numel()
    return 6 * products + 6 * shape.num_layers * sequence_length * shape.attention_dim


def hidden_matrices(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The trainable matrices between the embedding and the head, by name: heights of what is stacked in rows.

    The decoder's fused projections are told apart (queries, keys, values; gate, up); a Hugging Face model's
    are taken as they are stored, and the leading dimension of experts is a stack either way. Routers are
    left out: like a head they end in a softmax.
    """
    shape = _shape_of(model)
    splits = {
        getattr(module, leaf): heights
        for module in model.modules()
        for leaf, heights in getattr(module, "row_splits", {}).items()
    }
    spared = {module.weight for module in model.modules() if isinstance(module, nn.Embedding | Router)}
    found = {}
    for name, parameter in model.named_parameters():
        routes = parameter.ndim == 2 and len(parameter) == shape.num_experts
        if parameter.ndim < 2 or parameter is shape.head or parameter in spared or routes:
            continue
        found[name] = splits.get(parameter, (parameter.shape[-2],))
    return found


class _Shape(NamedTuple):
    """What the formula needs beside the parameters themselves."""

    num_layers: int
    attention_dim: int
    """Query heads x width of a head."""
    num_experts: int
    top_k: int
    head: Tensor


def _shape_of(model: nn.Module) -> _Shape:
    if isinstance(model, HuggingFaceModel):
        text = model.config.get_text_config()
        heads = text.num_attention_heads
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
        names = ("num_local_experts", "num_experts", "n_routed_experts")
        num_experts = next((getattr(text, name) for name in names if getattr(text, name, None)), 0)
        top_k = getattr(text, "num_experts_per_tok", num_experts)
        head = model.causal_lm.get_output_embeddings().weight
        return _Shape(text.num_hidden_layers, heads * head_dim, num_experts, top_k, head)
    assert isinstance(model, Decoder)
    config = model.config
    attention_dim = config.num_heads * config.head_dim
    return _Shape(config.num_layers, attention_dim, config.moe.num_experts, config.moe.top_k, model.head.weight)
