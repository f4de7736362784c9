"""A model that really trains, of any size, its steps as long as asked for."""

from __future__ import annotations

import time

import torch
from torch.nn.functional import gelu, linear

from checkpoint.bench.loop.savers import State


class Training:
    """A residual multilayer perceptron under AdamW: in fp32, on a GPU in bf16 with masters in fp32."""

    def __init__(self, device: str, params: int, width: int) -> None:
        self.is_on_gpu = device == "cuda"
        generator = torch.Generator(device).manual_seed(0)
        dtype = torch.bfloat16 if self.is_on_gpu else torch.float32
        self._layers = []
        for _ in range(max(1, round(params / (width * width + width)))):
            weight = torch.randn(width, width, generator=generator, device=device) * width**-0.5
            bias = torch.zeros(width, dtype=dtype, device=device, requires_grad=True)
            self._layers.append((weight.to(dtype).requires_grad_(), bias))
        self._parameters = [p for layer in self._layers for p in layer]
        self._masters = self._parameters
        if self.is_on_gpu:
            self._masters = [p.detach().float().requires_grad_() for p in self._parameters]
        self._optimizer = torch.optim.AdamW(self._masters, lr=1e-4, fused=True)
        self._inputs = torch.randn(8, width, generator=generator, device=device).to(dtype)
        self.forward_backward()
        self.update()

    def state(self) -> State:
        """Return all that training goes on from, by name: the live tensors."""
        state: State = {}
        for i, (parameter, master) in enumerate(zip(self._parameters, self._masters, strict=True)):
            state[f"model.{i}"] = parameter.detach()
            if master is not parameter:
                state[f"master.{i}"] = master.detach()
            state |= {f"optim.{i}.{key}": value for key, value in self._optimizer.state[master].items()}
        return state

    def forward_backward(self) -> None:
        """Leave gradients."""
        x = self._inputs
        for weight, bias in self._layers:
            x = x + gelu(linear(x, weight, bias))
        x.float().square().mean().backward()  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def update(self) -> None:
        """Change everything that `state` names; drop the gradients."""
        if self.is_on_gpu:
            for parameter, master in zip(self._parameters, self._masters, strict=True):
                assert parameter.grad is not None
                master.grad, parameter.grad = parameter.grad.float(), None
        self._optimizer.step()
        if self.is_on_gpu:
            torch._foreach_copy_(self._parameters, self._masters)
        self._optimizer.zero_grad(set_to_none=True)

    def synchronize(self) -> None:
        """Return when the device is idle."""
        if self.is_on_gpu:
            torch.cuda.synchronize()

    def last(self, seconds: float) -> float:
        """Take as many samples as make forward and backward last so long; return how long they do."""
        while True:
            took_s = min(self._time_once() for _ in range(2))
            if took_s >= 0.9 * seconds:
                return took_s
            count = len(self._inputs)
            wanted = int(count * min(8.0, max(1.2, seconds / took_s))) + 1
            self._inputs = self._inputs.repeat(-(-wanted // count), 1)[:wanted]

    def _time_once(self) -> float:
        self.synchronize()
        begun_s = time.perf_counter()
        self.forward_backward()
        self.synchronize()
        took_s = time.perf_counter() - begun_s
        self.update()
        return took_s
