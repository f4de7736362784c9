"""Activations that a block does not keep: all of them, or those that are cheap to compute again."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Recompute = Literal["none", "selective", "full"]
"""What is computed again in backward: nothing; all but products with matrices and fused attention (norms, gates,
rotations, residual sums); the whole block, of which the input alone is kept."""

_KEPT = {
    "aten": (
        "mm",
        "addmm",
        "_grouped_mm",
        "_flash_attention_forward",
        "_efficient_attention_forward",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    ),
    "parallel": ("column", "row"),
}
"""Operators whose results the selective way keeps, by namespace. Batched products are not among them: they are scores,
which are larger than what they come from."""


def as_recompute(value: str) -> Recompute:
    """Return a setting by name.

    Raises: ValueError.
    """
    if value not in get_args(Recompute):
        raise ValueError(f"recompute is {value!r}; allowed: {', '.join(get_args(Recompute))}")
    return value  # type: ignore[return-value]


def run(function: Callable[..., Any], how: Recompute, *args: Any) -> Any:
    """Return function(*args), keeping for backward what `how` says; without gradients all are the same."""
    if how == "none" or not torch.is_grad_enabled():
        return function(*args)
    return checkpoint(function, *args, **checkpoint_arguments(how))


def checkpoint_arguments(how: Recompute) -> dict[str, Any]:
    """Return what torch.utils.checkpoint.checkpoint is called with."""
    if how == "full":
        return {"use_reentrant": False}
    return {"use_reentrant": False, "context_fn": partial(create_selective_checkpoint_contexts, _policy)}


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    namespace, _, name = operator._schema.name.partition("::")
    kept = name in _KEPT.get(namespace, ())
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
