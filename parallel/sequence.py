"""Between the shared matrices: the tokens that every tensor rank has, or its part of them.

With `parallel.sequence` the residual stream of a rank is its part of the tokens, [B, T/ranks, D]: the embedding's sum
is scattered along T, column layers gather it, row layers scatter again. Whatever lies between (norms, dropout, the
additions) then sees a part, so the gradient of a parameter there is a term of the whole one: `share_gradients` sums.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from parallel import collectives
from parallel.overlap import check_tokens, gather, scatter

_GROUP = "_gradient_group"


def enter(x_BTD: Tensor, group: ProcessGroup, *, sequence: bool, overlap: bool = False) -> Tensor:
    """Return all tokens, of which each rank goes on to compute its features; gradients are summed.

    Takes all tokens, equal on every rank, or the rank's part of them with `sequence`.
    """
    if not sequence or group.size() == 1:
        return collectives.replicate(x_BTD, group)
    return gather(x_BTD, group.group_name, overlap=overlap)


def leave(x_BTD: Tensor, group: ProcessGroup, *, sequence: bool, overlap: bool = False) -> Tensor:
    """Return the sum over ranks: of all tokens, or of the rank's part of them with `sequence`.

    Raises: ValueError if the ranks cannot share the tokens evenly.
    """
    if not sequence or group.size() == 1:
        return collectives.sum_ranks(x_BTD, group)
    check_tokens(x_BTD.shape[1], group)
    return scatter(x_BTD, group.group_name, overlap=overlap)


def own_tokens(x_BTD: Tensor, group: ProcessGroup) -> Tensor:
    """Return the rank's part of tokens that are equal on every rank.

    Raises: ValueError if the ranks cannot share the tokens evenly.
    """
    check_tokens(x_BTD.shape[1], group)
    return collectives.split(x_BTD, 1, group)


def share_gradients(module: nn.Module, group: ProcessGroup) -> None:
    """Let the gradients of a module's own parameters be summed over the ranks, each of which sees its part.

    Where gradients are recorded, the module's parameters are then read through `collectives.replicate`. Names, types
    and the parameters themselves stay what they are.
    """
    if group.size() == 1 or not module._parameters:
        return
    assert _GROUP not in module.__dict__, "gradients are shared once"
    module.__dict__[_GROUP] = group
    module.__class__ = _sharing_class(type(module), tuple(module._parameters))  # type: ignore[arg-type]


@cache
def _sharing_class(kind: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    return type(kind.__name__, (kind,), {"__module__": kind.__module__, **{name: _shared(name) for name in names}})


def _shared(name: str) -> property:
    def read(module: nn.Module) -> Tensor | None:
        parameter = module._parameters[name]
        # FSDP2 asks for the sharded parameter (a DTensor) to put gradients on it: that must be the parameter itself.
        if parameter is None or not torch.is_grad_enabled() or hasattr(parameter, "placements"):
            return parameter
        return collectives.replicate(parameter, module.__dict__[_GROUP])

    return property(read)


def before_first_argument(module: nn.Module, change: Callable[[Tensor], Tensor], name: str = "hidden_states") -> None:
    """Let `change` map the first argument of a module's forward, which may come by `name`."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, name: change(kwargs[name])}

    module.register_forward_pre_hook(hook, with_kwargs=True)
