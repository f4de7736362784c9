"""Pipeline stages of Hugging Face models that are built like a Llama."""

# Shapes: B batch, T tokens of this rank, D model width.

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from trainsys.errors import ConfigError
from trainsys.models.huggingface import HuggingFaceModel, restarted_positions


class Elsewhere(nn.Module):
    """Stands for a module of another stage: hands on what it is given."""

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        """Returns `x`."""
        return x


class _Exact(nn.Module):
    """Rotary angles, whose frequencies keep their dtype when the model is converted."""

    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self.rotary = rotary

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module inside returns."""
        return self.rotary(*args, **kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> _Exact:
        before = dict(self.rotary.named_buffers())
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():
            self.rotary._buffers[name] = buffer.to(self.rotary._buffers[name].device)  # type: ignore[union-attr]
        return self


class HuggingFaceStage(nn.Module):
    """Layers `first` to `end` of a model, whose modules it takes over; embedding and head go with the ends.

    Parameters are named as in the model. Where the head is tied to the embedding, the last stage has the embedding's
    module too, for its name alone. The forward is that of `transformers`, in which modules of other stages hand on
    what they get: masks, windows and rotary angles are the model's own.

    Raises: ConfigError if the model is not embed_tokens, layers, norm and a plain head, or has a router's loss, which
        `transformers` computes of all layers at once.
    """

    def __init__(self, model: HuggingFaceModel, first: int, end: int) -> None:
        super().__init__()
        base = _base(model)
        if not isinstance(base.rotary_emb, _Exact):
            base.rotary_emb = _Exact(base.rotary_emb)
        num_layers = len(base.layers)
        self.is_first, self.is_last = first == 0, end == num_layers
        self.config = model.config
        tied = model.causal_lm.lm_head.weight is base.embed_tokens.weight
        parts: dict[str, nn.Module] = {
            "layers": nn.ModuleDict({str(layer): base.layers[layer] for layer in range(first, end)}),
            "rotary_emb": base.rotary_emb,
        }
        if self.is_first or (self.is_last and tied):
            parts["embed_tokens"] = base.embed_tokens
        if self.is_last:
            parts["norm"] = base.norm
        self.causal_lm = nn.ModuleDict({"model": nn.ModuleDict(parts)})
        if self.is_last:
            self.causal_lm["lm_head"] = model.causal_lm.lm_head
        self._whole = (model, self._pruned(base, first, end))  # in a tuple: not modules of this one

    def forward(
        self,
        x: Tensor,
        aux: Tensor | None,
        *,
        positions_BT: Tensor | None = None,
        document_ids_BT: Tensor | None = None,
        targets_BT: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """From tokens [B, T] or hidden states to hidden states, logits, or the summed loss of targets; aux is kept."""
        model, base = self._whole
        wants: dict[str, Any] = {}
        if model.core is not None:
            assert positions_BT is not None, "a part of a sequence does not tell its positions"
            like = torch.empty(0, dtype=next(self.parameters()).dtype, device=x.device)
            wants["core_plan"] = (model.core, model.core.prepare(document_ids_BT, positions_BT, like))
        elif document_ids_BT is not None:
            positions_BT = restarted_positions(document_ids_BT)
        given = {"input_ids": x} if self.is_first else {"inputs_embeds": x}
        x = base(**given, position_ids=positions_BT, use_cache=False, **wants).last_hidden_state
        if aux is None:
            aux = x.new_zeros((), dtype=torch.promote_types(x.dtype, torch.float32))
        if self.is_last:
            head = self.causal_lm["lm_head"]
            x = head(x) if targets_BT is None else head(x, targets_BT)
        return x, aux

    def _pruned(self, base: Any, first: int, end: int) -> Any:
        """A copy of the base model that shares this stage's modules and lacks the others."""
        pruned = copy.copy(base)
        pruned._modules = dict(base._modules)
        pruned.layers = nn.ModuleList(
            layer if first <= index < end else Elsewhere() for index, layer in enumerate(base.layers)
        )
        if not self.is_first:
            pruned.embed_tokens = Elsewhere()
        if not self.is_last:
            pruned.norm = Elsewhere()
        return pruned


def _base(model: HuggingFaceModel) -> Any:
    base = model.causal_lm.base_model
    lacks = [name for name in ("embed_tokens", "layers", "norm", "rotary_emb") if not hasattr(base, name)]
    if lacks or model.causal_lm.base_model_prefix != "model" or not hasattr(model.causal_lm, "lm_head"):
        problem = f"no way is known to cut a {model.config.model_type} model; allowed: Llama-like models, or 1"
        raise ConfigError([f"config: parallel.pipeline: {problem}"])
    if not model._fuses_loss or not model._separates_documents:
        problem = f"the loss of a {model.config.model_type} model is more than that of its logits; allowed: 1"
        raise ConfigError([f"config: parallel.pipeline: {problem}"])
    return base
