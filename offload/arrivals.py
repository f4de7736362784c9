"""Gradients of streamed layers on their way home: each leaves the device when it is there, and is added to what has."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import nn

from offload.copier import Copier, Mark
from offload.errors import StreamError
from offload.layers import LayerWeights

Landed = Callable[[int, Mapping[nn.Parameter, torch.Tensor | None]], None]
"""Gets a layer's number and its gradients at home, None where no backward gave one; see LayerStream."""


class Arrivals:
    """What becomes of the gradients of one backward after another; they are at home when `finish` returns."""

    def __init__(
        self,
        layers: Sequence[LayerWeights],
        copier: Copier,
        memory: Callable[[int], torch.Tensor],
        *,
        on_device: bool,
        landed: Landed | None,
    ) -> None:
        """`memory` gives bytes of the host, locked where copies need it; with `on_device` gradients leave a GPU."""
        self._layers, self._copier, self._memory, self._on_device = layers, copier, memory, on_device
        self._landed = landed
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="stream-add")
        self._adding: deque[tuple[torch.Tensor, Future[None]]] = deque()
        self._leaving: dict[int, list[Mark]] = {}
        self._landing: list[Future[None]] = []
        self._missing: dict[int, set[nn.Parameter]] = {}
        self._next = -1
        self.begin()

    def begin(self) -> None:
        """Expect every gradient of every layer."""
        self._next = len(self._layers) - 1
        if self._landed is not None:
            self._missing = {
                layer.index: {place.parameter for place in layer.places if place.parameter.requires_grad}
                for layer in self._layers
            }

    def came(self, layer: LayerWeights, parameter: nn.Parameter) -> None:
        """Send a gradient home as soon as it is there."""
        gradient = parameter.grad
        if gradient is None:
            return
        place = layer.place_of(parameter)
        if self._landed is not None and layer.index > self._next:
            raise StreamError(
                f"{layer.name}: {place.name} got another gradient in one backward, after its layer's were handed on; "
                "use a parameter in one graph alone, without reentrant checkpoints"
            )
        parameter.grad = None
        if layer.gradients is None:
            layer.gradients = self._memory(layer.num_bytes)
        target = place.of(layer.gradients)
        if parameter in layer.accumulated:
            self._add(target, gradient, layer.name)
        else:
            self._leaving.setdefault(layer.index, []).append(self._copier.down(target, gradient, name=layer.name))
            layer.accumulated.add(parameter)
        if self._landed is not None:
            self._missing[layer.index].discard(parameter)
            while self._next >= 0 and not self._missing[self._next]:
                self._land(self._landed)

    def finish(self) -> None:
        """Wait until all gradients are at home, and the layers that miss some are handed on too."""
        if self._landed is not None:
            while self._next >= 0:
                self._land(self._landed)
        self._settle()
        errors = [error for future in self._landing if (error := future.exception()) is not None]
        self._landing.clear()
        self.begin()
        if errors:
            self._forget()
            raise errors[0]

    def abandon(self) -> None:
        """Forget a backward that has raised, with all gradients, of which some have come and others not."""
        self._settle()
        for future in self._landing:
            future.exception()  # what backward raised is told already
        self._landing.clear()
        self._forget()
        self.begin()

    def close(self) -> None:
        """End the thread."""
        self._worker.shutdown()

    def _forget(self) -> None:
        for layer in self._layers:
            layer.accumulated.clear()
            for place in layer.places:
                place.parameter.grad = None

    def _settle(self) -> None:
        for marks in self._leaving.values():
            for mark in marks:
                self._copier.finish(mark)
        self._leaving.clear()
        for _, future in self._adding:
            future.result()

    def _land(self, landed: Landed) -> None:
        """Hand on the gradients of the next layer when they are at home; always in one order, from the last layer."""
        layer = self._layers[self._next]
        self._next -= 1
        marks = self._leaving.pop(layer.index, [])
        gradients: dict[nn.Parameter, torch.Tensor | None] = {}
        for place in layer.places:
            if place.parameter.requires_grad:
                is_here = place.parameter in layer.accumulated
                gradients[place.parameter] = (
                    place.of(layer.gradients) if is_here and layer.gradients is not None else place.parameter.grad
                )

        def hand_on() -> None:  # behind the additions, in their thread
            for mark in marks:
                self._copier.finish(mark)
            landed(layer.index, gradients)

        self._landing.append(self._worker.submit(hand_on))

    def _add(self, target: torch.Tensor, gradient: torch.Tensor, name: str) -> None:
        """Add a gradient to one at home, in its dtype, as the device would."""
        if not self._on_device:
            target.add_(gradient)
            return
        if len(self._adding) == 2:  # so much locked memory, and no more
            staging, previous = self._adding.popleft()
            previous.result()
        else:
            staging = self._memory(max(layer.num_bytes for layer in self._layers))
        landed = staging[: gradient.nbytes].view(gradient.dtype).view(gradient.shape)
        mark = self._copier.down(landed, gradient, name=name)

        def add() -> None:
            self._copier.finish(mark)
            target.add_(landed)

        self._adding.append((staging, self._worker.submit(add)))
