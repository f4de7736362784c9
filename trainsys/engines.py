"""What trains a model on this rank: one contract, DeepSpeed's engine and torch's behind it.

An engine is given this rank's part of a model, whatever parallel.hybrid made of it, and owns its gradients, their
reduction over the ranks that hold the same parameters, and the optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from trainsys.check import backend_of
from trainsys.config import RunConfig
from trainsys.data import MicroBatch, StepBatch
from trainsys.partition import Slices

if TYPE_CHECKING:
    from parallel.hybrid import Hybrid
    from trainsys.meter import Phases


DTYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""What `engine.precision` names."""


@dataclass(frozen=True, slots=True)
class Update:
    """What one optimizer step did."""

    gradient_norm: float
    """L2 norm over all parameters and ranks before clipping; not finite where fp16 overflowed."""
    applied: bool
    """False where fp16 overflowed and the step was skipped."""
    loss_scale: float


@dataclass(frozen=True, slots=True)
class Shares:
    """How the loss of a step is divided: a micro-batch back-propagates its share, and shares are summed."""

    total_targets: int
    """Targets of the step over all ranks."""
    num_shares: int
    """Micro-batches of the step over all ranks that have tokens of their own: auxiliary losses are averaged."""

    @property
    def loss_factor(self) -> float:
        """What the summed token loss of a micro-batch counts."""
        return 1 / max(self.total_targets, 1)  # an all-masked step has no targets, and no loss either

    @property
    def auxiliary_factor(self) -> float:
        """What the auxiliary loss of a micro-batch counts."""
        return 1 / self.num_shares

    def of(self, loss: Tensor, auxiliary: Tensor) -> Tensor:
        """Return the share of a micro-batch with this summed token loss and this auxiliary loss."""
        return loss / max(self.total_targets, 1) + auxiliary / self.num_shares


class Fencing(Protocol):
    """What fences before updates: a checkpoint.Checkpointer."""

    def fence_on(self, target: Any) -> object:
        """Fence before every update of an engine."""


class Engine(Protocol):
    """Forward, backward and update of one model on this rank; every rank calls every method."""

    @property
    def module(self) -> nn.Module:
        """This rank's part of the model; under ZeRO 3 its parameters are empty outside of forward and backward."""

    @property
    def device(self) -> torch.device:
        """Where losses are."""

    def train(self, batch: StepBatch, shares: Shares, phases: Phases) -> Tensor:
        """Run forward and backward of this rank's micro-batches; gradients are summed over micro-batches and ranks.

        Returns this rank's (summed token losses, summed auxiliary losses), float64 [2] on `device`; they add up over
        all ranks, so a rank that shares its tokens with others and is not the one to tell returns zeros.
        """

    def evaluate(self, micro: MicroBatch) -> Tensor:
        """Return what `train` does of one micro-batch, without gradients; the module is in evaluation mode."""

    def update(self, lr_factor: float) -> Update:
        """Clip, step the optimizer at `lr_factor` times each group's peak rate, clear gradients.

        Raises:
            NumericsError: the gradient norm is not finite (except where fp16's loss scaling handles it).
        """

    def slices(self) -> Slices:
        """Return live views of this rank's weights and optimizer state, by logical name; see trainsys.partition."""

    def fence_with(self, checkpointer: Fencing) -> None:
        """Let a checkpointer fence before every update, for just what that updates."""

    def counters(self) -> dict[str, float]:
        """Return the numbers that go with `slices`: `steps_taken` (updates applied) and the loss scaler's."""

    def after_load(self, counters: Mapping[str, float]) -> None:
        """Finish a load that overwrote `slices()`: restore `counters` and refresh what is cached of the weights."""

    def close(self) -> None:
        """Release hooks and buffers; the model stays."""


BuildOptimizer = Callable[[nn.Module], torch.optim.Optimizer]
"""The optimizer over a module's parameters, its groups with `initial_lr` and `kind`; see trainsys.optim."""


def open_engine(hybrid: Hybrid, config: RunConfig, build_optimizer: BuildOptimizer) -> Engine:
    """Return the engine that `config.engine.backend` and the layout call for, over this rank's part of the model."""
    if backend_of(config) == "torch":
        from trainsys.native import TorchEngine

        return TorchEngine(hybrid, config, build_optimizer)
    from trainsys.engine import DeepSpeedEngine

    return DeepSpeedEngine(hybrid, config, build_optimizer)
