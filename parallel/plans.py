"""Which module of which model is shared how, by names: plans for the built-in decoder and for Llama-like models."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from parallel.errors import PlanError
from parallel.styles import (
    Column,
    FirstBlock,
    HeadNorm,
    Heads,
    Plan,
    Region,
    Row,
    SequenceNorm,
    VocabularyEmbedding,
    VocabularyHead,
)


def plan_for(model: nn.Module) -> Plan:
    """Return the plan of a model, chosen by the names of its modules.

    The built-in decoder (fused `qkv` and `gate_up`), and models of transformers that are named like a Llama (with or
    without biases and norms of queries and keys). Mixtures of experts are left alone: with a sequence shard they see
    the rank's part of the tokens, else tokens that are equal on all ranks.
    Raises: PlanError that names every module with parameters which has no style.
    """
    names = dict(model.named_modules())
    if any(name.endswith("attention.qkv") for name in names):
        plan = _decoder_plan(model)
    elif any(name.endswith("self_attn.q_proj") for name in names):
        plan = _llama_plan(model)
    else:
        plan = {}
    unknown = [name for name in _unstyled(model, plan) if not _inside_experts(name, names)]
    if unknown:
        listed = ", ".join(unknown[:8]) + (f" and {len(unknown) - 8} more" if len(unknown) > 8 else "")
        raise PlanError(
            f"parallel.tensor: no way is known to share {listed} of {type(model).__name__}; allowed: the built-in "
            "decoder and Llama-like models (Llama, Mistral, Qwen2, Qwen3), or parallel.tensor = 1"
        )
    return {pattern: styles for pattern, styles in plan.items() if any(fnmatchcase(name, pattern) for name in names)}


def _decoder_plan(model: nn.Module) -> Plan:
    plan: dict[str, Any] = {
        "embedding": (VocabularyEmbedding(),),
        "blocks.*.attention_norm": (SequenceNorm(),),
        "blocks.*.feed_forward_norm": (SequenceNorm(),),
        "blocks.*.feed_forward.down": (Row(),),
        "norm": (SequenceNorm(),),
        "head": (VocabularyHead(),),
    }
    for name, module in model.named_modules():
        if name.endswith(".attention"):
            attention: Any = module
            heads, kv_heads, head_dim = attention.num_heads, attention.num_kv_heads, attention.head_dim
            sizes = (heads * head_dim, kv_heads * head_dim, kv_heads * head_dim)
            plan[name] = (Heads(num_heads=heads, num_kv_heads=kv_heads),)
            plan[f"{name}.qkv"] = (Column(row_splits=sizes, head_dim=head_dim, copied=(1, 2)),)
            plan[f"{name}.output"] = (Row(head_dim=head_dim),)
        elif name.endswith(".feed_forward.gate_up"):
            ffn_dim = module.weight.shape[0] // 2
            plan[name] = (Column(row_splits=(ffn_dim, ffn_dim)),)
    return plan


def _llama_plan(model: nn.Module) -> Plan:
    config: Any = model.config
    text = config.get_text_config()
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    plan: dict[str, Any] = {
        "*embed_tokens": (VocabularyEmbedding(scatters=False),),
        "*.layers.0": (FirstBlock(),),
        "*.layers.*.input_layernorm": (SequenceNorm(),),
        "*.layers.*.post_attention_layernorm": (SequenceNorm(),),
        "*.layers.*.self_attn": (Heads(num_heads=heads, num_kv_heads=kv_heads), Region()),
        "*.self_attn.q_proj": (Column(head_dim=head_dim, entered=True),),
        "*.self_attn.k_proj": (Column(head_dim=head_dim, copied=(0,), entered=True),),
        "*.self_attn.v_proj": (Column(head_dim=head_dim, copied=(0,), entered=True),),
        "*.self_attn.o_proj": (Row(head_dim=head_dim),),
        "*.layers.*.mlp": (Region(),),
        "*.mlp.gate_proj": (Column(entered=True),),
        "*.mlp.up_proj": (Column(entered=True),),
        "*.mlp.down_proj": (Row(),),
        "*.norm": (SequenceNorm(),),
        "*lm_head": (VocabularyHead(),),
    }
    for name, module in model.named_modules():
        if name.endswith(("self_attn.q_norm", "self_attn.k_norm")) and module.weight.shape == (head_dim,):
            plan[name] = (HeadNorm(),)
    return plan


def _unstyled(model: nn.Module, plan: Plan) -> Iterator[str]:
    for name, module in model.named_modules():
        if module._parameters and not any(fnmatchcase(name, pattern) for pattern in plan):
            yield name


def _inside_experts(name: str, modules: dict[str, nn.Module]) -> bool:
    """Return whether a module belongs to a mixture of experts of the built-in decoder."""
    path = name.split(".")
    owners = (".".join(path[: end + 1]) for end in range(len(path)) if path[end] == "feed_forward")
    return any(f"{owner}.router" in modules for owner in owners)
