"""Optimizers and the parameter groups they work on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainsys.config import OptimConfig
from trainsys.models import hidden_matrices
from trainsys.muon import Muon


@dataclass(frozen=True, slots=True)
class Plan:
    """How the parameters of a whole model are trained, by name: also where a rank has a part of them."""

    group_of: Mapping[str, str]
    """Parameter group of every trainable parameter; see `parameter_groups`."""
    row_splits: Mapping[str, tuple[int, ...]]
    """Heights of the matrices stacked in each hidden matrix; empty unless kind=muon."""


def plan_of(model: nn.Module, config: OptimConfig) -> Plan:
    """The plan for a whole model, before anything is split."""
    embeddings = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    matrices = hidden_matrices(model) if config.kind == "muon" else {}
    group_of = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name in matrices:
            group_of[name] = "muon"
        elif parameter.ndim < 2 or (parameter in embeddings and not config.decay_embeddings):
            group_of[name] = "no_decay"
        else:
            group_of[name] = "decay"
    return Plan(group_of, {name: tuple(heights) for name, heights in matrices.items()})


def build_optimizer(model: nn.Module, config: OptimConfig, plan: Plan | None = None) -> torch.optim.Optimizer:
    """The optimizer of `config` over the model's trainable parameters, each group at its peak learning rate.

    kind=adamw is `torch.optim.AdamW`, kind=muon is `Muon`; both are bit-reproducible. A rank's part of a model comes
    with the `plan` of the whole one.
    """
    plan = plan or plan_of(model, config)
    groups = parameter_groups(model, config, plan)
    if config.kind == "muon":
        weight = next(model.parameters())
        # The iteration tolerates bf16, which is much faster wherever weights are trained in it.
        fast = weight.is_cuda or weight.dtype == torch.bfloat16
        return Muon(groups, plan.row_splits, torch.bfloat16 if fast else torch.float32)
    # Fused: one pass over the states on CPU and GPU alike, element by element.
    return torch.optim.AdamW(groups, fused=True)


def parameter_groups(model: nn.Module, config: OptimConfig, plan: Plan | None = None) -> list[dict[str, Any]]:
    """The trainable parameters, in groups with a stable `name`, a `kind`, `initial_lr` and their settings.

    `muon`: the hidden matrices (kind=muon only). `decay`: what else has two or more dimensions and is no
    embedding. `no_decay`: norms, biases, and embeddings unless `decay_embeddings`. Members keep the model's
    order; a group without members is left out.
    """
    plan = plan or plan_of(model, config)
    members: dict[str, dict[str, Tensor]] = {"muon": {}, "decay": {}, "no_decay": {}}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            members[plan.group_of[name]][name] = parameter
    settings = {
        "muon": _settings("muon", config.muon_lr, config.weight_decay) | {"momentum": config.muon_momentum},
        "decay": _settings("adamw", config.lr, config.weight_decay) | _adamw(config),
        "no_decay": _settings("adamw", config.lr, 0.0) | _adamw(config),
    }
    return [
        {"params": list(named.values()), "name": group, "names": list(named), **settings[group]}
        for group, named in members.items()
        if named
    ]


def _settings(kind: str, lr: float, weight_decay: float) -> dict[str, Any]:
    return {"kind": kind, "lr": lr, "initial_lr": lr, "weight_decay": weight_decay}


def _adamw(config: OptimConfig) -> dict[str, Any]:
    return {"betas": (config.beta1, config.beta2), "eps": config.eps}
