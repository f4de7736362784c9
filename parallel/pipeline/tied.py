"""One parameter on two stages of a pipeline: the embedding of the first, the head of the last."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup

from parallel.errors import PipelineError


class Tied:
    """A copy of a parameter that another rank has too; both get the sum of both gradients, and so stay bit-equal.

    `group` holds the two ranks; its communicator serves nothing else while a step runs. `stage` is the stage of this
    copy. Stages of one rank share the parameter itself and need no `Tied`.

    Raises: PipelineError if the group has not two ranks.
    """

    def __init__(self, parameter: nn.Parameter, stage: int, group: ProcessGroup) -> None:
        if group.size() != 2:
            raise PipelineError(f"parallel.pipeline: a parameter is tied between two ranks, not {group.size()}")
        self.parameter, self.stage, self._group = parameter, stage, group
        self._work: dist.Work | None = None

    @property
    def is_counted(self) -> bool:
        """Whether this copy counts where each parameter counts once, as in the norm of all gradients."""
        return self._group.rank() == 0

    @torch.no_grad()
    def start(self) -> None:
        """Begin to sum the gradients, in place; called when this stage's are complete."""
        if self.parameter.grad is None:
            self.parameter.grad = torch.zeros_like(self.parameter)
        self._work = dist.all_reduce(self.parameter.grad, group=self._group, async_op=True)

    def finish(self) -> None:
        """Wait until the gradient is the sum (with NCCL: let the stream wait)."""
        if self._work is not None:
            self._work.wait()
            self._work = None

    @torch.no_grad()
    def align(self) -> None:
        """Copy the parameter of the lower rank to the other one; for weights that were not made alike."""
        dist.broadcast(self.parameter, group=self._group, group_src=0)
