"""How many layers stay on the device at once, and how many move at once: pure.

Follows Superpipeline (arXiv 2410.08791): a window of `resident` layers (its k) slides over the model, and `moved`
layers (its k') leave and come together. A move is hidden if the rest of the window computes for as long:
moved x t_transfer <= (resident - moved) x t_layer. Differs: the window is chosen, from a memory budget and measured
times, where the paper leaves both numbers to the user.
"""

from __future__ import annotations

from dataclasses import dataclass

from offload.errors import BudgetError


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """A window over `num_layers` layers."""

    num_layers: int
    resident: int
    """Layers whose weights are on the device at once; 1 to num_layers."""
    moved: int = 1
    """Layers that leave and come at once; less than `resident`, unless that is 1."""
    reason: str = "as given"

    def __post_init__(self) -> None:
        if not 1 <= self.resident <= self.num_layers:
            raise BudgetError(f"window: resident: {self.resident}; allowed: 1 to {self.num_layers}, the layers")
        if not 1 <= self.moved <= max(1, self.resident - 1):
            raise BudgetError(f"window: moved: {self.moved}; allowed: 1 to {max(1, self.resident - 1)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerCost:
    """What one layer takes: the largest and slowest of the model."""

    num_bytes: int
    """Of its weights."""
    compute_s: float
    """Its forward; backward takes longer, and so hides more."""
    transfer_s: float
    """Its weights to the device."""


def fixed_bytes_needed(num_bytes: int, *, training: bool) -> int:
    """Return what the window needs for one layer beside its slot: in training, the gradients on their way out."""
    return num_bytes if training else 0


def largest_window(
    *, num_layers: int, layer_bytes: int, other_bytes: int, budget_bytes: int, training: bool, moved: int = 1
) -> Window:
    """Return the window that fills the budget.

    `other_bytes` is what is on the device anyway: what is no layer, activations, workspace.

    Raises:
        BudgetError: not even one layer fits; it says what is missing.
    """
    left = budget_bytes - other_bytes - fixed_bytes_needed(layer_bytes, training=training)
    fits = left // layer_bytes
    if fits < 1:
        raise BudgetError(
            f"window: {budget_bytes} bytes of device memory hold no layer: {other_bytes} are taken by what is no "
            f"layer and a layer needs {budget_bytes - left - other_bytes + layer_bytes}; give it "
            f"{layer_bytes - left} bytes more, cut the layers smaller, or keep fewer activations"
        )
    resident = min(fits, num_layers)
    reason = (
        "all layers fit"
        if resident == num_layers
        else f"{fits} of {num_layers} layers fit into {left} bytes"
        + ("; with one, nothing is hidden" if resident == 1 else "")
    )
    return Window(num_layers=num_layers, resident=resident, moved=min(moved, max(1, resident - 1)), reason=reason)


def choose_window(cost: LayerCost, *, num_layers: int, other_bytes: int, budget_bytes: int, training: bool) -> Window:
    """Return the smallest window that hides its moves, or the largest that fits where none does.

    Raises:
        BudgetError: as `largest_window`.
    """
    largest = largest_window(
        num_layers=num_layers,
        layer_bytes=cost.num_bytes,
        other_bytes=other_bytes,
        budget_bytes=budget_bytes,
        training=training,
    )
    if largest.resident == num_layers:
        return largest
    for resident in range(2, largest.resident + 1):
        if cost.transfer_s <= (resident - 1) * cost.compute_s:
            reason = f"the smallest that hides {cost.transfer_s:.2g} s of transfer under {cost.compute_s:.2g} s a layer"
            return Window(num_layers=num_layers, resident=resident, reason=reason)
    return largest


def predicted_s(window: Window, cost: LayerCost, *, training: bool) -> float:
    """Return how long a pass over all layers takes: forward, and in training backward at twice its time.

    Compute and transfers take turns in a window of one layer, and run side by side in a larger one. In training every
    layer comes again after the update, the first with nothing to hide under; those of the window at the turn into
    backward are there. In inference a pass ends with the first layers on their way, unless all stay.
    """
    away = window.num_layers - window.resident
    compute_s, all_s = window.num_layers * cost.compute_s, window.num_layers * cost.transfer_s
    if window.resident == 1:
        backward_s = 2 * compute_s + away * cost.transfer_s
        return compute_s + all_s + (backward_s if training else 0.0)
    if not training:
        return max(compute_s, all_s if away else 0.0)
    forward_s = cost.transfer_s + max(compute_s, all_s - cost.transfer_s)
    return forward_s + max(2 * compute_s, away * cost.transfer_s)
