"""Weights and optimizer state of a DeepSpeed engine as named slices, whatever the ZeRO stage.

Every tensor gets a name in *logical* coordinates (parameter name, range of its flattened elements), so that a
checkpoint does not depend on the number of ranks or the stage that wrote it:

    model.<parameter>              weights in the training precision
    optimizer.master.<parameter>   fp32 master weights (bf16 and fp16 only; in fp32 the weights are the master)
    optimizer.<key>.<parameter>    one per tensor of the optimizer's state (exp_avg, exp_avg_sq, momentum_buffer)

A parameter of a parallel layer is one rank's part of the whole one (trainsys.placement says which), and ZeRO partitions
that part. The three classes differ in where ZeRO keeps these; they touch DeepSpeed 0.19 objects by attribute and import
nothing of it. Tensors returned are live views: writing to them is how a checkpoint is loaded, and their version
counters are those of the tensors that training mutates.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from checkpoint.state import TensorLike
from trainsys.placement import Placement

STATE_KEYS: Mapping[str, tuple[str, ...]] = {"adamw": ("exp_avg", "exp_avg_sq"), "muon": ("momentum_buffer",)}
"""Tensors a parameter group's optimizer keeps per element, by the group's `kind`."""

Slices = dict[str, TensorLike]


@dataclass(frozen=True, slots=True)
class Fragment:
    """The part of one parameter whose optimizer state this rank owns."""

    name: str
    shape: tuple[int, ...]
    """Of the local parameter."""
    start: int
    """First element, in the flattened local parameter."""
    offset: int
    """First element, in the tensor that the optimizer holds for it."""
    master: Tensor
    """fp32 weights, 1-D; shares memory with what the optimizer updates."""
    state: Mapping[str, Tensor]
    """The optimizer's tensors for these elements, 1-D."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where this rank's part of one parameter lies."""

    name: str
    shape: tuple[int, ...]
    """Of the local parameter."""
    start: int
    """First element, in the flattened local parameter."""
    offset: int
    """First element, in the tensor that the optimizer holds for it."""
    numel: int
    """Elements; 0 where other ranks own it."""

    def fragment(self, flat: Tensor, state: Mapping[str, Tensor]) -> Fragment:
        """Return what lies there of the fp32 weights and of the optimizer's tensors."""
        kept = {key: tensor.narrow(0, self.offset, self.numel) for key, tensor in state.items()}
        master = flat.detach().narrow(0, self.offset, self.numel)
        return Fragment(self.name, self.shape, self.start, self.offset, master, kept)


@dataclass(frozen=True, slots=True)
class Gradient:
    """The reduced gradient that this rank holds of one parameter, before the update."""

    name: str
    shape: tuple[int, ...]
    """Of the local parameter."""
    start: int | None
    """First element, in the flattened local parameter; None: all of it, in its shape."""
    tensor: Tensor
    """1-D with a start; shares memory with what the update reads."""


class Partition(ABC):
    """State of one engine; `partition_of` picks the class for its ZeRO stage."""

    partitioned: bool = True
    """Whether ranks that hold the same parameters share their optimizer state and reduced gradients."""

    def __init__(self, module: nn.Module, optimizer: Any, placement: Placement, *, separate_master: bool) -> None:
        self._module = module
        self._optimizer = optimizer
        self._placement = placement
        self._separate_master = separate_master
        self._names: dict[Tensor, str] = {parameter: name for name, parameter in module.named_parameters()}

    @abstractmethod
    def weights(self) -> Slices:
        """Return this rank's part of every parameter and persistent buffer, by name."""

    @abstractmethod
    def groups(self) -> Iterator[tuple[dict[str, Any], list[Tensor]]]:
        """Yield each optimizer parameter group with the tensors the optimizer holds state for."""

    @abstractmethod
    def held(self) -> Iterator[tuple[dict[str, Any], Tensor, list[Fragment]]]:
        """Yield (group, tensor, what lies in it of which parameter) for every tensor the optimizer holds.

        The same tensors in the same order on every rank; call `create_state` first.
        """

    @abstractmethod
    def gradients(self) -> Iterator[Gradient]:
        """Yield what this rank holds of the reduced gradients, between the last backward and the update."""

    @abstractmethod
    def after_load(self) -> None:
        """Bring what ZeRO caches of the weights in line with tensors that were just overwritten."""

    def fragments(self) -> Iterator[Fragment]:
        """Yield what this rank owns of each parameter's optimizer state, empty where it owns nothing."""
        self.create_state()
        for _, _, fragments in self.held():
            yield from fragments

    def slices(self) -> Slices:
        """Return weights and optimizer state of this rank, by name."""
        found = self.weights()
        for fragment in self.fragments():
            kept = {"master": fragment.master} if self._separate_master else {}
            for key, flat in {**kept, **fragment.state}.items():
                place = self._placement.part_of(fragment.name, flat, fragment.shape, fragment.start)
                found[f"optimizer.{key}.{fragment.name}"] = place
        return found

    def create_state(self) -> None:
        """Create the optimizer state that the first step would create, as zeros, where it is missing."""
        for group, holders in self.groups():
            for holder in holders:
                state = self._base_optimizer.state[holder]
                for key in STATE_KEYS[group["kind"]]:
                    if key not in state:
                        state[key] = torch.zeros_like(holder, memory_format=torch.preserve_format)
                if group["kind"] == "adamw" and "step" not in state:
                    state["step"] = torch.zeros((), dtype=torch.float32, device=holder.device)

    def set_steps_taken(self, steps: float) -> None:
        """Set the update count that bias correction uses."""
        self.create_state()
        for _, holders in self.groups():
            for holder in holders:
                state = self._base_optimizer.state[holder]
                if "step" in state:
                    state["step"].fill_(steps)

    @property
    def _base_optimizer(self) -> Any:
        """The torch optimizer inside ZeRO's wrapper."""
        return getattr(self._optimizer, "optimizer", self._optimizer)

    def _whole_weights(self) -> Slices:
        """Return parameters that no rank shares with another, and the buffers."""
        parameters = {name: parameter.detach() for parameter, name in self._names.items()}
        return {f"model.{name}": self._placement.all_of(name, tensor) for name, tensor in parameters.items()} | (
            self._buffers()
        )

    def _buffers(self) -> Slices:
        parameters = {name for name, _ in self._module.named_parameters(remove_duplicate=False)}
        state = self._module.state_dict(keep_vars=True)
        buffers = {name: tensor for name, tensor in state.items() if name not in parameters}
        return {f"model.{name}": self._placement.all_of(name, tensor) for name, tensor in buffers.items()}


