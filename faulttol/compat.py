"""Where torch is entered: kernels of the recorder's below every collective, and the few methods that it replaces.

A kernel at the `BackendSelect` key of a `c10d` operator runs for every caller: `torch.distributed`, DDP's reducer in
C++, FSDP2, functional collectives, compiled graphs, inference tensors. What is not an operator is replaced on its
class: `Work.wait` (the end of an operation on the CPU), `ProcessGroup._start_coalescing` and
`_end_coalescing` (one work of many messages), and the methods of a bare `Backend`, which never reach the operators.

All of it is taken back by `close()`. Held against torch 2.11 to 2.13; another version must have the same parts, or
`Interception` says which one it misses.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch._C import DispatchKey

from faulttol.errors import RecorderError
from faulttol.operations import BACKEND_METHODS, OPERATORS, Operation

_PARTS = (
    ("torch._C._after_ADInplaceOrView_keyset", torch._C, "_after_ADInplaceOrView_keyset"),
    ("torch.library._scoped_library", torch.library, "_scoped_library"),
    ("torch._C._is_key_in_tls", torch._C, "_is_key_in_tls"),
    ("torch._C.DispatchKeySet.raw_repr", torch._C.DispatchKeySet, "raw_repr"),
    ("torch.ops.…._handle.redispatch_boxed", getattr(torch.ops.aten.add.Tensor, "_handle", object), "redispatch_boxed"),
    ("torch.distributed.Work.unbox", getattr(dist, "Work", object), "unbox"),
    ("torch.distributed.ProcessGroup.unbox", getattr(dist, "ProcessGroup", object), "unbox"),
)


class Sink(Protocol):
    """What is told of every operation; none of it may raise. A token stands for an operation that has begun."""

    def begin(self, operation: Operation, group: Any, arguments: tuple[Any, ...]) -> Any:
        """Called before an operation; return its token, or None to hear no more of it. `group`: a bare backend."""

    def returned(self, token: Any, result: Any) -> None:
        """Called when the call returned; `work_of(result)` is torch's handle of what goes on."""

    def raised(self, token: Any) -> None:
        """Called when the call, or the waiting, raised."""

    def awaited(self, work: Any) -> Any:
        """Called before somebody waits for a work; return the token of an operation that ends by it, or None."""

    def over(self, token: Any) -> None:
        """Called after the waiting."""

    def coalescing(self, group: Any) -> None:
        """Called before a group's coalescing starts."""

    def coalesced(self, group: Any, work: Any) -> None:
        """Called when a group's coalescing ended in one work."""

    def tensor_awaited(self, tensor: Any) -> None:
        """Called when a functional collective's result was waited for."""

    def making(self, store: Any, rank: int) -> None:
        """Called before a bare backend is made."""

    def made(self, backend: Any, store: Any, rank: int, size: int) -> None:
        """Called after it."""


class Interception:
    """Tells a sink of every operation of this process, until `close()`."""

    def __init__(self, sink: Sink) -> None:
        """Raises: RecorderError when this torch lacks a part that is needed."""
        if not dist.is_available():
            raise RecorderError("torch.distributed: not in this build of torch, so there is nothing to record")
        missing = [name for name, owner, part in _PARTS if not hasattr(owner, part)]
        if missing:
            raise RecorderError(f"torch {torch.__version__}: has no {', '.join(missing)}; 2.11 to 2.13 have")
        self.wait: Callable[[Any], Any] = vars(dist.Work)["wait"]
        """Torch's own `Work.wait`, which nobody is told of."""
        self._stack = contextlib.ExitStack()
        self._changing = threading.Lock()
        self._is_closed = False
        try:
            self._register(sink)
            self._replace(sink)
        except BaseException:
            self._stack.close()
            raise

    def follow_functional_waits(self, sink: Sink) -> None:
        """Tell of `wait_tensor` too: the only sign of the end of a reduce-scatter that gloo carries for C++."""
        operator, below = torch.ops._c10d_functional.wait_tensor.default, _below()

        def kernel(keys: Any, *arguments: Any) -> Any:
            result = operator.redispatch(keys & below, *arguments)
            sink.tensor_awaited(result)
            return result

        with self._changing:
            if not self._is_closed:  # else another thread has closed it since
                library = self._stack.enter_context(torch.library._scoped_library("_c10d_functional", "IMPL"))
                library.impl("wait_tensor", kernel, "BackendSelect", with_keyset=True)

    def close(self) -> None:
        """Take everything back. Idempotent."""
        with self._changing:
            self._is_closed = True
            self._stack.close()

    def _register(self, sink: Sink) -> None:
        library = self._stack.enter_context(torch.library._scoped_library("c10d", "IMPL"))
        for operation in OPERATORS:
            operator = getattr(torch.ops.c10d, operation.name).default
            library.impl(operation.name, _kernel(operator, operation, sink), "BackendSelect", with_keyset=True)

    def _replace(self, sink: Sink) -> None:
        self._put(dist.Work, "wait", lambda wait: _waiting(wait, sink))
        self._put(dist.ProcessGroup, "_start_coalescing", lambda start: _coalescing(start, sink))
        self._put(dist.ProcessGroup, "_end_coalescing", lambda end: _coalesced(end, sink))
        backend = _backend_class()
        for operation in BACKEND_METHODS:
            if hasattr(backend, operation.name):  # one that this torch lacks cannot be called either
                self._put(backend, operation.name, functools.partial(_method, operation=operation, sink=sink))
        for name in ("ProcessGroupGloo", "ProcessGroupNCCL"):
            if hasattr(dist.distributed_c10d, name):  # a build for CPUs has no NCCL
                self._put(getattr(dist.distributed_c10d, name), "__init__", lambda init: _making(init, sink))

    def _put(self, owner: Any, name: str, wrap: Callable[[Any], Any]) -> None:
        """Replace a method; what is put back is the very object of the class's own dict, if it has one."""
        own = vars(owner).get(name)
        setattr(owner, name, wrap(getattr(owner, name)))
        if own is None:
            self._stack.callback(delattr, owner, name)
        else:
            self._stack.callback(setattr, owner, name, own)


