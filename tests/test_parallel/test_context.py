"""Ring and Ulysses attention against one process: layouts, outputs and gradients, documents and grouped heads."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from parallel.context import Context, number_documents
from tests.ranks import run_ranks

Method = Literal["ring", "ulysses"]
EXACT = {"rtol": 1e-12, "atol": 1e-13}
BATCH, LENGTH, WIDTH = 2, 48, 4


def reference(query: Tensor, key: Tensor, value: Tensor, ids: Tensor | None, scale: float) -> Tensor:
    """Attention of whole sequences by its definition."""
    group = query.shape[2] // key.shape[2]
    key, value = key.repeat_interleave(group, 2), value.repeat_interleave(group, 2)
    scores = torch.einsum("bthe,bshe->bhts", query, key) * scale
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    if ids is not None:
        numbers = number_documents(ids)
        hidden = hidden | (numbers[:, :, None] != numbers[:, None, :])[:, None]
    return torch.einsum("bhts,bshe->bthe", scores.masked_fill(hidden, float("-inf")).softmax(-1), value)


def packed(*rows: list[int]) -> Tensor:
    """Document ids of rows with documents of these lengths; ids come back, as they may."""
    return torch.stack([torch.cat([torch.full((n,), i % 3) for i, n in enumerate(row)]) for row in rows])


LAYOUTS: dict[str, Tensor | None] = {
    "causal": None,
    "odd lengths": packed([5, 13, 1, 17, 12], [31, 17]),
    "inside one chunk": packed([1, 2, 1, 44], [48]),
    "one token each": packed([1] * 48, [47, 1]),
    "alike in all rows": packed([20, 28], [20, 28]),
    "at chunk borders": packed([6] * 8, [12] * 4),
}


def inputs(heads: int, kv_heads: int, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(5)
    sizes = (heads, kv_heads, kv_heads, heads)
    return [torch.randn(BATCH, LENGTH, n, WIDTH, dtype=torch.float64).to(dtype) for n in sizes]


def own_results(context: Context, wholes: list[Tensor], ids: Tensor | None, scale: float | None) -> list[Tensor]:
    """Whole output and gradients of query, key and value, gathered from all ranks."""
    *operands, grad = (context.cut(x) for x in wholes)
    leaves = [x.requires_grad_() for x in operands]
    plan = context.core.prepare(None if ids is None else context.cut_documents(ids), None, leaves[0])
    out = context.core(leaves[0], leaves[1], leaves[2], plan, scale=scale)
    out.backward(grad)  # type: ignore[no-untyped-call]
    results = [out, *(x.grad for x in leaves if x.grad is not None)]
    return [context.gather(x) for x in results]


def expected_results(wholes: list[Tensor], ids: Tensor | None, scale: float) -> list[Tensor]:
    *operands, grad = wholes
    leaves = [x.clone().requires_grad_() for x in operands]
    out = reference(leaves[0], leaves[1], leaves[2], ids, scale)
    return [out, *torch.autograd.grad(out, leaves, grad)]


def exact_rank(rank: int, world_size: int, method: Method, heads: list[tuple[int, int]]) -> int:
    assert dist.group.WORLD is not None
    context = Context(dist.group.WORLD, method)
    compared = 0
    for num_heads, num_kv_heads in heads:
        wholes = inputs(num_heads, num_kv_heads, torch.float64)
        for name, ids in LAYOUTS.items():
            for scale in (None, 0.3):
                found = own_results(context, wholes, ids, scale)
                wanted = expected_results(wholes, ids, WIDTH**-0.5 if scale is None else scale)
                for what, mine, theirs in zip(("output", "dq", "dk", "dv"), found, wanted, strict=True):
                    torch.testing.assert_close(mine, theirs, **EXACT, msg=lambda text, at=(name, what): f"{at}: {text}")
                    compared += 1
    return compared


@pytest.mark.parametrize(
    ("method", "size", "heads"),
    [
        ("ring", 2, [(4, 2), (3, 1)]),
        ("ring", 3, [(2, 2)]),
        ("ring", 4, [(4, 2)]),
        ("ulysses", 2, [(4, 2), (4, 1), (2, 2)]),
        ("ulysses", 4, [(4, 2), (8, 4)]),
    ],
)
def test_outputs_and_gradients_equal_one_process(method: Method, size: int, heads: list[tuple[int, int]]) -> None:
    assert run_ranks(exact_rank, size, method, heads) == [len(heads) * len(LAYOUTS) * 8] * size