class Replicated(Partition):
    """ZeRO 0: every rank holds everything."""

    partitioned = False

    def weights(self) -> Slices:
        return self._whole_weights()

    def groups(self) -> Iterator[tuple[dict[str, Any], list[Tensor]]]:
        for group in self._base_optimizer.param_groups:
            yield group, group["params"]

    def slices(self) -> Slices:
        self.create_state()
        found = self.weights()
        for group, holders in self.groups():
            for holder in holders:
                for key in STATE_KEYS[group["kind"]]:
                    name, state = self._names[holder], self._base_optimizer.state[holder][key]
                    found[f"optimizer.{key}.{name}"] = self._placement.all_of(name, state)
        return found

    def gradients(self) -> Iterator[Gradient]:
        for parameter, name in self._names.items():
            if parameter.grad is not None:
                yield Gradient(name, tuple(parameter.shape), None, parameter.grad)

    def held(self) -> Iterator[tuple[dict[str, Any], Tensor, list[Fragment]]]:
        for group, holders in self.groups():
            for holder in holders:
                state = self._base_optimizer.state[holder]
                kept = {key: state[key].view(-1) for key in STATE_KEYS[group["kind"]]}
                master = holder.detach().view(-1)
                yield group, holder, [Fragment(self._names[holder], tuple(holder.shape), 0, 0, master, kept)]

    def after_load(self) -> None:
        return


class Sharded(Partition):
    """ZeRO 1 and 2: each rank owns one contiguous range of every group's flattened parameters."""

    def weights(self) -> Slices:
        return self._whole_weights()

    def groups(self) -> Iterator[tuple[dict[str, Any], list[Tensor]]]:
        for group in self._base_optimizer.param_groups:
            yield group, group["params"]

    def held(self) -> Iterator[tuple[dict[str, Any], Tensor, list[Fragment]]]:
        for (group, (flat,)), places in zip(self.groups(), self._places, strict=True):
            kept = {key: self._base_optimizer.state[flat][key] for key in STATE_KEYS[group["kind"]]}
            yield group, flat, [place.fragment(flat, kept) for place in places]

    def gradients(self) -> Iterator[Gradient]:
        for index, ((_, (flat,)), places) in enumerate(zip(self.groups(), self._places, strict=True)):
            owned = {place.offset: place for place in places if place.numel}
            if flat.grad is not None:  # offload keeps gradients beside the fp32 weights
                held = {offset: flat.grad.narrow(0, offset, place.numel) for offset, place in owned.items()}
            else:  # tensors that make up the range, a parameter or padding each
                tensors = self._optimizer.averaged_gradients[index]
                ends = itertools.accumulate((tensor.numel() for tensor in tensors), initial=0)
                held = {offset: tensor.view(-1) for offset, tensor in zip(ends, tensors, strict=False)}
            for offset, place in owned.items():
                yield Gradient(place.name, place.shape, place.start, held[offset])

    @cached_property
    def _places(self) -> list[list[Place]]:
        """What lies in each flat tensor."""
        return [
            [Place(self._names[p], tuple(p.shape), *self._place(p._hp_mapping)) for p in group]
            for group in self._optimizer.bit16_groups
        ]

    def after_load(self) -> None:
        if self._separate_master:
            return
        weights = {name: parameter.detach() for parameter, name in self._names.items()}
        for fragment in self.fragments():
            whole = weights[fragment.name]
            _copy(whole.reshape(-1).narrow(0, fragment.start, fragment.master.numel()), fragment.master)

    @staticmethod
    def _place(mapping: Any) -> tuple[int, int, int]:
        """Return (first element in the parameter, first element in this rank's range, elements)."""
        if mapping is None:  # this rank owns none of it
            return 0, 0, 0
        inside = mapping.hp_fragment_address
        return mapping.lp_fragment_address.start, inside.start, inside.numel


