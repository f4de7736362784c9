"""Which layers keep what they save for backward, which compute it again, and which swap it out: pure.

Follows Fuyou (arXiv 2403.06504): the time of a step is modelled from the bytes that are swapped, and the layers whose
recomputation costs most for its bytes are swapped first, until the model stops falling. With A bytes swapped, of which
`host_bytes` go to CPU memory and the rest to a disk,

    T_forward(A)  = max(F, A / down, A_disk / disk_write)
    T_backward(A) = max(B + recomputed(A), (A + weights) / up, gradients / down, A_disk / disk_read)

which is convex in A, as layers are taken in the order of their benefit. Differs: a layer may also keep what it saves,
as far as a budget of device memory reaches; so the model is evaluated at every split into swapped, recomputed and kept
layers, which are few.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from offload.errors import BudgetError

Choice = Literal["keep", "swap", "recompute"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerActivations:
    """What one layer saves for backward."""

    num_bytes: int
    """That a swap would move and free."""
    input_bytes: int
    """That stay on the device where the layer is computed again."""
    forward_s: float
    """What computing it again takes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Links:
    """Bytes a second, and what else uses them."""

    down: float
    """Device to host."""
    up: float
    """Host to device."""
    host_bytes: int | None = None
    """CPU memory for what is swapped; None: as much as it takes."""
    disk_write: float = 0.0
    """0: there is no disk for what CPU memory does not hold."""
    disk_read: float = 0.0
    weight_bytes: int = 0
    """Of weights that come up again in backward."""
    gradient_bytes: int = 0
    """Of gradients that go down in backward."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ActivationPlan:
    """What each layer does, and what that costs."""

    choices: tuple[Choice, ...]
    swapped_bytes: int
    kept_bytes: int
    """On the device when forward has ended."""
    forward_s: float
    backward_s: float
    reason: str


def plan_activations(
    layers: Sequence[LayerActivations], links: Links, *, backward_s: float, budget_bytes: int
) -> ActivationPlan:
    """Return the fastest choices that fit into `budget_bytes`; `backward_s` is that of all layers, all kept.

    Where it makes no difference, the first layers are swapped, as they have the longest way back, and the last ones
    keep what backward needs first.

    Raises:
        BudgetError: not even computing everything again fits; it says what is missing.
    """
    order = sorted(range(len(layers)), key=lambda i: (-_benefit(layers[i]), i))
    best: ActivationPlan | None = None
    for num_swapped in range(len(layers) + 1):
        swapped = set(order[:num_swapped])
        rest = sorted(order[num_swapped:], key=lambda i: (_benefit(layers[i]), i))
        for num_recomputed in range(len(rest) + 1):
            again = set(rest[:num_recomputed])
            choices: tuple[Choice, ...] = tuple(
                "swap" if i in swapped else "recompute" if i in again else "keep" for i in range(len(layers))
            )
            found = evaluate(layers, links, choices, backward_s=backward_s)
            if found.kept_bytes > budget_bytes or math.isinf(found.forward_s):
                continue
            if best is None or _cost(found) < _cost(best):
                best = found
    if best is None:
        least = min(
            evaluate(layers, links, choice, backward_s=backward_s).kept_bytes for choice in _extremes(len(layers))
        )
        raise BudgetError(
            f"activations: {budget_bytes} bytes of device memory, and at least {least} are needed; give it "
            f"{least - budget_bytes} more, or make micro-batches smaller"
        )
    return best


def evaluate(
    layers: Sequence[LayerActivations], links: Links, choices: Sequence[Choice], *, backward_s: float
) -> ActivationPlan:
    """Return what some choices cost by the model; infinite where they need a disk and there is none."""
    chosen = list(zip(layers, choices, strict=True))
    swapped = sum(layer.num_bytes for layer, choice in chosen if choice == "swap")
    on_disk = 0 if links.host_bytes is None else max(0, swapped - links.host_bytes)
    again_s = sum(layer.forward_s for layer, choice in chosen if choice == "recompute")
    # A swapped layer's bytes are on the device until they have left, and again before they are needed.
    in_flight = max((layer.num_bytes for layer, choice in chosen if choice == "swap"), default=0)
    again = max((layer.num_bytes for layer, choice in chosen if choice == "recompute"), default=0)
    kept = sum({"keep": layer.num_bytes, "swap": 0, "recompute": layer.input_bytes}[choice] for layer, choice in chosen)
    forward_s = max(sum(layer.forward_s for layer in layers), swapped / links.down, _over(on_disk, links.disk_write))
    full_s = max(
        backward_s + again_s,
        (swapped + links.weight_bytes) / links.up,
        links.gradient_bytes / links.down,
        _over(on_disk, links.disk_read),
    )
    counts = {choice: list(choices).count(choice) for choice in ("keep", "swap", "recompute")}
    return ActivationPlan(
        choices=tuple(choices),
        swapped_bytes=swapped,
        kept_bytes=kept + max(2 * in_flight, again),
        forward_s=forward_s,
        backward_s=full_s,
        reason=f"{counts['keep']} kept, {counts['swap']} swapped, {counts['recompute']} computed again",
    )


def _benefit(layer: LayerActivations) -> float:
    """Return the time that swapping saves a byte."""
    return layer.forward_s / max(1, layer.num_bytes)


def _cost(plan: ActivationPlan) -> tuple[float, int]:
    return plan.forward_s + plan.backward_s, plan.swapped_bytes


def _over(num_bytes: int, rate: float) -> float:
    return 0.0 if not num_bytes else num_bytes / rate if rate else math.inf


def _extremes(count: int) -> list[tuple[Choice, ...]]:
    kinds: tuple[Choice, ...] = ("keep", "swap", "recompute")
    return [(kind,) * count for kind in kinds]
