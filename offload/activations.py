"""What layers save for backward: kept, computed again, or swapped out to CPU memory or another tier; exact in each.

offload.swap_plan has the choice between them. Swapping works on whole storages, so that tensors that share memory move
once; weights are left alone. A storage leaves while forward goes on, and comes back one layer before backward needs it.
"""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from offload.copier import Copier, Mark, copier_for, indexed
from offload.errors import StreamError
from offload.pages import allocate_pages
from offload.pinned import Pinned
from offload.swap_plan import ActivationPlan, Choice, LayerActivations, Links, plan_activations
from offload.tier import Block, Tier
from offload.tracing import Trace
from offload.transfer import TIMEOUT_S

_MIN_BYTES = 1 << 16
"""Smaller storages are kept: moving one costs as much as moving this."""


@dataclass(eq=False, slots=True, weakref_slot=True)
class _Storage:
    """A storage that is away from the device, or back."""

    num_bytes: int
    index: int
    """Of the layer that saved it."""
    host: torch.Tensor | None = None
    block: Block | None = None
    """In the tier, where that holds it."""
    leaving: Mark = None
    stored: Future[None] | None = None
    on_device: torch.Tensor | None = None
    arriving: Mark = None
    box: list[_Lent] = field(default_factory=list)
    """Host memory to give back when this is gone."""


_Lent = tuple[torch.Tensor, Mark]
"""Host memory, and the mark behind which nothing uses it."""


@dataclass(frozen=True, slots=True)
class _Swapped:
    """What the graph holds in place of a tensor."""

    storage: _Storage
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class _Buffers:
    """Locked host memory, reused; never more than a limit, and never more than was in use at one time."""

    def __init__(self, device: torch.device, copier: Copier, limit_bytes: int | None) -> None:
        self._pinned = Pinned() if device.type == "cuda" else None
        self._copier, self._limit_bytes = copier, limit_bytes
        self._idle: list[_Lent] = []  # the longest idle first
        self._changed = threading.Condition()
        self._lent_bytes = self._most_lent_bytes = 0
        self._returning = 0
        self.num_bytes = 0
        """Taken from the system."""

    def take(self, num_bytes: int, *, optional: bool = False) -> torch.Tensor | None:
        """Return memory; waits for what is on its way to a tier where the limit is reached.

        None, where it is `optional`: there is no room for it now. Raises StreamError where there will be none.
        """
        with self._changed:
            while not self._has_room(num_bytes):
                if optional:
                    return None
                if not self._returning or not self._changed.wait(TIMEOUT_S):
                    raise StreamError(
                        f"activations: no room for {num_bytes} bytes beside {self._lent_bytes} of {self._limit_bytes} "
                        "in CPU memory; raise host_bytes, give a tier, or let layers compute again"
                    )
            self._lent_bytes += num_bytes
            self._most_lent_bytes = max(self._most_lent_bytes, self._lent_bytes)
            places = [place for place, (memory, _) in enumerate(self._idle) if memory.numel() == num_bytes]
            found = self._idle.pop(places[0]) if places else None
            if found is None:
                self._drop_idle(self._most_lent_bytes - num_bytes)
                self.num_bytes += num_bytes
        if found is not None:
            self._copier.finish(found[1])
            return found[0]
        memory = allocate_pages(num_bytes)
        if self._pinned is not None:
            self._pinned.lock(memory)
        return memory

    def give(self, box: list[_Lent]) -> None:
        """Take memory back that nothing uses behind its mark."""
        with self._changed:
            for memory, mark in box:
                self._idle.append((memory, mark))
                self._lent_bytes -= memory.numel()
            box.clear()
            self._changed.notify_all()

    @contextlib.contextmanager
    def returning(self) -> Iterator[None]:
        """Give memory back in the block; see `expect`."""
        try:
            yield
        finally:
            with self._changed:
                self._returning -= 1
                self._changed.notify_all()

    def expect(self) -> None:
        """Let others wait for memory that `returning` gives back without them."""
        with self._changed:
            self._returning += 1

    def close(self) -> None:
        self._idle.clear()
        if self._pinned is not None:
            self._pinned.close()

    def _has_room(self, num_bytes: int) -> bool:
        return self._limit_bytes is None or self._lent_bytes + num_bytes <= self._limit_bytes

    def _drop_idle(self, allowed_bytes: int) -> None:
        """Give idle memory of other sizes back to the system until so much is held at most."""
        while self._idle and self.num_bytes > allowed_bytes:
            memory, mark = self._idle.pop(0)
            self._copier.finish(mark)
            if self._pinned is not None:
                self._pinned.unlock(memory)
            self.num_bytes -= memory.numel()


