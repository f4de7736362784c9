"""A model of which a window of layers is on the device: parallel.data.DataParallel over a LayerStream.

Replicas stream the same layers. In the last micro-batch of a step the gradients of each layer are summed as soon as
they are in CPU memory, from the last layer to the first, while backward goes on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import distributed as dist
from torch import nn

from offload import Trace
from offload.activations import Activations
from offload.streaming import LayerStream, fit
from parallel.data import Master, copies, holders
from parallel.groups import MeshGroups
from parallel.shards import shard_of
from trainsys.config import RunConfig
from trainsys.models import blocks


class Streamed:
    """Weights, gradients and masters of blocks in CPU memory; what is no block on the device. Plain replicas."""

    def __init__(
        self,
        module: nn.Module,
        config: RunConfig,
        groups: MeshGroups,
        target: tuple[torch.device, torch.dtype],
        trace: Trace | None,
    ) -> None:
        """Take over the model, which is on the CPU, to compute on a device with masters in a dtype (`target`).

        Where the dtypes are one, masters share the weights' memory. Every rank calls.
        """
        device, self._dtype = target
        self._groups = groups
        self._parameters = dict(module.named_parameters())
        layers = blocks(module)
        self._activations = (
            Activations(layers, ["swap"] * len(layers), device=device) if config.offload.activations == "swap" else None
        )
        self.host_group: dist.ProcessGroup | None = None
        """Sums what is in CPU memory, of all ranks; None: there is one."""
        if groups.mesh.world_size > 1:
            self.host_group = dist.new_group(backend="gloo", timeout=timedelta(seconds=config.engine.timeout_s))
        kept = {"saved": self._activations, "trace": trace, "landed": self._landed if self.host_group else None}
        self.stream = _stream(module, config, device, **kept)
        self._is_last = False
        self._sums: dict[nn.Parameter, torch.Tensor] = {}
        self._works: list[dist.Work] = []
        self._is_apart = next(iter(self._parameters.values())).dtype != self._dtype
        self.masters: Sequence[Master] = [self._master(name, each) for name, each in self._parameters.items()]
        self._tensors = {self._parameters[master.name]: master.tensor for master in self.masters}

    def begin(self) -> None:
        """Start a step; of one that was broken off nothing counts."""
        self._is_last = False
        self._works.clear()
        self._sums.clear()

    def micro_batch(self, is_last: bool) -> None:
        """Say before each forward whether it is the last of the step: gradients are added up until then."""
        self._is_last = is_last

    def stage_finished(self, index: int) -> None:
        """Nothing: replicas have no pipeline."""

    def finish(self) -> None:
        """Leave the summed gradient in `grad` of every master."""
        for parameter in self._parameters.values():
            if parameter.requires_grad and parameter not in self._sums:
                self._sum(parameter, parameter.grad, self._groups.get(*holders(shard_of(parameter))))
        for work in self._works:
            work.wait()
        for master in self.masters:
            master.tensor.grad = self._sums.get(self._parameters[master.name])
        self._works.clear()
        self._sums.clear()

    def _landed(self, index: int, gradients: Mapping[nn.Parameter, torch.Tensor | None]) -> None:
        """Begin to sum the gradients of a layer over the ranks, all of which come to it in one order."""
        assert self.host_group is not None
        if self._is_last:
            for parameter, gradient in gradients.items():
                self._sum(parameter, gradient, self.host_group)

    @torch.no_grad()
    def _sum(self, parameter: nn.Parameter, gradient: torch.Tensor | None, group: dist.ProcessGroup) -> None:
        """Begin to sum a gradient in the masters' dtype; without one it was not used in this step, on this rank."""
        if gradient is None:  # beside the master: the parameter itself may be in a slot of the device now
            self._sums[parameter] = torch.zeros_like(self._tensors[parameter])
        else:
            self._sums[parameter] = gradient.to(self._dtype).view(-1)
        if group.size() > 1:
            work = dist.all_reduce(self._sums[parameter], group=group, async_op=True)
            assert work is not None
            self._works.append(work)

    @torch.no_grad()
    def refresh(self) -> None:
        """Drop the gradients, and let forward see what was written to the masters."""
        for master in self.masters:
            master.tensor.grad = None
            self._parameters[master.name].grad = None
            if self._is_apart:
                master.weight.copy_(master.tensor)
        self.stream.release()

    def close(self) -> None:
        """End the stream and the group; the weights stay in CPU memory."""
        self.stream.close()
        if self.host_group is not None:
            dist.destroy_process_group(self.host_group)
            self.host_group = None
        if self._activations is not None:
            self._activations.close()

    @torch.no_grad()
    def _master(self, name: str, parameter: nn.Parameter) -> Master:
        weight, shard = parameter.detach().view(-1), shard_of(parameter)
        copy, num_copies = copies(self._groups.mesh, self._groups.rank, shard, holders(shard))
        return Master(
            name=name,
            shard=shard,
            tensor=nn.Parameter(weight.to(self._dtype), requires_grad=parameter.requires_grad),
            start=0,
            weight=weight,
            parts=(),
            copy=copy,
            num_copies=num_copies,
        )


def _stream(module: nn.Module, config: RunConfig, device: torch.device, **kept: Any) -> LayerStream:
    layers, settings = blocks(module), config.offload
    if settings.device_bytes:
        return fit(module, layers, device=device, budget_bytes=settings.device_bytes, **kept)
    return LayerStream(module, layers, device=device, window=settings.window_layers, **kept)
