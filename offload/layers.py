"""The weights of one layer, end to end in one piece of memory, at home or in a slot on the device."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import nn

from offload.copier import Mark
from offload.errors import StreamError
from offload.tier import Block, Tier

ALIGN_BYTES = 256
"""Where parameters begin, so that kernels find them as they would find tensors of their own."""


@dataclass(eq=False, slots=True)
class Slot:
    """A place for one layer on the device."""

    buffer: torch.Tensor
    free: Mark = None
    """Behind the last kernel that used what was here."""
    layer: LayerWeights | None = None


@dataclass(frozen=True, slots=True)
class _Place:
    name: str
    parameter: nn.Parameter
    start: int
    """In bytes."""
    num_bytes: int
    shape: torch.Size
    dtype: torch.dtype

    def of(self, memory: torch.Tensor) -> torch.Tensor:
        """Return the parameter's part of a piece of memory."""
        return memory[self.start : self.start + self.num_bytes].view(self.dtype).view(self.shape)


@dataclass(slots=True)
class _Fetch:
    """Where the way from home to a slot has got to."""

    future: Future[None] | None = None
    """A tier's read into `staging`; None: over, or not needed."""
    staging: torch.Tensor | None = None
    ready: Mark = None
    is_ready: bool = False


@dataclass(eq=False, slots=True)
class LayerWeights:
    """One layer: where its parameters are now. At rest they are at home, for optimizers and checkpoints."""

    index: int
    module: nn.Module
    places: list[_Place]
    num_bytes: int
    home: torch.Tensor | None = None
    """Memory of the host that the parameters share at rest; None: in `block` of a tier that has no addresses."""
    block: Block | None = None
    gradients: torch.Tensor | None = None
    """Memory of the host, laid out like the weights, made when the first gradient leaves."""
    slot: Slot | None = None
    fetch: _Fetch = field(default_factory=_Fetch)
    attached: bool = False
    versions: tuple[int, ...] = ()
    """Of the parameters when they were last let go; a change means that the slot's copy is old."""
    accumulated: set[nn.Parameter] = field(default_factory=set)
    """Parameters whose gradient at home is to be added to."""

    @property
    def name(self) -> str:
        """What traces and errors call it."""
        return f"layer {self.index}"

    @property
    def is_stale(self) -> bool:
        """Whether a parameter was changed at home since the slot was filled."""
        return self.versions != tuple(place.parameter._version for place in self.places)

    def attach(self) -> None:
        """Let the parameters be those in the slot; what gradients they had stay at home."""
        if self.attached:
            return
        assert self.slot is not None
        for place in self.places:
            if place.parameter.grad is not None:
                self.accumulated.add(place.parameter)
                place.parameter.grad = None
            place.parameter.data = place.of(self.slot.buffer)
        self.attached = True

    def detach(self) -> None:
        """Let the parameters, and the gradients that have landed, be those at home again."""
        if not self.attached:
            return
        for place in self.places:
            parameter = place.parameter
            # Of its shape without its memory where home has no addresses; NaN, should anybody compute with it.
            parameter.data = (
                place.of(self.home)
                if self.home is not None
                else torch.full((), float("nan"), dtype=place.dtype).expand(place.shape)
            )
            if parameter in self.accumulated:
                assert self.gradients is not None
                parameter.grad = place.of(self.gradients)
        self.accumulated.clear()
        self.versions = tuple(place.parameter._version for place in self.places)
        self.attached = False

    def leave(self, tier: Tier) -> None:
        """Bring the weights back from their block, which is freed, into memory of their own."""
        if self.block is None:
            return
        memory = torch.empty(self.num_bytes, dtype=torch.uint8)
        if self.home is not None:
            memory.copy_(self.home)
        else:
            tier.read(self.block, memory).result()
        self.home = memory
        for place in self.places:
            place.parameter.data = place.of(memory)
        tier.free(self.block)
        self.block = None

    def place_of(self, parameter: nn.Parameter) -> _Place:
        """Return where in the memory a parameter is."""
        return next(place for place in self.places if place.parameter is parameter)


def lay_out(index: int, module: nn.Module) -> LayerWeights:
    """Return a layer whose parameters have a place each and are still where they were.

    Raises:
        StreamError: it has no parameters, or some that have no memory to move.
    """
    if getattr(module, "_compiled_call_impl", None) is not None:
        raise StreamError(f"layer {index}: it is compiled, and compiled calls skip what streams it; compile its parts")
    places, end = [], 0
    for name, parameter in module.named_parameters():
        if parameter.device.type == "meta":
            raise StreamError(f"layer {index}: {name} has no values yet; materialise the model first")
        places.append(_Place(name, parameter, end, parameter.nbytes, parameter.shape, parameter.dtype))
        end += -(-parameter.nbytes // ALIGN_BYTES) * ALIGN_BYTES
    if not places:
        raise StreamError(f"layer {index}: it has no parameters to stream; leave it out")
    return LayerWeights(index, module, places, end)


def settle(layer: LayerWeights, memory: torch.Tensor) -> None:
    """Move the parameters' values to their places in a piece of memory of the host, which becomes their home."""
    for place in layer.places:
        place.of(memory).copy_(place.parameter.data)
        place.parameter.data = place.of(memory)
    layer.home = memory
    layer.versions = tuple(place.parameter._version for place in layer.places)


def settle_in(layer: LayerWeights, tier: Tier) -> None:
    """Move the parameters' values into a tier; they share its memory where it can be addressed."""
    block = tier.allocate(layer.num_bytes, layer.name)
    memory = tier.view(block)
    layer.block = block
    if memory is not None:
        settle(layer, memory)
        return
    packed = torch.zeros(layer.num_bytes, dtype=torch.uint8)
    settle(layer, packed)
    tier.write(block, packed).result()
    layer.home, layer.attached = None, True
    layer.detach()


def others_bytes(model: nn.Module, layers: Sequence[nn.Module], *, training: bool) -> int:
    """Return what stays on the device beside the layers: parameters, in training their gradients, buffers."""
    inside = {parameter for module in layers for parameter in module.parameters()}
    outside = [parameter for parameter in model.parameters() if parameter not in inside]
    gradients = [parameter for parameter in outside if training and parameter.requires_grad]
    return sum(tensor.nbytes for tensor in (*outside, *gradients, *model.buffers()))


def move_others(model: nn.Module, layers: Sequence[nn.Module], device: torch.device) -> None:
    """Move what is no parameter of a layer to the device."""
    inside = {parameter for module in layers for parameter in module.parameters()}
    for parameter in model.parameters():
        if parameter not in inside:
            parameter.data = parameter.data.to(device)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


def check_apart(layers: Sequence[LayerWeights]) -> None:
    """Raise StreamError where layers share a parameter."""
    seen: dict[nn.Parameter, str] = {}
    for layer in layers:
        for place in layer.places:
            if place.parameter in seen:
                raise StreamError(
                    f"{layer.name}: {place.name} is also a parameter of {seen[place.parameter]}; a parameter that "
                    "layers share stays on the device: leave it out of both"
                )
            seen[place.parameter] = layer.name
