"""Many small decoders of one shape, computed together: every weight has a leading axis of policies.

A decoder has RMSNorm before each sub-layer, causal attention, learned positions, and a head tied to the embedding. Rows
are padded on the left, so that all prompts of a batch end in the same column and all completions begin in the next.
"""

# Shapes: P policies, B sequences of each, T columns, D width, H heads, E width of a head, V vocabulary.

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

PAD = 0
"""Left of a prompt; and the end of a completion."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Of one policy."""

    vocab_size: int
    columns: int
    dim: int = 64
    num_layers: int = 2
    num_heads: int = 4


class Stack:
    """The weights of `num` policies, and what is computed from those of some of them."""

    def __init__(self, shape: Shape, num: int, *, generator: torch.Generator, device: torch.device) -> None:
        self.shape = shape
        self.weights: dict[str, Tensor] = {}
        dim = shape.dim
        sizes = {"embedding": (shape.vocab_size, dim), "positions": (shape.columns, dim), "norm": (dim,)}
        for layer in range(shape.num_layers):
            sizes |= {f"{layer}.norm1": (dim,), f"{layer}.qkv": (dim, 3 * dim), f"{layer}.out": (dim, dim)}
            sizes |= {f"{layer}.norm2": (dim,), f"{layer}.up": (dim, 4 * dim), f"{layer}.down": (4 * dim, dim)}
        for name, size in sizes.items():
            if "norm" in name:
                weight = torch.ones(num, *size)
            else:
                std = 0.5 / dim**0.5 if len(size) > 1 and name not in ("embedding", "positions") else 0.1
                weight = std * torch.randn(num, *size, generator=generator)
            self.weights[name] = weight.to(device).requires_grad_()

    def at(self, policies: Tensor | None) -> dict[str, Tensor]:
        """Return the weights of some policies (indices), or of all."""
        if policies is None:
            return self.weights
        return {name: weight[policies] for name, weight in self.weights.items()}

    def logits(self, weights: dict[str, Tensor], tokens_PBT: Tensor, pads_PB: Tensor) -> Tensor:
        """Return logits [P, B, T, V] of rows with `pads_PB` columns of padding on their left."""
        logits, _ = self._forward(weights, tokens_PBT, pads_PB, 0, None)
        return logits

    @torch.no_grad()
    def sample(
        self,
        weights: dict[str, Tensor],
        prompts_PQT: Tensor,
        pads_PQ: Tensor,
        *,
        num_each: int,
        num_new: int,
        generator: torch.Generator | None,
    ) -> Tensor:
        """Return completions [P, Q, num_each, num_new] at temperature 1, PAD from their end on; greedy without one."""
        num_policies, num_prompts, start = prompts_PQT.shape
        logits, cache = self._forward(weights, prompts_PQT, pads_PQ, 0, None)
        cache = [part.repeat_interleave(num_each, 1) for part in cache]
        logits_PBV = logits[:, :, -1].repeat_interleave(num_each, 1)
        pads_PB = pads_PQ.repeat_interleave(num_each, 1)
        drawn = []
        is_over = torch.zeros_like(pads_PB, dtype=torch.bool)
        for column in range(num_new):
            if generator is None:
                token_PB = logits_PBV.argmax(-1)
            else:
                noise = torch.empty_like(logits_PBV).exponential_(generator=generator)
                token_PB = (logits_PBV.softmax(-1) / noise).argmax(-1)
            token_PB = token_PB.masked_fill(is_over, PAD)
            drawn.append(token_PB)
            is_over = is_over | (token_PB == PAD)
            if column + 1 < num_new:
                logits, cache = self._forward(weights, token_PB[..., None], pads_PB, start + column, cache)
                logits_PBV = logits[:, :, -1]
        return torch.stack(drawn, -1).view(num_policies, num_prompts, num_each, num_new)

    def _forward(
        self, weights: dict[str, Tensor], tokens_PBT: Tensor, pads_PB: Tensor, start: int, cache: list[Tensor] | None
    ) -> tuple[Tensor, list[Tensor]]:
        """Return logits of columns from `start` on, and keys and values of all columns so far, layer after layer."""
        shape = self.shape
        num_policies, num_rows, num_columns = tokens_PBT.shape
        num_cells = num_rows * num_columns
        columns = torch.arange(start + num_columns, device=tokens_PBT.device)
        positions = (columns[start:] - pads_PB[..., None]).clamp(min=0)
        x = _pick(weights["embedding"], tokens_PBT) + _pick(weights["positions"], positions)
        x = x.view(num_policies, num_cells, shape.dim)
        mask = (columns <= columns[start:, None]) & (columns >= pads_PB[..., None, None])
        mask = mask | (columns == columns[start:, None])  # padding looks at itself: no row of zeros
        mask = mask.view(num_policies * num_rows, 1, num_columns, start + num_columns)
        kept: list[Tensor] = []
        for layer in range(shape.num_layers):
            qkv = torch.bmm(_normed(x, weights[f"{layer}.norm1"]), weights[f"{layer}.qkv"])
            heads = qkv.view(num_policies, num_rows, num_columns, 3, shape.num_heads, -1)
            query, key, value = heads.permute(3, 0, 1, 4, 2, 5)
            if cache is not None:
                key = torch.cat((cache[2 * layer], key), -2)
                value = torch.cat((cache[2 * layer + 1], value), -2)
            kept += (key, value)
            mixed = functional.scaled_dot_product_attention(
                query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1), attn_mask=mask
            )
            x = x + torch.bmm(mixed.transpose(1, 2).reshape(x.shape), weights[f"{layer}.out"])
            hidden = functional.gelu(torch.bmm(_normed(x, weights[f"{layer}.norm2"]), weights[f"{layer}.up"]))
            x = x + torch.bmm(hidden, weights[f"{layer}.down"])
        logits = torch.bmm(_normed(x, weights["norm"]), weights["embedding"].mT)
        return logits.view(num_policies, num_rows, num_columns, shape.vocab_size), kept


