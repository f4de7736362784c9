"""The decoder written token by token and head by head: slow, obvious, and the measure of the fast one."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from trainsys.config import ModelConfig


def reference_logits(
    weights: Mapping[str, Tensor],
    config: ModelConfig,
    tokens: Tensor,
    document_ids: Tensor,
    positions: Tensor,
) -> tuple[Tensor, Tensor]:
    """Logits and auxiliary loss of a decoder with resolved `config`; every row, token and head by itself."""
    moe = [
        _Routes(config) if config.moe.num_experts and layer >= config.moe.first_dense_layers else None
        for layer in range(config.num_layers)
    ]
    rows = []
    for row_tokens, row_ids, row_positions in zip(tokens, document_ids, positions, strict=True):
        stream = [weights["embedding.weight"][token] for token in row_tokens]
        for layer in range(config.num_layers):
            own = {
                name.removeprefix(f"blocks.{layer}."): tensor
                for name, tensor in weights.items()
                if name.startswith(f"blocks.{layer}.")
            }
            mixed = _attention(own, config, stream, row_ids.tolist(), row_positions.tolist())
            stream = [x + y for x, y in zip(stream, mixed, strict=True)]
            stream = [x + _feed_forward(own, config, x, moe[layer]) for x in stream]
        head = weights["embedding.weight" if config.tied_head else "head.weight"]
        rows.append(torch.stack([head @ _normed(x, weights["norm.weight"], config) for x in stream]))
    losses = [routes.loss() for routes in moe if routes is not None]
    return torch.stack(rows), sum(losses, torch.zeros((), dtype=torch.float64))


def _normed(x: Tensor, gain: Tensor, config: ModelConfig) -> Tensor:
    return x / torch.sqrt((x * x).mean() + config.norm_eps) * gain


def _turned(x: Tensor, position: int, config: ModelConfig) -> Tensor:
    """One head's vector with each pair (i, i + width/2) turned as a complex number."""
    half = len(x) // 2
    parts = []
    for i in range(half):
        angle = position * config.rope_theta ** (-2 * i / len(x))
        parts.append((x[i] * math.cos(angle) - x[i + half] * math.sin(angle), i))
        parts.append((x[i] * math.sin(angle) + x[i + half] * math.cos(angle), i + half))
    return torch.stack([value for value, _ in sorted(parts, key=lambda part: part[1])])


def _attention(
    own: Mapping[str, Tensor], config: ModelConfig, stream: list[Tensor], ids: list[int], positions: list[int]
) -> list[Tensor]:
    width, heads, kv_heads = config.head_dim, config.num_heads, config.num_kv_heads
    sizes = [heads * width, kv_heads * width, kv_heads * width]
    query_w, key_w, value_w = own["attention.qkv.weight"].split(sizes)
    normed = [_normed(x, own["attention_norm.weight"], config) for x in stream]
    outputs = []
    for t in range(len(stream)):
        first = t
        while first > 0 and ids[first - 1] == ids[first]:
            first -= 1
        mixed = []
        for head in range(heads):
            shared = head * kv_heads // heads
            own_rows = slice(head * width, (head + 1) * width)
            kv_rows = slice(shared * width, (shared + 1) * width)
            query = _turned(query_w[own_rows] @ normed[t], positions[t], config)
            keys = [_turned(key_w[kv_rows] @ normed[s], positions[s], config) for s in range(first, t + 1)]
            values = [value_w[kv_rows] @ normed[s] for s in range(first, t + 1)]
            scores = torch.stack([query @ key / math.sqrt(width) for key in keys])
            share = scores.exp() / scores.exp().sum()
            mixed.append(sum((p * value for p, value in zip(share, values, strict=True)), torch.zeros(width)))
        outputs.append(own["attention.output.weight"] @ torch.cat(mixed))
    return outputs


def _swiglu(gate_up: Tensor, down: Tensor, x: Tensor) -> Tensor:
    gate, up = (gate_up @ x).chunk(2)
    return down @ (gate / (1 + torch.exp(-gate)) * up)


class _Routes:
    """What one layer's router decided, over all tokens of the batch."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config.moe
        self.probabilities: list[Tensor] = []
        self.chosen: list[int] = []

    def loss(self) -> Tensor:
        experts = self.config.num_experts
        mean = torch.stack(self.probabilities).mean(0)
        shares = [self.chosen.count(e) / len(self.chosen) for e in range(experts)]
        return self.config.balance_weight * experts * sum(share * mean[e] for e, share in enumerate(shares))


def _feed_forward(own: Mapping[str, Tensor], config: ModelConfig, x: Tensor, routes: _Routes | None) -> Tensor:
    x = _normed(x, own["feed_forward_norm.weight"], config)
    if routes is None:
        return _swiglu(own["feed_forward.gate_up.weight"], own["feed_forward.down.weight"], x)
    scores = own["feed_forward.router.weight"] @ x
    probability = scores.exp() / scores.exp().sum()
    values = probability.tolist()
    chosen = sorted(range(len(values)), key=lambda e: -values[e])[: config.moe.top_k]
    routes.probabilities.append(probability)
    routes.chosen += chosen
    total = sum(probability[e] for e in chosen)
    output = torch.zeros_like(x)
    for e in chosen:
        expert = _swiglu(own["feed_forward.experts.gate_up"][e], own["feed_forward.experts.down"][e], x)
        output = output + probability[e] / total * expert
    width = config.moe.ffn_dim
    for shared in range(config.moe.num_shared_experts):
        rows = slice(shared * width, (shared + 1) * width)
        gate, up = own["feed_forward.shared.gate_up.weight"].chunk(2)
        down = own["feed_forward.shared.down.weight"][:, rows]
        output = output + _swiglu(torch.cat((gate[rows], up[rows])), down, x)
    return output
