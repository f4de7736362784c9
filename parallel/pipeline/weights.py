"""Weight gradients apart from the gradients of the inputs, which other ranks wait for.

Products with a matrix (`functional.linear` with a parameter as its weight) of a stage that runs inside `deferring` keep
their weight gradient for later: backward makes them remember input and output gradient, and everything else of the
graph is done and freed. Follows the weight-gradient store of Zero Bubble Pipeline Parallelism (arXiv 2401.10241) and
DeepSeek-V3 (arXiv 2412.19437); differs: nothing in the model is replaced.

What is no such product (gains, biases, embeddings, products inside compiled regions or other autograd functions,
weights that are DTensors) gets its gradient with that of the inputs: right, and nothing to defer.

A recomputing stage (activation checkpointing) recomputes once, with the inputs' gradients: walking the graph twice, as
`torch.distributed.pipelining` does, would recompute twice, and keep the graph until the weights are done.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode


class Deferred:
    """The weight gradients that one micro-batch owes one stage from its backward on."""

    def __init__(self) -> None:
        self._owed: list[tuple[Tensor, Tensor, Tensor]] = []

    def backward(self, outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """Differentiate outputs of what ran inside `deferring`, all but what can be owed.

        What is recomputed is recomputed inside as well. `torch.autograd.backward` would leave the mode before the
        engine runs, since it takes modes for those who want to replace it.
        """
        with deferring(self):
            torch.autograd.Variable._execution_engine.run_backward(
                tuple(outputs), tuple(gradients), False, False, (), allow_unreachable=True, accumulate_grad=True
            )

    def __len__(self) -> int:
        return len(self._owed)

    def owe(self, weight: Tensor, x: Tensor, grad_output: Tensor) -> None:
        """Remember one product's weight gradient, grad_output^T x."""
        self._owed.append((weight, x, grad_output))

    def pay(self) -> None:
        """Add what is owed to the parameters' `.grad`, product by product, through autograd: hooks fire as usual."""
        while self._owed:
            weight, x, grad_output = self._owed.pop()
            with torch.enable_grad():
                alias = weight.view_as(weight)
            torch.autograd.backward([alias], [weight_gradient(weight, x, grad_output)])


class deferring(TorchFunctionMode):
    """Inside, products with a parameter defer its gradient to `deferred`."""

    def __init__(self, deferred: Deferred) -> None:
        super().__init__()
        self._deferred = deferred

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.linear and not torch.compiler.is_compiling() and torch.is_grad_enabled():
            x, weight, bias = _linear_arguments(*args, **kwargs)
            if x.requires_grad and type(weight) is nn.Parameter and weight.requires_grad:
                kind = x.device.type
                if torch.is_autocast_enabled(kind):
                    x = x.to(torch.get_autocast_dtype(kind))
                y: Tensor = _Product.apply(x, _Aside(weight), self._deferred)  # type: ignore[no-untyped-call]
                return y if bias is None else y + bias.to(y.dtype)
        return func(*args, **kwargs)


def weight_gradient(weight: Tensor, x: Tensor, grad_output: Tensor) -> Tensor:
    """Return grad_output^T x over all rows, in the weight's dtype."""
    return (grad_output.flatten(0, -2).mT @ x.flatten(0, -2)).to(weight.dtype)


def _linear_arguments(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    return input, weight, bias


class _Aside:
    """Takes a parameter past autograd: with an edge to it, its hooks would fire without a gradient."""

    def __init__(self, parameter: Tensor) -> None:
        self.parameter = parameter


class _Product(torch.autograd.Function):
    """x weight^T, whose backward owes the weight's gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: _Aside, deferred: Deferred) -> Tensor:
        ctx.weight, ctx.deferred = weight.parameter, deferred
        ctx.save_for_backward(x)
        return functional.linear(x, weight.parameter.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (x,), weight, (grad,) = ctx.saved_tensors, ctx.weight, grads
        ctx.deferred.owe(weight, x, grad)
        return grad @ weight.to(grad.dtype), None, None
