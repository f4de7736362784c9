"""Attention cores for models that share sequences among ranks: the built-in decoder's, and Hugging Face models'.

`transformers` lets a model's attention be a registered function. Ours hands queries, keys and values to the core
and plan that `HuggingFaceModel.forward` passes down as an argument, so nothing global knows about a model.
"""

# Shapes: B batch, T tokens, H query heads, K key/value heads, E head width.

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from parallel.shards import shards_of
from trainsys.errors import ConfigError
from trainsys.models.attention import Core, PlainCore, set_core
from trainsys.models.huggingface import HuggingFaceModel

_NAME = "trainsys_core"
_OTHER_RULES = ("sliding_window", "softcap", "s_aux", "position_bias", "alibi", "chunk_size", "indices")
"""Arguments by which models of `transformers` ask their attention for more than causal softmax."""


def share_sequences(model: nn.Module, core: Core) -> None:
    """Lets a built model, or a pipeline stage of one, attend by `core` (`parallel.context.Context.core`).

    From then on its forward wants positions, and document ids as `Context.cut_documents` numbers them. Call before
    an engine wraps or shards the model.
    Raises: ConfigError if a Hugging Face model's attention is not plain causal attention through `transformers`'
        attention interface: sliding windows, ALiBi, sinks, soft caps, dropout, or code of its own.
    """
    if isinstance(model, HuggingFaceModel):
        _share(model, core)
    else:
        set_core(model, core)


def _share(model: HuggingFaceModel, core: Core) -> None:
    import transformers
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    causal_lm = model.causal_lm
    text = causal_lm.config.get_text_config()
    if getattr(text, "attention_dropout", 0.0):
        raise _refusal(text, f"attention_dropout is {text.attention_dropout}, of which ranks would draw differently")
    if other := set(getattr(text, "layer_types", None) or ()) - {"full_attention"}:
        raise _refusal(text, f"layer_types have {', '.join(sorted(other))}")
    if (window := getattr(text, "sliding_window", None)) and getattr(text, "use_sliding_window", True):
        raise _refusal(text, f"sliding_window is {window}")
    if not getattr(causal_lm, "_supports_attention_backend", False):
        raise _refusal(text, f"attention is not open to other code in transformers {transformers.__version__}")
    ALL_ATTENTION_FUNCTIONS.register(_NAME, attend_through)
    # Matrices that ranks share already are of models whose attention is known (`parallel.plans`), and a trial of them
    # would need the other ranks; what a config does not say still stops the first forward.
    is_cut = any(shard.axes for shard in shards_of(causal_lm).values())
    if not is_cut and not next(causal_lm.parameters()).is_meta:
        _try(causal_lm, text)
    causal_lm.set_attn_implementation(_NAME)
    model.core = core


@torch.no_grad()
def _try(causal_lm: Any, text: Any) -> None:
    """Compares the model's own attention with ours on a few tokens of one process."""
    before = text._attn_implementation
    own = _probe_logits(causal_lm)
    probe = _Probe(text.hidden_size // text.num_attention_heads)
    causal_lm.set_attn_implementation(_NAME)
    try:
        ours = _probe_logits(causal_lm, core_plan=(probe, None))
    finally:
        causal_lm.set_attn_implementation(before)
    if probe.num_calls != text.num_hidden_layers:
        raise _refusal(text, f"attention is open to other code in {probe.num_calls} of {text.num_hidden_layers} layers")
    if not torch.allclose(own, ours, rtol=0, atol=1e-4 * float(own.abs().max())):
        raise _refusal(text, "attention is more than causal softmax of queries and keys")


class _Probe(PlainCore):
    """A core of whole sequences that counts its calls."""

    num_calls = 0

    def __call__(self, *operands: Any, **options: Any) -> Tensor:
        """Causal attention."""
        self.num_calls += 1
        return super().__call__(*operands, **options)


def _probe_logits(causal_lm: Any, **more: Any) -> Tensor:
    device, training = next(causal_lm.parameters()).device, causal_lm.training
    tokens, positions = torch.tensor([[1, 2, 3, 4, 5, 6]], device=device), torch.arange(6, device=device)[None]
    causal_lm.eval()
    try:
        output = causal_lm(input_ids=tokens, position_ids=positions, use_cache=False, **more)
    finally:
        causal_lm.train(training)
    return output.logits.float()  # type: ignore[no-any-return]


def attend_through(
    module: Any,
    query_BHTE: Tensor,
    key_BKTE: Tensor,
    value_BKTE: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    **more: Any,
) -> tuple[Tensor, None]:
    """The function that `transformers` calls; returns the mixed values [B, T, H, E] and no weights."""
    wanted = [name for name in _OTHER_RULES if more.get(name) is not None]
    if dropout:
        wanted.append("dropout")
    if attention_mask is not None:
        wanted.append("attention_mask")
    if wanted:
        raise _refusal(module.config, f"attention asks for {', '.join(wanted)}")
    core, plan = more["core_plan"]
    query_BTHE, key_BTKE, value_BTKE = (x.transpose(1, 2) for x in (query_BHTE, key_BKTE, value_BKTE))
    return core(query_BTHE, key_BTKE, value_BTKE, plan, scale=scaling), None


def _refusal(config: Any, problem: str) -> ConfigError:
    return ConfigError(
        [f"config: parallel.context: {config.model_type} models cannot share sequences: their {problem}; allowed: 1"]
    )
