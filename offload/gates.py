"""Gates: whoever reads a parameter whose update is still under way waits for it, and for it alone.

Two kinds. A hook before a module's forward waits for the parameters that the module holds. And a parameter itself,
while it waits, has a class whose `__torch_function__` waits first: so a tied weight, an EMA, a print or a save outside
of any module's forward gets the updated value too. A parameter that is not a plain one (a DTensor) has only the hooks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from offload.errors import OptimizerError

_METADATA = (
    *("grad", "requires_grad", "shape", "device", "dtype", "layout", "is_leaf", "is_cuda", "is_cpu", "is_sparse"),
    *("is_quantized", "is_meta", "is_nested", "ndim", "grad_fn", "names", "nbytes", "itemsize", "retains_grad"),
    *("_version", "_backward_hooks", "_post_accumulate_grad_hooks", "output_nr"),
)
_QUESTIONS = (
    *("size", "numel", "nelement", "dim", "ndimension", "stride", "is_contiguous", "element_size", "get_device"),
    *("is_floating_point", "is_complex", "requires_grad_", "register_hook", "register_post_accumulate_grad_hook"),
    *("__hash__", "__len__", "is_pinned", "is_shared", "storage_offset"),
)


def _value_free() -> set[Any]:
    """Return the functions that say something of a tensor other than its values."""
    found: set[Any] = set()
    for name in _METADATA:
        attribute = getattr(torch.Tensor, name, None)
        found |= {getattr(attribute, part, None) for part in ("__get__", "__set__", "__delete__")}
    found |= {getattr(torch.Tensor, name, None) for name in _QUESTIONS}
    return found - {None}


_VALUE_FREE = frozenset(_value_free())


class PendingParameter(nn.Parameter):
    """The class of a parameter whose update is under way."""

    _tiered_gate: Callable[[], None]

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Wait for the parameters among the arguments, then do what was asked."""
        if func not in _VALUE_FREE:
            for value in (*args, *(kwargs or {}).values()):
                _open(value)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Wait, then copy as a plain parameter."""
        self._tiered_gate()
        release(self)
        return copy.deepcopy(self, memo)


def _open(value: Any) -> None:
    if isinstance(value, PendingParameter):
        value._tiered_gate()
    elif isinstance(value, list | tuple):
        for entry in value:
            _open(entry)


def can_guard(parameter: torch.Tensor) -> bool:
    """Whether a parameter is a plain one, which `guard` works on."""
    return type(parameter) is nn.Parameter or type(parameter) is PendingParameter


def guard(parameter: torch.Tensor, gate: Callable[[], None]) -> None:
    """Call `gate`, which is to call `release`, before anything reads the parameter's values."""
    parameter._tiered_gate = gate  # type: ignore[attr-defined]
    parameter.__class__ = PendingParameter


def release(parameter: torch.Tensor) -> None:
    """Make a plain parameter again."""
    if type(parameter) is PendingParameter:
        parameter.__class__ = nn.Parameter  # type: ignore[assignment]
        del parameter._tiered_gate


class Waiter(Protocol):
    """What the hooks call."""

    def wait_for(self, parameters: Sequence[int], *, on_host: bool) -> None:
        """Wait for some parameters; `on_host`: not just the caller's stream."""
        ...

    def wait(self) -> None:
        """Wait for everything."""
        ...

    def take_values(self, parameters: Sequence[int]) -> None:
        """Somebody has loaded these parameters."""
        ...


class Hook(Protocol):
    """A hook in its place."""

    def remove(self) -> None:
        """Take it out."""
        ...


def attach(model: nn.Module, numbers: Mapping[int, int], waiter: Waiter) -> list[Hook]:
    """Put hooks before the forward of every module that holds parameters, and around its load; return them.

    `numbers` has the number of a parameter by its id. A module under FSDP2 gathers the parameters of everything
    below it that is not itself under FSDP2, on streams of its own, so its hook waits for all of them on the host; with
    explicit forward prefetch it gathers others' too, so it waits for everything.
    """
    hooks: list[Hook] = []
    for module in model.modules():
        is_fsdp = _is_fsdp(module)
        held = _gathered(module) if is_fsdp else list(module.parameters(recurse=False))
        mine = [numbers[id(parameter)] for parameter in held if id(parameter) in numbers]
        if mine:
            hooks.append(module.register_forward_pre_hook(_before_forward(waiter, mine, is_fsdp), prepend=True))
        direct = [numbers[id(p)] for p in module.parameters(recurse=False) if id(p) in numbers]
        if direct:
            hooks += _around_load(module, waiter, direct)

    def before_state_dict(*_: Any) -> None:
        waiter.wait()

    hooks.append(model.register_state_dict_pre_hook(before_state_dict))  # type: ignore[no-untyped-call]
    return hooks


def _around_load(module: nn.Module, waiter: Waiter, direct: Sequence[int]) -> list[Hook]:
    def before_load(module: nn.Module, state: Any, prefix: str, metadata: Mapping[str, Any], *_: Any) -> None:
        if metadata.get("assign_to_params_buffers"):
            raise OptimizerError(
                f"load_state_dict: assign=True: it puts other parameters in the place of those of {prefix}"
                f"{type(module).__name__} that the optimizer updates; load without it, or before the optimizer is made"
            )
        waiter.wait()

    def after_load(*_: Any) -> None:
        waiter.take_values(direct)

    return [
        module.register_load_state_dict_pre_hook(before_load),  # type: ignore[no-untyped-call]
        module.register_load_state_dict_post_hook(after_load),  # type: ignore[no-untyped-call]
    ]


def _before_forward(waiter: Waiter, mine: Sequence[int], is_fsdp: bool) -> Callable[[nn.Module, Any], None]:
    def before_forward(module: nn.Module, _: Any) -> None:
        if is_fsdp and _prefetches(module):
            waiter.wait()
        waiter.wait_for(mine, on_host=is_fsdp)

    return before_forward


def _is_fsdp(module: nn.Module) -> bool:
    return hasattr(module, "_get_fsdp_state")


def _prefetches(module: Any) -> bool:
    return bool(getattr(module._get_fsdp_state(), "_states_to_forward_prefetch", True))


def _gathered(module: nn.Module) -> list[nn.Parameter]:
    found = list(module.parameters(recurse=False))
    for child in module.children():
        if not _is_fsdp(child):
            found += _gathered(child)
    return found