class Activations:
    """Does with each layer's saved tensors what `choices` says. An `offload.saved.SavedTensors`.

    `attach` puts hooks on layers of a model that is on the device; a LayerStream brings its own and takes this as
    `saved`. Swapped storages go to locked CPU memory, at most `host_bytes` of it (None: as much as it takes), and from
    there to `tier` where one is given. Layers that compute again have `torch.utils.checkpoint` around their forward.
    Closing takes all of it off again.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        choices: Sequence[Choice],
        *,
        device: torch.device,
        tier: Tier | None = None,
        host_bytes: int | None = None,
        min_bytes: int = _MIN_BYTES,
        trace: Trace | None = None,
    ) -> None:
        device = indexed(device)
        self._layers, self._choices, self._device = list(layers), list(choices), device
        if len(self._layers) != len(self._choices):
            raise StreamError(f"activations: {len(self._choices)} choices for {len(self._layers)} layers; one each")
        self._copier, self._tier = copier_for(device, trace), tier
        self._buffers = _Buffers(device, self._copier, host_bytes)
        self._min_bytes = min_bytes
        self._movers = ThreadPoolExecutor(1, thread_name_prefix="activations")
        self._known: dict[tuple[int, int], tuple[StorageWeakRef, weakref.ref[_Storage]]] = {}
        self._of_layer: dict[int, weakref.WeakSet[_Storage]] = defaultdict(weakref.WeakSet)
        self._handles: list[Any] = []
        self._saving: list[Any] = []
        self._forwards: list[tuple[nn.Module, Callable[..., Any]]] = []
        self.swapped_bytes = 0
        """Moved out so far."""
        for module, choice in zip(self._layers, self._choices, strict=True):
            if choice == "recompute":
                self._recompute(module)

    def attach(self) -> Self:
        """Put hooks on the layers; they may be compiled in parts, not as wholes."""
        for index, (module, choice) in enumerate(zip(self._layers, self._choices, strict=True)):
            if getattr(module, "_compiled_call_impl", None) is not None:
                raise StreamError(f"layer {index}: it is compiled, and chooses itself what it saves; compile its parts")
            if choice == "swap":
                self._handles += [
                    module.register_forward_pre_hook(partial(self._before_forward, index)),
                    module.register_forward_hook(partial(self._after_forward, index), always_call=True),
                ]
        return self

    def pack(self, index: int, tensor: torch.Tensor) -> Any:
        """Start a tensor's storage on its way out, unless the layer keeps it; return what is kept instead."""
        storage = tensor.untyped_storage()
        if (
            self._choices[index] != "swap"
            or tensor.device != self._device
            or storage.nbytes() < self._min_bytes
            or type(tensor) is not torch.Tensor
            or tensor.layout != torch.strided
        ):
            return tensor
        key = (storage._cdata, tensor._version)
        known = self._known.get(key)
        entry = known[1]() if known is not None and not _is_gone(known[0]) else None
        if entry is None:
            entry = self._leave(index, storage)
            self._known[key] = (_weak(storage), weakref.ref(entry))
        return _Swapped(entry, tensor.dtype, tensor.shape, tensor.stride(), int(tensor.storage_offset()))

    def unpack(self, kept: Any) -> torch.Tensor:
        """Return the tensor, on the device again."""
        if isinstance(kept, torch.Tensor):
            return kept
        assert isinstance(kept, _Swapped)
        entry = kept.storage
        self._bring(entry)
        self._copier.wait(entry.arriving, tier="activations")
        assert entry.on_device is not None
        empty = torch.empty(0, dtype=kept.dtype, device=self._device)
        return empty.set_(entry.on_device.untyped_storage(), kept.offset, kept.size, kept.stride)

    def before_backward(self, index: int) -> None:
        """Start what the layer before `index` saved on its way back; called when backward comes to `index`."""
        self._known.clear()
        for before in range(index, max(-1, index - 2), -1):
            for entry in list(self._of_layer[before]):
                self._bring(entry, ahead=True)

    def close(self) -> None:
        """Take hooks off and give memory back; no backward may be under way. A second call does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for module, forward in self._forwards:
            module.forward = forward
        self._forwards.clear()
        self._movers.shutdown()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._buffers.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _recompute(self, module: nn.Module) -> None:
        forward = module.forward

        def again(*arguments: Any, **keywords: Any) -> Any:
            if not torch.is_grad_enabled():
                return forward(*arguments, **keywords)
            return checkpoint(forward, *arguments, use_reentrant=False, **keywords)

        module.forward = again
        self._forwards.append((module, forward))

    def _before_forward(self, index: int, module: nn.Module, arguments: Any) -> None:
        free = torch._C._autograd._top_saved_tensors_default_hooks(True) is None
        if not (torch.is_grad_enabled() and free):
            self._saving.append(None)
            return
        parameters = list(module.parameters())

        def pack(tensor: torch.Tensor) -> Any:
            # Asked now: an engine may have gathered them just before.
            weights = {parameter.untyped_storage().data_ptr() for parameter in parameters}
            return tensor if tensor.untyped_storage().data_ptr() in weights else self.pack(index, tensor)

        hooks = torch.autograd.graph.saved_tensors_hooks(pack, self.unpack)
        hooks.__enter__()
        self._saving.append(hooks)

    def _after_forward(self, index: int, module: nn.Module, arguments: Any, output: Any) -> None:
        hooks = self._saving.pop()
        if hooks is None:
            return
        hooks.__exit__(None, None, None)
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                tensor.register_hook(lambda _: self.before_backward(index))  # type: ignore[no-untyped-call]

    def _leave(self, index: int, storage: torch.UntypedStorage) -> _Storage:
        entry = _Storage(storage.nbytes(), index)
        flat = torch.empty(0, dtype=torch.uint8, device=self._device).set_(storage)
        entry.host = self._taken(entry.num_bytes)
        entry.leaving = self._copier.down(entry.host, flat, name=f"activations of layer {index}")
        entry.box.append((entry.host, entry.leaving))
        self.swapped_bytes += entry.num_bytes
        self._of_layer[index].add(entry)
        weakref.finalize(entry, self._buffers.give, entry.box)
        if self._tier is not None:
            entry.block = self._tier.allocate(entry.num_bytes, f"activations of layer {index}")
            self._buffers.expect()
            entry.stored = self._movers.submit(self._store, self._tier, entry.block, entry.host, entry.box)
            weakref.finalize(entry, self._tier.free, entry.block)
            entry.host = None
        return entry

    def _taken(self, num_bytes: int) -> torch.Tensor:
        memory = self._buffers.take(num_bytes)
        assert memory is not None
        return memory

    def _store(self, tier: Tier, block: Block, host: torch.Tensor, box: list[_Lent]) -> None:
        """Pass a storage on to the tier, and give its host memory to the next one."""
        with self._buffers.returning():
            for _, leaving in box:
                self._copier.finish(leaving)
            tier.write(block, host).result()
            self._buffers.give(box)

    def _bring(self, entry: _Storage, *, ahead: bool = False) -> None:
        """Start a storage on its way back, if it is not; `ahead` of its use only where there is room for it."""
        if entry.on_device is not None:
            return
        if entry.stored is not None and entry.block is not None and self._tier is not None:
            entry.stored.result()
            host = self._buffers.take(entry.num_bytes, optional=True) if ahead else self._taken(entry.num_bytes)
            if host is None:
                return
            entry.host = host
            self._tier.read(entry.block, entry.host).result()
        assert entry.host is not None
        # The copy begins behind what compute was asked for so far, which may still use this memory for something else.
        entry.on_device = torch.empty(entry.num_bytes, dtype=torch.uint8, device=self._device)
        name = f"activations of layer {entry.index}"
        entry.arriving = self._copier.up(entry.on_device, entry.host, after=self._copier.mark(), name=name)
        entry.box[:] = [(entry.host, entry.arriving)]
        if entry.block is not None:  # the tier has it, so its memory serves the next one at once
            entry.host = None
            self._buffers.give(entry.box)


def _weak(storage: torch.UntypedStorage) -> StorageWeakRef:
    return StorageWeakRef(storage)  # type: ignore[no-untyped-call]


def _is_gone(storage: StorageWeakRef) -> bool:
    return bool(storage.expired())  # type: ignore[no-untyped-call]


class Automatic:
    """Measures the layers in a model's first pass, in which all swap, and then lets each do what is fastest.

    `budget_bytes` of device memory are for activations (None: of a GPU, nine tenths of what the first step leaves
    free; of a CPU, no limit). `plan` has the choice from the second pass on.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[nn.Module],
        *,
        device: torch.device,
        budget_bytes: int | None = None,
        min_bytes: int = _MIN_BYTES,
    ) -> None:
        self._layers, self._device, self._budget_bytes = list(layers), device, budget_bytes
        self._min_bytes = min_bytes
        self.plan: ActivationPlan | None = None
        self._times = [_Timer(device) for _ in layers]
        swap: list[Choice] = ["swap"] * len(self._layers)
        self._active = Activations(layers, swap, device=device, min_bytes=min_bytes).attach()
        self._bytes = [0] * len(self._layers)
        self._inputs = [0] * len(self._layers)
        self._passes = 0
        self._handles: list[Any] = [model.register_forward_pre_hook(self._before_model)]
        self._timers: list[Any] = []
        for index, module in enumerate(self._layers):
            self._timers.append(module.register_forward_pre_hook(partial(self._before_layer, index), prepend=True))
            self._timers.append(module.register_forward_hook(partial(self._after_layer, index)))

    def close(self) -> None:
        """Take all hooks off."""
        for handle in (*self._handles, *self._timers):
            handle.remove()
        self._active.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _before_model(self, module: nn.Module, arguments: Any) -> None:
        if not torch.is_grad_enabled():
            return
        self._passes += 1
        if self._passes == 2:
            self._choose()

    def _before_layer(self, index: int, module: nn.Module, arguments: Any) -> None:
        if torch.is_grad_enabled():
            self._inputs[index] = sum(t.nbytes for t in tree_leaves(arguments) if isinstance(t, torch.Tensor))
            self._bytes[index] = -self._active.swapped_bytes
            self._times[index].start()

    def _after_layer(self, index: int, module: nn.Module, arguments: Any, output: Any) -> None:
        if torch.is_grad_enabled():
            self._times[index].stop()
            self._bytes[index] += self._active.swapped_bytes

    def _choose(self) -> None:
        costs = [
            LayerActivations(num_bytes=num_bytes, input_bytes=inputs, forward_s=timer.taken_s())
            for num_bytes, inputs, timer in zip(self._bytes, self._inputs, self._times, strict=True)
        ]
        for handle in self._timers:
            handle.remove()
        self._timers.clear()
        budget = self._budget_bytes
        if budget is None:
            budget = sum(cost.num_bytes for cost in costs) * 4
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
                budget = int(0.9 * torch.cuda.mem_get_info(self._device)[0])
        down, up = _link_rates(self._device)
        backward_s = 2 * sum(cost.forward_s for cost in costs)  # two products for each of forward's
        self.plan = plan_activations(costs, Links(down=down, up=up), backward_s=backward_s, budget_bytes=budget)
        self._active.close()
        self._active = Activations(
            self._layers, self.plan.choices, device=self._device, min_bytes=self._min_bytes
        ).attach()


