"""Fences that nobody can forget: before every update of an optimizer, for just what it updates.

A DeepSpeed engine has a torch optimizer inside, whose `step` it calls for one parameter group (ZeRO 1 and 2) or one
sub-group (ZeRO 3) at a time, and after which it overwrites the 16-bit weights of that group. So the hook goes to the
inner optimizer, looks at the groups it is about to update, and adds their 16-bit weights. DeepSpeed is not imported:
only the attributes below are read; where they are absent, everything is fenced.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from checkpoint.staging import storage_address

_MASTERS_AND_WEIGHTS = (
    ("single_partition_of_fp32_groups", "parallel_partitioned_bit16_groups"),  # ZeRO 1 and 2
    ("fp32_partitioned_groups_flat", "fp16_partitioned_groups_flat"),  # ZeRO 3
)
"""Attributes of DeepSpeed's optimizers: what the inner one updates, and group by group what is overwritten then."""


class Hook(Protocol):
    """A hook in its place."""

    def remove(self) -> None:
        """Take it out."""


class Fences(Protocol):
    """What a hook needs of a Checkpointer."""

    def fence(self) -> None:
        """Return when everything may be mutated."""

    def fence_storages(self, addresses: Callable[[], set[int]]) -> None:
        """Return when all tensors in some storages may be mutated."""


def fence_on(target: Any, fences: Fences) -> Hook:
    """Fence before every update of a torch optimizer, or of the one inside a DeepSpeed engine.

    Raises TypeError if there is no torch optimizer.
    """
    wrapper = target if isinstance(target, Optimizer) else getattr(target, "optimizer", None)
    inner = wrapper
    while inner is not None and not isinstance(inner, Optimizer):
        inner = getattr(inner, "optimizer", None)
    if inner is None:
        raise TypeError(
            f"fence_on: a {type(target).__name__} has no torch optimizer; allowed are torch.optim.Optimizer and "
            "DeepSpeed engines; for others call fence() before each update"
        )
    weights_of = None if wrapper is inner else _weights(wrapper)

    def before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if wrapper is not inner and weights_of is None:
            fences.fence()
        else:
            fences.fence_storages(lambda: {storage_address(t) for t in _updated(optimizer, weights_of)})

    # The compiler of a compiled step is not to trace into locks and threads.
    hook = torch.compiler.disable(before_step)  # type: ignore[no-untyped-call]
    # ZeRO 3 that keeps a part of the optimizer on the GPU has a second one for it.
    stepped = [inner, getattr(wrapper, "backup_optimizer", None)]
    return _Hooks([o.register_step_pre_hook(hook) for o in stepped if isinstance(o, Optimizer)])


class _Hooks:
    """Hooks that are taken out together."""

    def __init__(self, hooks: Sequence[Hook]) -> None:
        self._hooks = hooks

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()


WeightsOf = Callable[[Tensor], Iterable[Tensor]]
"""Returns what is overwritten after a master parameter was updated."""


def _weights(wrapper: Any) -> WeightsOf | None:
    for masters_name, weights_name in _MASTERS_AND_WEIGHTS:
        if hasattr(wrapper, masters_name) and hasattr(wrapper, weights_name):
            return functools.partial(_weights_of, wrapper, masters_name, weights_name)
    return None


def _weights_of(wrapper: Any, masters_name: str, weights_name: str, master: Tensor) -> Iterator[Tensor]:
    for flat, overwritten in zip(getattr(wrapper, masters_name), getattr(wrapper, weights_name), strict=True):
        if flat is master:
            yield from overwritten if isinstance(overwritten, list | tuple) else [overwritten]


def _updated(optimizer: Optimizer, weights_of: WeightsOf | None) -> Iterator[Tensor]:
    """Yield the tensors that the optimizer's next step changes, or that are overwritten right after it."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield from _memory(parameter)
            yield from _memory(optimizer.state.get(parameter, {}))
            if weights_of is not None:
                yield from weights_of(parameter)


def _memory(value: object) -> Iterator[Tensor]:
    """Yield the plain tensors in a value: what wraps them (a DTensor) has no storage that could be asked."""
    if isinstance(value, Tensor):
        if hasattr(value, "__tensor_flatten__"):
            names, _ = value.__tensor_flatten__()
            yield from _memory([getattr(value, name) for name in names])
        else:
            yield value
    elif isinstance(value, Mapping):
        yield from _memory(list(value.values()))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _memory(part)
