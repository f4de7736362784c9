"""Stacked experts of Hugging Face models (transformers 5: Mixtral, Qwen3-MoE and others) spread over ranks.

Shapes: N tokens, D width, E experts, F width of one expert, K experts a token goes to.

Such a model chooses the experts itself and hands tokens, choices and weights to a module with parameters `gate_up_proj`
[E, 2F, D] and `down_proj` [E, D, F]; that module is replaced, names stay. The model's own router loss is of each rank's
own tokens: the mean over ranks of losses of parts, not the loss of the whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from parallel.dispatch import Dispatcher, grouped_product

_NAMES = ("gate_up_proj", "down_proj")
_LAYOUT = {
    "is_concatenated": True,
    "is_transposed": False,
    "has_bias": False,
    "has_gate": True,
    "has_post_expert_norm": False,
}
"""What transformers notes on the class of such experts, and what is known here."""


class StackedExperts(nn.Module):
    """This rank's experts of a layer; every rank of the group calls it with tokens of its own."""

    gate_up_proj: nn.Parameter
    down_proj: nn.Parameter

    def __init__(self, experts: nn.Module, dispatcher: Dispatcher) -> None:
        super().__init__()
        for name in _NAMES:
            setattr(self, name, getattr(experts, name))
        self.act_fn: Any = experts.act_fn
        self.dispatcher = dispatcher

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the sum of each token's experts by weight, [N, D], of tokens [N, D], choices and weights [N, K]."""
        mapped, _ = self.dispatcher(hidden_states, top_k_index, top_k_weights, self._compute, dropless=True)
        return mapped

    def _compute(self, x_RD: Tensor, counts_E: Tensor) -> Tensor:
        gate, up = grouped_product(x_RD, self.gate_up_proj, counts_E).chunk(2, dim=-1)
        return grouped_product(self.act_fn(gate) * up, self.down_proj, counts_E)


def stacked_experts(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Yield (parent, name in it, module) of the stacked experts of a Hugging Face model."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            owned = dict(child.named_parameters(recurse=False))
            if isinstance(child, StackedExperts) or not any(owned[n].ndim == 3 for n in _NAMES if n in owned):
                continue
            yield parent, name, child


def check_known(experts: nn.Module) -> None:
    """Raise ValueError, naming the class, unless the experts are computed as `StackedExperts` does."""
    kind: Any = type(experts)
    owned = sorted(name for name, _ in experts.named_parameters())
    gate = getattr(getattr(kind, "_apply_gate", None), "__module__", "")
    differences = [name for name, wanted in _LAYOUT.items() if getattr(experts, name, None) is not wanted]
    if owned != sorted(_NAMES):
        differences.append(f"parameters {', '.join(owned)}")
    if not gate.startswith("transformers.integrations.") or not hasattr(experts, "act_fn"):
        differences.append("a gate of its own")
    if differences:
        raise ValueError(
            f"parallel.expert: experts of {kind.__name__} are not known ({', '.join(differences)}); allowed: stacked "
            "gate_up_proj and down_proj as Mixtral's and Qwen3-MoE's, or 1"
        )
