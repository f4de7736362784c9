"""Optimizers and the parameter groups they work on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trainsys.config import OptimConfig


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """The trainable parameters, grouped for `config`; every group has a stable `name`, a `kind` and
    `initial_lr`.

    `decay` holds what has two or more dimensions and is no embedding, `no_decay` the rest (norms, biases,
    embeddings unless `decay_embeddings`). Order within a group is the model's. Empty groups are left out.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    members: dict[str, list[Tensor]] = {"decay": [], "no_decay": []}
    for parameter in model.parameters():
        if parameter.requires_grad:
            spared = parameter.ndim < 2 or (id(parameter) in embeddings and not config.decay_embeddings)
            members["no_decay" if spared else "decay"].append(parameter)
    return [
        {
            "name": name,
            "kind": "adamw",
            "params": parameters,
            "lr": config.lr,
            "initial_lr": config.lr,
            "weight_decay": config.weight_decay if name == "decay" else 0.0,
        }
        for name, parameters in members.items()
        if parameters
    ]


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer of `config` over the model's trainable parameters, each group at its peak learning
    rate."""
    groups = parameter_groups(model, config)
    # Fused: one pass over the states on CPU and GPU alike, and element by element, so bit-reproducible.
    return torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)