class FullySharded(Partition):
    """ZeRO 3: each rank owns one range of every parameter, grouped into sub-groups."""

    def weights(self) -> Slices:
        found: Slices = {}
        for parameter, name in self._names.items():
            start, _ = self._range(parameter)
            shape = tuple(parameter.ds_shape)  # type: ignore[attr-defined]
            found[f"model.{name}"] = self._placement.part_of(name, self._own(parameter), shape, start)
        return found | self._buffers()

    def groups(self) -> Iterator[tuple[dict[str, Any], list[Tensor]]]:
        zero = self._optimizer
        for index, flat in enumerate(zero.fp32_partitioned_groups_flat):
            yield self._base_optimizer.param_groups[zero.sub_group_to_group_id[index]], [flat]

    def held(self) -> Iterator[tuple[dict[str, Any], Tensor, list[Fragment]]]:
        for (group, (flat,)), places in zip(self.groups(), self._places, strict=True):
            kept = {key: self._base_optimizer.state[flat][key] for key in STATE_KEYS[group["kind"]]}
            yield group, flat, [place.fragment(flat, kept) for place in places]

    def gradients(self) -> Iterator[Gradient]:
        for index, ((_, (flat,)), places) in enumerate(zip(self.groups(), self._places, strict=True)):
            for number, place in enumerate(places):
                if flat.grad is not None:  # offload keeps gradients beside the fp32 weights
                    held = flat.grad.narrow(0, place.offset, place.numel)
                else:
                    held = self._optimizer.averaged_gradients[index][number].view(-1).narrow(0, 0, place.numel)
                yield Gradient(place.name, place.shape, place.start, held)

    @cached_property
    def _places(self) -> list[list[Place]]:
        """What lies in each flat tensor."""
        zero = self._optimizer
        found = []
        for group in zero.fp16_groups:
            places = []
            for parameter in group:
                _, offset, _ = zero.grad_position[zero.get_param_id(parameter)]
                start, length = self._range(parameter)
                places.append(Place(self._names[parameter], tuple(parameter.ds_shape), start, offset, length))
            found.append(places)
        return found

    def after_load(self) -> None:
        if not self._separate_master:
            weights = {name: self._own(parameter) for parameter, name in self._names.items()}
            for fragment in self.fragments():
                _copy(weights[fragment.name], fragment.master)
        # Small parameters stay gathered between steps; drop and gather them again from the loaded ranges.
        persistent = self._optimizer.persistent_parameters
        if persistent:
            persistent[0].partition(persistent)
            persistent[0].all_gather(persistent)

    @classmethod
    def _own(cls, parameter: Any) -> Tensor:
        """Return the elements of a parameter that this rank owns, 1-D."""
        own: Tensor = parameter.ds_tensor.detach().narrow(0, 0, cls._range(parameter)[1])
        return own

    @staticmethod
    def _range(parameter: Any) -> tuple[int, int]:
        """Return (first element, elements) this rank owns; the last rank's range is padded beyond the end."""
        width = parameter.ds_tensor.ds_numel
        start = min(width * torch.distributed.get_rank(parameter.ds_process_group), parameter.ds_numel)
        return start, min(width, parameter.ds_numel - start)


def _copy(weights: Tensor, master: Tensor) -> None:
    """In fp32 the weights are what a checkpoint holds; bring the optimizer's own copy, where there is one, in line."""
    if weights.data_ptr() != master.data_ptr():
        master.copy_(weights)


def partition_of(
    stage: int, module: nn.Module, optimizer: Any, placement: Placement, *, separate_master: bool
) -> Partition:
    """Return the view of an engine's state for its ZeRO stage."""
    kinds: Mapping[int, type[Partition]] = {0: Replicated, 1: Sharded, 2: Sharded, 3: FullySharded}
    return kinds[stage](module, optimizer, placement, separate_master=separate_master)
