"""One optimizer step, and one evaluation: the arithmetic of the loss across micro-batches and ranks.

The loss of a step is the sum of its tokens' losses over the number of its targets, both over all ranks and
micro-batches. Each rank back-propagates its share and gradients are summed, so packing, masked targets and uneven
micro-batches weigh every token the same.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F

from trainsys.data import IGNORE, MicroBatch, StepBatch
from trainsys.errors import NumericsError

if TYPE_CHECKING:
    from trainsys.engine import Engine
    from trainsys.meter import Phases


@dataclass(frozen=True, slots=True)
class StepStats:
    """What one optimizer step did, the same on every rank."""

    loss: float
    """Mean over the step's targets, nats per token, without auxiliary losses."""
    auxiliary_loss: float
    """Mean over micro-batches, already weighted (load balancing of experts)."""
    num_targets: int
    learning_rate: float
    gradient_norm: float
    loss_scale: float
    applied: bool
    step_s: float
    phase_s: dict[str, float]
    """Seconds in data, forward, backward and update; on this rank."""


def agree(control: dist.ProcessGroup, num_targets: int, stop: bool) -> tuple[int, bool]:
    """Return (targets over all ranks, whether any rank was asked to stop); one small collective on CPU."""
    votes = torch.tensor([num_targets, int(stop)], dtype=torch.int64)
    dist.all_reduce(votes, group=control)
    return int(votes[0]), bool(votes[1])


def token_losses(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Return the summed cross-entropy in fp32, nats; targets of `IGNORE` count nothing."""
    return F.cross_entropy(logits_BTV.float().flatten(0, 1), targets_BT.flatten(), ignore_index=IGNORE, reduction="sum")


def train_step(
    engine: Engine,
    batch: StepBatch,
    *,
    total_targets: int,
    lr: tuple[float, float],
    control: dist.ProcessGroup,
    phases: Phases,
) -> StepStats:
    """Run forward, backward and update over this rank's micro-batches of one step.

    `total_targets` counts the targets of all ranks (from `agree`); `lr` is (factor of the peak, rate to report);

    Raises:
        NumericsError: the loss is not finite; on every rank alike.
    """
    started = time.perf_counter()
    shares = control.size() * len(batch.micro_batches)
    summed = torch.zeros(2, dtype=torch.float64, device=engine.device)  # read once: reading makes the host wait
    for micro in batch.micro_batches:
        with phases("forward"):
            loss, auxiliary = _forward(engine, micro)
            # An all-masked step has no targets; its gradient is the auxiliary loss alone.
            share = loss / max(total_targets, 1) + auxiliary / shares
        with phases("backward"):
            engine.backward(share)
        summed += torch.stack((loss.detach(), auxiliary.detach()))
    with phases("update"):
        sums = summed.cpu()
        dist.all_reduce(sums, group=control)
        mean = float(sums[0]) / max(total_targets, 1)
        if not torch.isfinite(sums).all():
            raise NumericsError(f"the loss is {mean}; lower the learning rate, or inspect the batch of this step")
        update = engine.update(lr[0])
    return StepStats(
        loss=mean,
        auxiliary_loss=float(sums[1]) / shares,
        num_targets=total_targets,
        learning_rate=lr[1],
        gradient_norm=update.gradient_norm,
        loss_scale=update.loss_scale,
        applied=update.applied,
        step_s=time.perf_counter() - started,
        phase_s=phases.take(),
    )


def evaluate(engine: Engine, batches: Iterable[MicroBatch], control: dist.ProcessGroup) -> tuple[float, int]:
    """Return (mean loss in nats per token, targets) over the validation batches of all ranks.

    Every rank must bring the same number of batches, because ZeRO 3 gathers weights in each forward.
    """
    summed, num_targets = torch.zeros((), dtype=torch.float64, device=engine.device), 0
    engine.module.eval()
    with torch.no_grad():
        for batch in batches:
            loss, _ = _forward(engine, batch)
            summed += loss
            num_targets += batch.num_targets
    engine.module.train()
    sums = torch.tensor([float(summed), num_targets], dtype=torch.float64)
    dist.all_reduce(sums, group=control)
    return float(sums[0] / sums[1].clamp(min=1)), int(sums[1])


def _forward(engine: Engine, micro: MicroBatch) -> tuple[Tensor, Tensor]:
    """Return (summed token loss, weighted auxiliary loss) of one micro-batch."""
    device = engine.device
    logits_BTV, auxiliary = engine(
        micro.tokens.to(device, non_blocking=True),
        positions_BT=None if micro.positions is None else micro.positions.to(device, non_blocking=True),
        document_ids_BT=None if micro.document_ids is None else micro.document_ids.to(device, non_blocking=True),
    )
    return token_losses(logits_BTV, micro.targets.to(device, non_blocking=True)), auxiliary.float()