def _backend_class() -> Any:
    """The base of all backends; `torch.distributed.Backend` is something else, their names."""
    from torch._C._distributed_c10d import Backend

    return Backend


def work_of(result: Any) -> Any:
    """Return the work in what an operator or a method returned; None: there is none, or not yet (coalescing)."""
    last = result[-1] if type(result) is tuple else result
    return dist.Work.unbox(last) if type(last) is torch.ScriptObject else last


def group_of(boxed: Any) -> Any:
    """Return the process group among an operator's arguments; the same object as long as somebody holds it."""
    return dist.ProcessGroup.unbox(boxed)


def measure(operation: Operation, arguments: tuple[Any, ...]) -> tuple[Any, int]:
    """Return a tensor of an operation, None without any, and the bytes of all."""
    if operation.tensors is None:
        return (None if operation.device is None else arguments[operation.device]), 0
    value = arguments[operation.tensors]
    if type(value) is list and len(value) == 1:
        value = value[0]
    if isinstance(value, torch.Tensor):
        return value, value.nbytes
    tensors = [t for item in value for t in (item if isinstance(item, (list, tuple)) else (item,))]
    return (tensors[0] if tensors else None), sum(t.nbytes for t in tensors)


def in_backward() -> bool:
    """Whether this thread runs autograd's backward: what begins here keeps a Python object of it."""
    return bool(torch._C._is_key_in_tls("context"))


def _below() -> Any:
    """The keys below BackendSelect; with it among them a kernel would call itself without end."""
    return torch._C._after_ADInplaceOrView_keyset.remove(DispatchKey.BackendSelect)


def _kernel(operator: Any, operation: Operation, sink: Sink) -> Callable[..., Any]:
    redispatch, all_below = operator._handle.redispatch_boxed, _below()
    begin, returned, raised = sink.begin, sink.returned, sink.raised
    known: dict[int, Any] = {}
    """By key set: what is below; to look it up takes a tenth of making it anew."""

    def kernel(keys: Any, *arguments: Any) -> Any:
        token = begin(operation, None, arguments)
        bits = keys.raw_repr()
        below = known.get(bits)
        if below is None:
            below = known[bits] = keys & all_below
        if token is None:
            return redispatch(below, *arguments)
        try:
            result = redispatch(below, *arguments)
        except BaseException:
            raised(token)
            raise
        returned(token, result)
        return result

    return kernel


def _method(call: Any, *, operation: Operation, sink: Sink) -> Callable[..., Any]:
    def method(backend: Any, *arguments: Any, **keywords: Any) -> Any:
        token = sink.begin(operation, backend, arguments)
        if token is None:
            return call(backend, *arguments, **keywords)
        try:
            work = call(backend, *arguments, **keywords)
        except BaseException:
            sink.raised(token)
            raise
        sink.returned(token, work)
        return work

    return method


def _waiting(wait: Any, sink: Sink) -> Callable[..., Any]:
    awaited = sink.awaited

    def waiting(work: Any, *arguments: Any, **keywords: Any) -> Any:
        token = awaited(work)
        if token is None:
            return wait(work, *arguments, **keywords)
        try:
            result = wait(work, *arguments, **keywords)
        except BaseException:
            sink.raised(token)
            raise
        sink.over(token)
        return result

    return waiting


def _coalescing(start: Any, sink: Sink) -> Callable[..., Any]:
    def starting(group: Any, *arguments: Any, **keywords: Any) -> Any:
        sink.coalescing(group)
        return start(group, *arguments, **keywords)

    return starting


def _coalesced(end: Any, sink: Sink) -> Callable[..., Any]:
    def ending(group: Any, *arguments: Any, **keywords: Any) -> Any:
        work = end(group, *arguments, **keywords)
        sink.coalesced(group, work)
        return work

    return ending


def _making(init: Any, sink: Sink) -> Callable[..., Any]:
    def making(backend: Any, store: Any, rank: int, size: int, *arguments: Any, **keywords: Any) -> None:
        sink.making(store, rank)
        init(backend, store, rank, size, *arguments, **keywords)
        sink.made(backend, store, rank, size)

    return making