def _pick(table_PVD: Tensor, indices: Tensor) -> Tensor:
    """Return each policy's rows of its own table, [P, …, D]."""
    flat = indices.flatten(1)
    offsets = torch.arange(table_PVD.shape[0], device=flat.device)[:, None] * table_PVD.shape[1]
    picked = functional.embedding(flat + offsets, table_PVD.flatten(0, 1))
    return picked.view(*indices.shape, table_PVD.shape[2])


def _normed(x: Tensor, gain: Tensor) -> Tensor:
    return functional.rms_norm(x, x.shape[-1:]) * gain[:, None]


class Adam:
    """Adam over a stack, each policy with its own count of steps and its own clipping; no decay."""

    def __init__(self, stack: Stack, lr: float, *, clip_norm: float = 1.0) -> None:
        self._weights = stack.weights
        self._lr, self._clip_norm = lr, clip_norm
        self._moments = {name: (torch.zeros_like(w), torch.zeros_like(w)) for name, w in stack.weights.items()}
        first = next(iter(stack.weights.values()))
        self._steps = torch.zeros(len(first), device=first.device, dtype=first.dtype)

    @torch.no_grad()
    def step(self, is_active: Tensor, *, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8) -> None:
        """Update the active policies [P] from the gradients, and clear these."""
        squares = torch.stack([gradient.flatten(1).square().sum(1) for gradient in self._graded()]).sum(0)
        scale = (self._clip_norm / (squares.sqrt() + 1e-6)).clamp(max=1)
        is_active = is_active.to(self._steps.dtype)
        self._steps += is_active
        counts = self._steps.clamp(min=1)
        rate = self._lr * is_active / (1 - beta1**counts)
        correction = (1 - beta2**counts).sqrt()
        for name, weight in self._weights.items():
            assert weight.grad is not None

            def of_each(values: Tensor, like: Tensor = weight) -> Tensor:
                return values.view(-1, *[1] * (like.dim() - 1))

            gradient = weight.grad * of_each(scale)
            first, second = self._moments[name]
            active = of_each(is_active)
            first.lerp_(gradient, (1 - beta1) * active)
            second.lerp_(gradient.square(), (1 - beta2) * active)
            weight -= of_each(rate) * first / (second.sqrt() / of_each(correction) + eps)
            weight.grad = None

    def _graded(self) -> Iterator[Tensor]:
        for weight in self._weights.values():
            assert weight.grad is not None, "a policy's gradient is missing"
            yield weight.grad
