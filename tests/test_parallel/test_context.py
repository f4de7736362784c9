"""Ring and Ulysses attention against one process: layouts, outputs and gradients, documents and grouped heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import hypothesis.strategies as st
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from torch import Tensor

from parallel import blocks, kernels, ring, symmetric
from parallel.blocks import Block, Span, causal_block, document_block, rectangle_sizes
from parallel.context import Context, number_documents, zigzag
from parallel.ring import in_order
from parallel.ulysses import by_rank, shared_heads
from tests.ranks import run_ranks
from tests.test_parallel.slots import Buffers

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


def pushing_rank(rank: int, world_size: int, folder: Path) -> int:
    """As `exact_rank`, with keys and gradients pushed, gradients in as many pieces as there are rows."""
    fake: Any = Buffers(folder, rank, world_size)
    symmetric.available = lambda group, like: True
    symmetric.buffers = lambda group, device: fake  # type: ignore[assignment]
    compared = exact_rank(rank, world_size, "ring", [(4, 2), (3, 1)])
    assert fake.num_open == 0
    assert fake.num_transfers == compared // 4 * 3 * (world_size - 1)  # keys twice, gradients once
    return compared


@pytest.mark.parametrize("size", [2, 3, 4])
def test_pushed_keys_and_gradients_equal_one_process(size: int, tmp_path: Path) -> None:
    assert run_ranks(pushing_rank, size, tmp_path) == [2 * len(LAYOUTS) * 8] * size


def test_what_ranks_saw_is_merged_in_one_pass_or_by_index() -> None:
    for span in (slice(0, 6), slice(3, 6), slice(1, 4)):
        torch.manual_seed(3)
        out, part = torch.randn(2, 6, 3, 4).bfloat16(), torch.randn(2, 6, 3, 4)[:, span].bfloat16()
        lse, part_lse = torch.randn(2, 6, 3), torch.randn(2, 6, 3)[:, span]
        kept = out.clone()
        merged = ring._merge(Span(span), out, lse, part, part_lse, torch.bfloat16)
        rows = torch.arange(12).view(2, 6)[:, span].flatten()
        flat, flat_lse = part.flatten(0, 1), part_lse.flatten(0, 1)
        scattered = ring._merge(Span(span, rows), out, lse, flat, flat_lse, torch.bfloat16)
        assert torch.equal(out, kept)
        for one, other in zip(merged, scattered, strict=True):
            torch.testing.assert_close(one.float(), other.float(), rtol=torch.finfo(one.dtype).eps, atol=1e-6)
        share = ((part_lse.exp()) / (part_lse.exp() + lse[:, span].exp()))[..., None]
        exact = out[:, span].float() * (1 - share) + part.float() * share
        torch.testing.assert_close(merged[0][:, span].float(), exact, rtol=2**-8, atol=2**-8)


@pytest.mark.parametrize("large_bytes", [0, 2**20])
def test_a_span_adds_to_its_tokens_alone(large_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_LARGE_BYTES", large_bytes)
    x, values = torch.randn(3, 6, 2).bfloat16(), torch.randn(3, 4, 2).bfloat16()
    wanted = torch.cat((x[:, :1], x[:, 1:5] + values, x[:, 5:]), 1)
    Span(slice(1, 5)).add(x, values)
    assert torch.equal(x, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["causal", "odd lengths"])
def test_fused_kernels_agree_with_the_plain_one(dtype: torch.dtype, layout: str) -> None:
    """Both round to the dtype once an element and sum in fp32, so they differ by a few roundings of the largest."""
    query, key, value, grad = inputs(4, 2, dtype)
    found = kernels.documents(LAYOUTS[layout], query)
    exact = kernels.documents(LAYOUTS[layout], query.double())
    out, lse = kernels.forward(query, key, value, scale=0.5, causal=True, found=found)
    grads = kernels.backward(grad, query, key, value, (out, lse), scale=0.5, causal=True, found=found)
    assert kernels.choose(query) == "cpu"
    assert kernels.choose(query.double()) == "plain"
    wide = [x.double() for x in (query, key, value)]
    wide_out, wide_lse = kernels.forward(*wide, scale=0.5, causal=True, found=exact)
    result = (wide_out, wide_lse)
    wide_grads = kernels.backward(grad.double(), *wide, result, scale=0.5, causal=True, found=exact)
    assert lse.dtype == torch.float32
    for mine, theirs in zip((out, lse, *grads), (*result, *wide_grads), strict=True):
        few_roundings = 8 * torch.finfo(dtype).eps * float(theirs.abs().max())
        torch.testing.assert_close(mine.double(), theirs, rtol=0, atol=few_roundings)


def test_plain_attention_a_few_scores_at_a_time_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value, grad = inputs(4, 2, torch.float64)
    found = kernels.documents(LAYOUTS["odd lengths"], query)
    results = []
    for most in (2**24, 7 * BATCH * 4 * LENGTH):
        monkeypatch.setattr(kernels, "_MOST_SCORES", most)
        result = kernels.forward(query, key, value, scale=0.5, causal=True, found=found)
        grads = kernels.backward(grad, query, key, value, result, scale=0.5, causal=True, found=found)
        results.append((*result, *grads))
    for whole, parts in zip(*results, strict=True):
        torch.testing.assert_close(parts, whole, **EXACT)


def test_zigzag_balances_causal_work() -> None:
    for size in (1, 2, 3, 8):
        length = 4 * 2 * size
        parts = [zigzag(length, rank, size) for rank in range(size)]
        assert torch.cat(parts).sort().values.tolist() == list(range(length))
        assert all(part.tolist() == sorted(part.tolist()) for part in parts)
        work = [int(part.sum()) for part in parts]  # token i sees i tokens before it
        assert len(set(work)) == 1
    assert zigzag(12, 1, 3).tolist() == [2, 3, 8, 9]


@pytest.mark.parametrize("length", [0, 4, 10])
def test_a_length_that_ranks_cannot_share_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match=f"a sequence of {length} tokens has no 8 equal chunks.* allowed: a length"):
        zigzag(length, 0, 4)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "shared"),
    [
        (4, 4, 2, [[0, 1], [2, 3]]),
        (8, 2, 4, [[0], [0], [1], [1]]),
        (8, 1, 2, [[0], [0]]),
        (6, 3, 3, [[0], [1], [2]]),
        (12, 6, 3, [[0, 1], [2, 3], [4, 5]]),
    ],
)
def test_key_heads_go_where_they_are_needed(heads: int, kv_heads: int, size: int, shared: list[list[int]]) -> None:
    assert shared_heads(heads, kv_heads, size) == shared


@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(6, 2, 4), (6, 2, 3), (12, 4, 6)])
def test_heads_that_cannot_be_shared_are_refused(heads: int, kv_heads: int, size: int) -> None:
    problem = f"'ulysses' cannot share {heads} query and {kv_heads} key/value heads among {size} context ranks"
    with pytest.raises(ValueError, match=f"{problem}; allowed: .* or 'ring'"):
        shared_heads(heads, kv_heads, size)


def rows_seen(block: Block, batch: int, length: int) -> Tensor:
    """[B, T, T]: which queries of one rank see which keys of another by a block."""
    places = torch.arange(batch * length).view(batch, length)
    queries, keys = block.queries.take(places), block.keys.take(places)
    if block.pieces is None:
        pairs = list(zip(queries, keys, strict=True))
    else:
        pairs = list(zip(queries.split(block.pieces.queries), keys.split(block.pieces.keys), strict=True))
    seen = torch.zeros(batch * length, batch * length, dtype=torch.int64)
    for own, others in pairs:
        seen[own[:, None], others] += 1
    return torch.stack([seen[i * length : (i + 1) * length, i * length : (i + 1) * length] for i in range(batch)])


@st.composite
def document_layouts(draw: st.DrawFn) -> tuple[int, Tensor]:
    size, chunk, batch = draw(st.integers(2, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    length = 2 * size * chunk
    change = st.lists(st.booleans(), min_size=length, max_size=length)
    ids = torch.tensor([draw(change) for _ in range(batch)]).cumsum(1)
    return size, ids


@settings(max_examples=80, deadline=None)
@given(document_layouts())
def test_blocks_of_any_documents_cover_what_is_seen_once(layout: tuple[int, Tensor]) -> None:
    size, ids = layout
    batch, whole = ids.shape
    length = whole // size
    visible = (ids[:, :, None] == ids[:, None, :]).tril()
    parts = [zigzag(whole, rank, size) for rank in range(size)]
    numbers = torch.stack([ids[:, part] for part in parts])
    for rank in range(size):
        local = (numbers[rank][:, :, None] == numbers[rank][:, None, :]).tril()
        assert torch.equal(visible[:, parts[rank]][:, :, parts[rank]], local)
        for other in range(size):
            if other == rank:
                continue
            sizes = rectangle_sizes(numbers, rank, other)
            block = document_block(length, rank, other, sizes.tolist(), torch.device("cpu"))
            wanted = visible[:, parts[rank]][:, :, parts[other]].long()
            found = torch.zeros_like(wanted) if block is None else rows_seen(block, batch, length)
            assert torch.equal(found, wanted)


def test_a_causal_block_is_all_that_is_seen() -> None:
    size, length = 3, 4
    visible = torch.ones(size * length, size * length).tril().long()
    parts = [zigzag(size * length, rank, size) for rank in range(size)]
    for rank in range(size):
        for other in {0, 1, 2} - {rank}:
            seen = rows_seen(causal_block(length, rank, other), 1, length)
            assert torch.equal(seen[0], visible[parts[rank]][:, parts[other]])


def test_parts_and_sequences_convert_both_ways() -> None:
    whole = torch.arange(2 * 24 * 3).view(2, 24, 3)
    parts = torch.stack([whole[:, zigzag(24, rank, 3)] for rank in range(3)])
    assert torch.equal(in_order(parts), whole)
    assert torch.equal(by_rank(whole, 3), parts)


def cut_rank(rank: int, world_size: int) -> str:
    assert dist.group.WORLD is not None
    context = Context(dist.group.WORLD)
    tokens = torch.arange(16).view(2, 8)
    part = context.cut_batch(tokens, targets_BW=tokens + 1, document_ids_BW=packed([3, 5], [8]))
    assert torch.equal(context.gather(part.tokens), tokens)
    assert part.targets is not None
    assert part.document_ids is not None
    assert torch.equal(part.targets, part.tokens + 1)
    assert torch.equal(context.gather(part.positions), torch.arange(8).expand(2, 8))
    assert context.gather(part.document_ids).tolist() == [[0] * 3 + [1] * 5, [0] * 8]
    falling = torch.tensor([[1, 1, 0, 0]])  # as a loader may number them
    like = torch.zeros(1)
    with pytest.raises(ValueError, match="document ids fall along a sequence") as caught:
        context.core.prepare(falling, None, like)
    return str(caught.value)


@pytest.mark.parametrize("size", [1, 2])
def test_batches_are_cut_alike(size: int) -> None:
    run_ranks(cut_rank, size)