class _Timer:
    """How long something takes on a device, told later."""

    def __init__(self, device: torch.device) -> None:
        self._events: list[Any] = []
        if device.type == "cuda":
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
        self._taken_s = 0.0

    def start(self) -> None:
        if self._events:
            self._events[0].record()
        self._taken_s = -time.perf_counter()

    def stop(self) -> None:
        if self._events:
            self._events[1].record()
        self._taken_s += time.perf_counter()

    def taken_s(self) -> float:
        if self._events:
            self._events[1].synchronize()
            return float(self._events[0].elapsed_time(self._events[1])) / 1e3
        return self._taken_s


def _link_rates(device: torch.device, num_bytes: int = 1 << 26) -> tuple[float, float]:
    """Return bytes a second from the device and to it."""
    host = allocate_pages(num_bytes).zero_()
    pinned = Pinned() if device.type == "cuda" else None
    if pinned is not None:
        pinned.lock(host)
    on_device = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    rates = []
    for into, source in ((host, on_device), (on_device, host)):
        timer = _Timer(device)
        for _ in range(2):
            timer.start()
            into.copy_(source, non_blocking=True)
            timer.stop()
        rates.append(num_bytes / max(timer.taken_s(), 1e-9))
    if pinned is not None:
        pinned.close()
    return rates[0], rates[1]
