"""What a tiered optimizer must equal: torch.optim.AdamW on fp32 masters, in one process, step by step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

HYPER: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def small_model(dtype: torch.dtype) -> nn.Module:
    """Return a model whose parameters are several subgroups of 640, with the same values at every call.

    Sizes are multiples of 16: torch rounds the elements left over by its vectors another way.
    """
    torch.manual_seed(0)
    layers = (nn.Embedding(32, 48), nn.Linear(48, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 32))
    return nn.Sequential(*layers).to(dtype)


def decay_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Return two groups: matrices, and the rest without decay."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim > 1]},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]


class Reference:
    """torch.optim.AdamW(fused=True) on fp32 masters, which are rounded to the model's weights after every step."""

    def __init__(self, model: nn.Module, max_norm: float | None = None) -> None:
        groups = decay_groups(model)
        self.weights = [p for group in groups for p in group["params"]]
        self.masters = [p.detach().float().clone().requires_grad_() for p in self.weights]
        masters = iter(self.masters)
        own = [{**group, "params": [next(masters) for _ in group["params"]]} for group in groups]
        self.optimizer = torch.optim.AdamW(own, **HYPER, fused=True)
        self.max_norm = max_norm
        self.last_norm = 0.0
        self.param_groups = self.optimizer.param_groups

    def step(self) -> None:
        """Clip, update, round; skip a step that is not finite."""
        present = [(w, m) for w, m in zip(self.weights, self.masters, strict=True) if w.grad is not None]
        norms = [torch.linalg.vector_norm(w.grad, dtype=torch.float32) for w, _ in present]
        self.last_norm = float(torch.stack(norms).double().square().sum().sqrt())
        for master in self.masters:
            master.grad = None
        if not math.isfinite(self.last_norm):
            return
        factor = 1.0 if self.max_norm is None else min(1.0, self.max_norm / (self.last_norm + 1e-6))
        for weight, master in present:
            assert weight.grad is not None
            master.grad = weight.grad.float() * torch.tensor(factor, dtype=torch.float32)
        self.optimizer.step()
        with torch.no_grad():
            for weight, master in present:
                weight.copy_(master)

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for weight in self.weights:
            weight.grad = None


def train(
    model: nn.Module,
    optimizer: Any,
    *,
    steps: int,
    accumulation: int = 1,
    overflow_at: int | None = None,
    after_step: Callable[[int], None] | None = None,
) -> None:
    """Train on random tokens, the same at every call; in step `overflow_at` the loss is infinite."""
    generator = torch.Generator().manual_seed(1)
    for number in range(steps):
        for micro in range(accumulation):
            inputs, targets = torch.randint(0, 32, (2, 8), generator=generator)
            loss = nn.functional.cross_entropy(model(inputs).float(), targets) * 4 / accumulation
            if number == overflow_at and micro == accumulation - 1:
                loss = loss * float("inf")
            loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        for group in optimizer.param_groups:
            group["lr"] = HYPER["lr"] * (1 - number / (2 * steps))
        if after_step is not None:
            after_step(number)


def differences(reference: Reference, model: nn.Module, state: dict[str, Any]) -> list[str]:
    """Return which parameters and states of a model and its optimizer's state_dict are not those of the reference."""
    theirs = reference.optimizer.state_dict()["state"]
    weights = [p for group in decay_groups(model) for p in group["params"]]
    found = [
        f"parameter {number}"
        for number, (a, b) in enumerate(zip(reference.weights, weights, strict=True))
        if not torch.equal(a, b)
    ]
    if state.keys() != theirs.keys():
        found.append(f"states of {sorted(state)} instead of {sorted(theirs)}")
    for number in state.keys() & theirs.keys():
        mine = state[number]
        if not torch.equal(mine["master"], reference.masters[number]):
            found.append(f"master {number}")
        found += [
            f"{kind} {number}"
            for kind in ("step", "exp_avg", "exp_avg_sq")
            if not torch.equal(mine[kind], theirs[number][kind])
        ]
    return found
