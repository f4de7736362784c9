"""One optimizer step, and one evaluation: the arithmetic of the loss across micro-batches and ranks.

The loss of a step is the sum of its tokens' losses over the number of its targets, both over all ranks and
micro-batches. Each rank back-propagates its share and gradients are summed, so packing, masked targets and uneven
micro-batches weigh every token the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import distributed as dist

from trainsys.data import MicroBatch, StepBatch
from trainsys.engines import Engine, Shares
from trainsys.errors import NumericsError

if TYPE_CHECKING:
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
    """Seconds in data, forward, backward (`pipeline` for both of a pipeline) and update; on this rank."""


class Agreed(NamedTuple):
    """What the ranks know of one another before a step."""

    num_targets: int
    """Of all ranks."""
    stop: bool
    """Whether any rank was asked to stop."""
    probe: bool
    """Whether any rank was asked for the delays of its links."""


def agree(
    control: dist.ProcessGroup, num_targets: int, stop: bool, *, probe: bool = False, tells: bool = True
) -> Agreed:
    """Tell all ranks what this one has and was asked for, in one small collective on CPU; return what they agree on.

    Of the ranks that have the same sequences one `tells` of its targets.
    """
    votes = torch.tensor([num_targets if tells else 0, int(stop), int(probe)], dtype=torch.int64)
    dist.all_reduce(votes, group=control)
    return Agreed(int(votes[0]), bool(votes[1]), bool(votes[2]))


def train_step(
    engine: Engine,
    batch: StepBatch,
    *,
    total_targets: int,
    data_ranks: int,
    lr: tuple[float, float],
    control: dist.ProcessGroup,
    phases: Phases,
    inspect: Callable[[], object] = lambda: None,
) -> StepStats:
    """Run forward, backward and update over this rank's micro-batches of one step.

    `total_targets` counts the targets of all ranks (from `agree`), `data_ranks` the ranks that have sequences of their
    own; `lr` is (factor of the peak, rate to report). `inspect` is called before anything is updated.

    Raises:
        NumericsError: the loss is not finite; on every rank alike.
    """
    started = time.perf_counter()
    shares = Shares(total_targets, data_ranks * len(batch.micro_batches))
    sums = engine.train(batch, shares, phases)
    with phases("update"):
        sums = sums.cpu()
        dist.all_reduce(sums, group=control)
        mean = float(sums[0]) / max(total_targets, 1)
        if not torch.isfinite(sums).all():
            raise NumericsError(f"the loss is {mean}; lower the learning rate, or inspect the batch of this step")
        inspect()
        update = engine.update(lr[0])
    return StepStats(
        loss=mean,
        auxiliary_loss=float(sums[1]) / shares.num_shares,
        num_targets=total_targets,
        learning_rate=lr[1],
        gradient_norm=update.gradient_norm,
        loss_scale=update.loss_scale,
        applied=update.applied,
        step_s=time.perf_counter() - started,
        phase_s=phases.take(),
    )


def evaluate(
    engine: Engine, batches: Iterable[MicroBatch], control: dist.ProcessGroup, *, tells: bool = True
) -> tuple[float, int]:
    """Return (mean loss in nats per token, targets) over the validation batches of all ranks.

    Every rank must bring the same number of batches, because ZeRO 3 gathers weights in each forward. Of the ranks that
    have the same sequences one `tells` of its targets.
    """
    summed, num_targets = torch.zeros(2, dtype=torch.float64, device=engine.device), 0
    engine.module.eval()
    for batch in batches:
        summed += engine.evaluate(batch)
        num_targets += batch.num_targets
    engine.module.train()
    sums = torch.tensor([float(summed[0]), num_targets if tells else 0], dtype=torch.float64)
    dist.all_reduce(sums, group=control)
    return float(sums[0] / sums[1].clamp(min=1)), int(sums[1])
