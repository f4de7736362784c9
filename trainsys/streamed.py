"""A model on one rank of which a window of layers is on the device: parallel.data.DataParallel over a LayerStream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from offload import Trace
from offload.activations import Activations
from offload.streaming import LayerStream, fit
from parallel.data import Master
from parallel.shards import shard_of
from trainsys.config import RunConfig
from trainsys.models import blocks


class Streamed:
    """Weights, gradients and masters of blocks in CPU memory; what is no block on the device. One rank."""

    def __init__(
        self, module: nn.Module, config: RunConfig, target: tuple[torch.device, torch.dtype], trace: Trace | None
    ) -> None:
        """Take over the model, which is on the CPU, to compute on a device with masters in a dtype (`target`).

        Where the dtypes are one, masters share the weights' memory.
        """
        device, master_dtype = target
        self._parameters = dict(module.named_parameters())
        layers = blocks(module)
        self._activations = (
            Activations(layers, ["swap"] * len(layers), device=device) if config.offload.activations == "swap" else None
        )
        self.stream = _stream(module, config, device, saved=self._activations, trace=trace)
        self._is_apart = next(iter(self._parameters.values())).dtype != master_dtype
        self.masters: Sequence[Master] = [
            self._master(name, parameter, master_dtype) for name, parameter in self._parameters.items()
        ]

    def begin(self) -> None:
        """Nothing: gradients are added up where they arrive."""

    def micro_batch(self, is_last: bool) -> None:
        """Nothing: there is nobody to sum with."""

    def stage_finished(self, index: int) -> None:
        """Nothing: one rank has no pipeline."""

    def finish(self) -> None:
        """Leave the gradient in `grad` of every master."""
        for master in self.masters:
            gradient = self._parameters[master.name].grad
            if gradient is not None:
                master.tensor.grad = gradient.view(-1).to(master.tensor.dtype)
            elif master.tensor.requires_grad:  # unused in this step
                master.tensor.grad = torch.zeros_like(master.tensor)

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
        """End the stream; the weights stay in CPU memory."""
        self.stream.close()
        if self._activations is not None:
            self._activations.close()

    @torch.no_grad()
    def _master(self, name: str, parameter: nn.Parameter, dtype: torch.dtype) -> Master:
        weight = parameter.detach().view(-1)
        return Master(
            name=name,
            shard=shard_of(parameter),
            tensor=nn.Parameter(weight.to(dtype), requires_grad=parameter.requires_grad),
            start=0,
            weight=weight,
            parts=(),
            copy=0,
            num_copies=1,
        )


def _stream(module: nn.Module, config: RunConfig, device: torch.device, **kept: Any) -> LayerStream:
    layers, settings = blocks(module), config.offload
    if settings.device_bytes:
        return fit(module, layers, device=device, budget_bytes=settings.device_bytes, **kept)
    return LayerStream(module, layers, device=device, window=settings.window_layers, **kept)
