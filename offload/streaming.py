"""Train and run models that are larger than the device: a window of layers on it, the others on their way.

Follows Superpipeline (arXiv 2410.08791); offload.window has the choice of the window. Differs: it is exact with
autograd's own graph: what backward keeps of a layer's weights is a reference, looked up in the slot that the layer
lies in when backward comes to it. Nothing is computed twice, modules are not rewritten, and parameters keep
their identity for optimizers and checkpoints.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from offload.arrivals import Arrivals, Landed
from offload.copier import copier_for, indexed
from offload.errors import BudgetError, StreamError
from offload.layers import LayerWeights, Slot, check_apart, lay_out, move_others, others_bytes, settle, settle_in
from offload.pages import allocate_pages
from offload.pinned import Pinned
from offload.saved import SavedTensors, Weight
from offload.tier import Tier
from offload.tracing import Trace
from offload.window import Window, fixed_bytes_needed, largest_window


class LayerStream:
    """Streams `layers`, which `model` calls one after the other, through `window.resident` slots on `device`.

    The layers' weights live in `home` (None: memory of the host, page-locked for a GPU), and their gradients beside
    them: to optimizers they are parameters on the CPU. What else the model has moves to the device and stays. With a
    home that cannot be addressed (a disk, an emulated tier) weights can be read only: for inference.

    `landed` is called in every backward once for each layer, from the last to the first, in a thread of the stream's:
    as soon as all gradients of a layer are at home and those after it were handed on, at the latest before the backward
    returns, which raises what it raises. It may change them until the next forward.

    One model pass at a time; after a backward that raised there are no gradients of layers. Closing leaves the
    weights at home.

    Raises:
        StreamError: layers share parameters, are compiled, or should train from a home that cannot be addressed.
        BudgetError: the window is not one over these layers.
        TierFull: `home` has no room for the weights.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[nn.Module],
        *,
        device: torch.device,
        window: Window | int,
        home: Tier | None = None,
        saved: SavedTensors | None = None,
        landed: Landed | None = None,
        trace: Trace | None = None,
    ) -> None:
        self.device = device = indexed(device)
        self.window = (
            window if isinstance(window, Window) else Window(num_layers=len(layers), resident=min(window, len(layers)))
        )
        if self.window.num_layers != len(layers):
            raise BudgetError(f"window: num_layers: {self.window.num_layers}, but there are {len(layers)} layers")
        self._copier, self._saved, self._home = copier_for(device, trace), saved, home
        self._pinned = Pinned() if device.type == "cuda" else None
        self._layers = [lay_out(index, module) for index, module in enumerate(layers)]
        check_apart(self._layers)
        self.layer_bytes = max(layer.num_bytes for layer in self._layers)
        """Of the largest layer."""
        self._handles: list[Any] = []
        self._settle()
        move_others(model, layers, device)
        self.other_bytes = others_bytes(model, layers, training=self._trains)
        """Of what stays on the device: parameters of no layer with their gradients, and buffers."""
        self._slots = [
            Slot(torch.empty(self.layer_bytes, dtype=torch.uint8, device=device)) for _ in range(self.window.resident)
        ]
        self._by_storage = {slot.buffer.untyped_storage().data_ptr(): slot for slot in self._slots}
        self._staging: deque[torch.Tensor] = deque()
        self._arrivals = Arrivals(
            self._layers, self._copier, self._memory, on_device=device.type != "cpu", landed=landed
        )
        self._saving: list[Any] = []
        self._in_backward = False
        self._closing = False
        self._lock = threading.RLock()
        self._hook()

    @property
    def device_bytes(self) -> int:
        """Bytes on the device, without activations: what stays, the slots, and a layer's gradients on their way."""
        leaving = fixed_bytes_needed(self.layer_bytes, training=self._trains)
        return self.other_bytes + self.window.resident * self.layer_bytes + leaving

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory that weights and gradients take."""
        held = (memory for layer in self._layers for memory in (layer.home, layer.gradients) if memory is not None)
        return sum(memory.nbytes for memory in held)

    @property
    def resident(self) -> list[int]:
        """The layers that have a slot, in order."""
        return sorted(slot.layer.index for slot in self._slots if slot.layer is not None)

    def release(self) -> None:
        """Forget what is in the slots: call it after a change of weights past torch, also `p.data.copy_`."""
        with self._lock:
            for layer in self._layers:
                self._evict(layer)

    def close(self) -> None:
        """Take the hooks off and give slots and locked memory back; a second call does nothing."""
        if self._closing:
            return
        self._closing = True
        for handle in self._handles:
            handle.remove()
        self.release()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._arrivals.close()
        self._slots.clear()
        self._by_storage.clear()
        if self._pinned is not None:
            self._pinned.close()
        if self._home is not None:
            for layer in self._layers:
                layer.leave(self._home)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- setting up ---

    @property
    def _trains(self) -> bool:
        return any(place.parameter.requires_grad for layer in self._layers for place in layer.places)

    def _memory(self, num_bytes: int) -> torch.Tensor:
        memory = allocate_pages(num_bytes)
        if self._pinned is not None:
            memory.zero_()  # touched, so that locking does not do it page by page
            self._pinned.lock(memory)
        return memory

    def _settle(self) -> None:
        for layer in self._layers:
            if self._home is None:
                settle(layer, self._memory(layer.num_bytes))
            else:
                settle_in(layer, self._home)
                if layer.home is None and any(place.parameter.requires_grad for place in layer.places):
                    raise StreamError(
                        f"tier {self._home.spec.label}: it cannot be addressed, so weights there can be read only; "
                        "call requires_grad_(False) on the model for inference, or give training a home in memory"
                    )

    def _hook(self) -> None:
        for layer in self._layers:
            module = layer.module
            self._handles += [
                module.register_forward_pre_hook(partial(self._before_forward, layer), prepend=True),
                module.register_forward_hook(partial(self._after_forward, layer), always_call=True),
            ]
            self._handles += [
                _on_gradient(place.parameter, partial(self._arrivals.came, layer))
                for place in layer.places
                if place.parameter.requires_grad
            ]

    # --- forward ---

    def _before_forward(self, layer: LayerWeights, module: nn.Module, arguments: Any) -> None:
        if self._in_backward and not _is_backward():
            self._abandon()
        self._need(layer)
        layer.attach()
        if _is_backward():  # computed again: backward has its own window
            self._saving.append(None)
            return
        self._prefetch(layer, 1)
        # Somebody else's hooks, such as those of activation checkpointing around the layer, go first.
        if torch.is_grad_enabled() and torch._C._autograd._top_saved_tensors_default_hooks(True) is None:
            hooks = torch.autograd.graph.saved_tensors_hooks(partial(self._pack, layer), self._unpack)
            hooks.__enter__()
            self._saving.append(hooks)
        else:
            self._saving.append(None)

    def _after_forward(self, layer: LayerWeights, module: nn.Module, arguments: Any, output: Any) -> None:
        hooks = self._saving.pop()
        if hooks is not None:
            hooks.__exit__(None, None, None)
        if _is_backward():
            return
        layer.detach()
        if torch.is_grad_enabled():
            for tensor in tree_leaves(output):
                if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                    tensor.register_hook(partial(self._backward_came, layer))  # type: ignore[no-untyped-call]

    def _pack(self, layer: LayerWeights, tensor: torch.Tensor) -> Any:
        slot = self._by_storage.get(tensor.untyped_storage().data_ptr())
        if slot is not None:
            assert slot.layer is not None
            return Weight(slot.layer, tensor.dtype, tensor.shape, tensor.stride(), int(tensor.storage_offset()))
        return tensor if self._saved is None else self._saved.pack(layer.index, tensor)

    def _unpack(self, kept: Any) -> torch.Tensor:
        if isinstance(kept, Weight):
            self._need(kept.layer)
            assert kept.layer.slot is not None
            storage = kept.layer.slot.buffer.untyped_storage()
            empty = torch.empty(0, dtype=kept.dtype, device=self.device)
            return empty.set_(storage, kept.offset, kept.size, kept.stride)
        return kept if self._saved is None or isinstance(kept, torch.Tensor) else self._saved.unpack(kept)

    # --- backward ---

    def _backward_came(self, layer: LayerWeights, gradient: torch.Tensor) -> None:
        with self._lock:
            if not self._in_backward:
                torch.autograd.Variable._execution_engine.queue_callback(self._backward_ended)
            self._in_backward = True
            self._need(layer)
            layer.attach()
            self._prefetch(layer, -1)
            if self._saved is not None:
                self._saved.before_backward(layer.index)

    def _backward_ended(self) -> None:
        """Wait until all gradients are at home; the slots are old when the optimizer has stepped."""
        with self._lock:
            self._in_backward = False
            try:
                self._arrivals.finish()
            finally:
                self.release()

    def _abandon(self) -> None:
        """Forget a backward that has raised."""
        with self._lock:
            self._in_backward = False
            self._arrivals.abandon()
            self.release()

    # --- the window ---

    def _need(self, layer: LayerWeights) -> None:
        """Let the layer's weights be in a slot, and compute wait for them."""
        with self._lock:
            if layer.slot is not None and not layer.attached and layer.is_stale:
                self._evict(layer)
            if layer.slot is None:
                self._fetch(layer, keep={layer.index})
            self._advance(layer, wait=True)
            self._copier.wait(layer.fetch.ready, tier=self._home.spec.label if self._home else "cpu")

    def _prefetch(self, layer: LayerWeights, step: int) -> None:
        """Bring in the layers that come next in this direction, as far as the window reaches."""
        with self._lock:
            count, reach = len(self._layers), self.window.resident - 1
            indices: Iterator[int] = iter(layer.index + step * distance for distance in range(1, reach + 1))
            if torch.is_grad_enabled() or step < 0:  # the last layers stay for backward
                wanted = [index for index in indices if 0 <= index < count]
            else:
                wanted = [index % count for index in indices]  # the next pass begins at the first
            missing = [index for index in wanted if self._layers[index].slot is None]
            at_end = len(wanted) < reach
            if len(missing) >= self.window.moved or at_end:
                for index in missing:
                    self._fetch(self._layers[index], keep={layer.index, *wanted})
            for index in wanted:
                self._advance(self._layers[index], wait=False)

    def _fetch(self, layer: LayerWeights, keep: set[int]) -> None:
        slot = next((slot for slot in self._slots if slot.layer is None), None)
        if slot is None:
            slot = self._victim(layer, keep)
            assert slot.layer is not None
            self._evict(slot.layer)
        slot.layer, layer.slot = layer, slot
        fetch = layer.fetch
        fetch.is_ready, fetch.future, fetch.staging = False, None, None
        if layer.home is not None:
            self._send(layer, layer.home)
            return
        assert self._home is not None
        assert layer.block is not None
        if self.device.type == "cpu":
            fetch.staging = slot.buffer[: layer.num_bytes]
        else:
            fetch.staging = self._staging.popleft() if self._staging else self._memory(self.layer_bytes)
        fetch.future = self._home.read(layer.block, fetch.staging[: layer.num_bytes])

    def _advance(self, layer: LayerWeights, *, wait: bool) -> None:
        """Send what a tier has read on to the device, if it has, or when it has."""
        fetch = layer.fetch
        if fetch.is_ready or fetch.future is None or not (wait or fetch.future.done()):
            return
        fetch.future.result()
        assert fetch.staging is not None
        if self.device.type == "cpu":
            fetch.ready, fetch.is_ready = None, True
        else:
            self._send(layer, fetch.staging)

    def _send(self, layer: LayerWeights, source: torch.Tensor) -> None:
        slot, fetch = layer.slot, layer.fetch
        assert slot is not None
        into, data = slot.buffer[: layer.num_bytes], source[: layer.num_bytes]
        fetch.ready, fetch.is_ready = self._copier.up(into, data, after=slot.free, name=layer.name), True
        layer.versions = tuple(place.parameter._version for place in layer.places)

    def _victim(self, layer: LayerWeights, keep: set[int]) -> Slot:
        """Return the slot whose layer is needed last: none of `keep` and of those at work, the farthest."""
        held = [slot for slot in self._slots if slot.layer is not None]
        free = [slot for slot in held if slot.layer.index not in keep]  # type: ignore[union-attr]
        if not free:
            free = [slot for slot in held if slot.layer is not layer]
        return max(free, key=lambda slot: abs(slot.layer.index - layer.index))  # type: ignore[union-attr]

    def _evict(self, layer: LayerWeights) -> None:
        if layer.slot is None:
            return
        layer.detach()
        fetch = layer.fetch
        if fetch.future is not None:
            if not fetch.is_ready:
                fetch.future.result()
            if self.device.type != "cpu" and fetch.staging is not None:
                self._copier.finish(fetch.ready)
                self._staging.append(fetch.staging)
        layer.slot.free = self._copier.mark()
        layer.slot.layer, layer.slot = None, None
        fetch.future = fetch.staging = None


def fit(
    model: nn.Module,
    layers: Sequence[nn.Module],
    *,
    device: torch.device,
    budget_bytes: int,
    activation_bytes: int = 0,
    training: bool = True,
    **settings: Any,
) -> LayerStream:
    """Return a stream over the layers that fills a budget of device memory, of which activations need a part.

    Raises:
        BudgetError: not even one layer fits; it says what is missing.
    """
    sizes = [lay_out(index, module).num_bytes for index, module in enumerate(layers)]
    window = largest_window(
        num_layers=len(sizes),
        layer_bytes=max(sizes),
        other_bytes=others_bytes(model, layers, training=training) + activation_bytes,
        budget_bytes=budget_bytes,
        training=training,
    )
    return LayerStream(model, layers, device=device, window=window, **settings)


def _on_gradient(parameter: nn.Parameter, hook: Callable[[nn.Parameter], None]) -> Any:
    return parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]


def _is_backward() -> bool:
    """Return whether autograd is running backward in this thread: a forward now is one that is computed again."""
    return bool(torch._C._current_graph_task_id() != -1)
