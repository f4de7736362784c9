"""Hyper-parameters of a parameter group."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Group:
    """Hyper-parameters of a parameter group, as they are now."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
