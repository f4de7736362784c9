"""Attention on CUDA: flash kernels against plain products, packed documents, ring and Ulysses by NCCL."""

from __future__ import annotations

import copy
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel import kernels
from parallel.context import Context
from tests.gpu.devices import needs_gpus
from tests.ranks import run_ranks
from trainsys.config import ModelConfig
from trainsys.models import blocks, build
from trainsys.models.attention import PlainCore, document_mask
from trainsys.models.context import share_sequences

pytestmark = needs_gpus(1)
TIMEOUT_S = 300
BATCH, LENGTH, HEADS, KV_HEADS = 2, 512, 8, 2
FEW_ROUNDINGS = 8 * torch.finfo(torch.bfloat16).eps
"""Of the largest value: kernels round each operand and result once to bf16 and sum in fp32."""


def ids(length: int = LENGTH) -> Tensor:
    """Documents of odd lengths, of one token, and one that is most of a row."""
    changes = torch.zeros(BATCH, length, dtype=torch.int64)
    changes[0, [1, 2, 77, 78, 200, 391]] = 1
    changes[1, [length - 1]] = 1
    return changes.cumsum(1)


def inputs(width: int, device: str = "cuda") -> list[Tensor]:
    torch.manual_seed(2)
    sizes = (HEADS, KV_HEADS, KV_HEADS, HEADS)
    return [torch.randn(BATCH, LENGTH, n, width).bfloat16().to(device) for n in sizes]


def near(mine: Tensor, exact: Tensor) -> None:
    """Within a few roundings of the largest value."""
    assert mine.isfinite().all()
    torch.testing.assert_close(mine.double(), exact.double(), rtol=0, atol=FEW_ROUNDINGS * float(exact.abs().max()))


def attention(operands: list[Tensor], found: kernels.Documents | None) -> list[Tensor]:
    """Output, log-sum-exp and gradients of causal attention."""
    query, key, value, grad = operands
    result = kernels.forward(query, key, value, scale=0.1, causal=True, found=found)
    return [*result, *kernels.backward(grad, query, key, value, result, scale=0.1, causal=True, found=found)]


def long_rank(rank: int, world_size: int) -> None:
    """Lengths that cuDNN gets, in either order of queries and keys."""
    for queries, keys, causal in ((512, 512, True), (256, 768, False), (768, 256, False)):
        torch.manual_seed(queries)
        sizes = ((queries, HEADS), (keys, KV_HEADS), (keys, KV_HEADS), (queries, HEADS))
        operands = [torch.randn(BATCH, *size, 64).bfloat16().cuda() for size in sizes]
        results = []
        for query, key, value, grad in (operands, [x.double() for x in operands]):
            result = kernels.forward(query, key, value, scale=0.1, causal=causal)
            results.append([*result, *kernels.backward(grad, query, key, value, result, scale=0.1, causal=causal)])
        for mine, theirs in zip(*results, strict=True):
            near(mine, theirs)


def flash_rank(rank: int, world_size: int) -> None:
    for width in (64, 128):
        operands = inputs(width)
        wide = [x.double() for x in operands]
        assert kernels.choose(operands[0]) == "flash"
        assert kernels.choose(wide[0]) == "plain"
        for of in (None, ids().cuda(), ids()):
            exact = attention(wide, kernels.documents(of, wide[0]))
            for mine, theirs in zip(attention(operands, kernels.documents(of, operands[0])), exact, strict=True):
                near(mine, theirs)
        pieces = kernels.Pieces.of([5, 300, 1], [200, 1, 130], operands[0].device)
        flat = [
            x.flatten(0, 1)[: sum(n)]
            for x, n in zip(operands, (pieces.queries, pieces.keys, pieces.keys), strict=False)
        ]
        grad = operands[3].flatten(0, 1)[: sum(pieces.queries)]
        results = []
        for query, key, value, back in ((*flat, grad), [x.double() for x in (*flat, grad)]):
            result = kernels.pieces_forward(query, key, value, pieces, scale=0.1)
            grads = kernels.pieces_backward(back, query, key, value, result, pieces, scale=0.1)
            results.append((*result, *grads))
        for mine, theirs in zip(*results, strict=True):
            near(mine, theirs)


def test_flash_kernels_agree_with_plain_products() -> None:
    run_ranks(flash_rank, 1, timeout_s=TIMEOUT_S)


def test_kernels_for_long_sequences_agree_with_plain_products() -> None:
    run_ranks(long_rank, 1, timeout_s=TIMEOUT_S)


def model() -> nn.Module:
    config = ModelConfig(num_layers=2, dim=512, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=64, vocab_size=128)
    sizes = {"vocab_size": 128, "max_positions": LENGTH}
    return build(config, **sizes, recompute="none", seed=0).cuda()


def decoder_rank(rank: int, world_size: int) -> None:
    exact = model()
    packed = copy.deepcopy(exact).bfloat16()
    compiled = copy.deepcopy(packed)
    for block in blocks(compiled):
        block.compile(fullgraph=True)
    tokens = torch.randint(128, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0)).cuda()
    for of in (ids().cuda(), ids().flip(1).cuda(), None):
        logits = []
        for module in (exact, packed, compiled):
            out, _ = module(tokens, document_ids_BT=of)
            out.float().square().mean().backward()
            logits.append(out.detach().float())
        for mine in logits[1:]:
            assert float((mine - logits[0]).norm() / logits[0].norm()) < 0.02
    for name, theirs in exact.named_parameters():
        for module in (packed, compiled):
            mine = dict(module.named_parameters())[name.replace("_orig_mod.", "")].grad
            assert theirs.grad is not None
            assert mine is not None
            assert float((mine.float() - theirs.grad).norm() / theirs.grad.norm()) < 0.05, name


def test_packed_documents_in_bf16_agree_with_a_mask_in_fp32_compiled_or_not() -> None:
    run_ranks(decoder_rank, 1, timeout_s=TIMEOUT_S)


def waits_rank(rank: int, world_size: int) -> None:
    query, key, value, _ = inputs(64)
    core = PlainCore(64)
    plan = core.prepare(ids().cuda(), None, query)
    assert isinstance(plan, kernels.Documents)
    leaves = [x.requires_grad_() for x in (query, key, value)]
    torch.cuda.set_sync_debug_mode("error")
    out = core(leaves[0], leaves[1], leaves[2], plan)
    out.backward(torch.ones_like(out))  # type: ignore[no-untyped-call]
    torch.cuda.set_sync_debug_mode("default")
    mask = document_mask(ids().cuda(), torch.bfloat16)
    near(out, core(*leaves, mask))


def test_a_layer_never_waits_for_the_gpu() -> None:
    run_ranks(waits_rank, 1, timeout_s=TIMEOUT_S)


def shared_rank(rank: int, world_size: int) -> list[str]:
    torch.cuda.set_device(rank)
    assert dist.group.WORLD is not None
    wholes = inputs(64)
    methods: list[Literal["ring", "ulysses"]] = ["ring", "ulysses"]
    compared = []
    for of in (None, ids().cuda()):
        wide = [x.double() for x in wholes]
        exact = attention_scaled(wide, kernels.documents(of, wide[0]))
        for method in methods:
            context = Context(dist.group.WORLD, method)
            *operands, grad = (context.cut(x) for x in wholes)
            leaves = [x.requires_grad_() for x in operands]
            plan = context.core.prepare(None if of is None else context.cut_documents(of), None, leaves[0])
            for _ in range(3):  # buffers of a pass before must not be read by the next
                for leaf in leaves:
                    leaf.grad = None
                out = context.core(leaves[0], leaves[1], leaves[2], plan)
                out.backward(grad)  # type: ignore[no-untyped-call]
                found: list[Any] = [out, *(x.grad for x in leaves)]
                for mine, theirs in zip(found, exact, strict=True):
                    near(context.gather(mine), theirs)
                    compared.append(method)
    return compared


def attention_scaled(operands: list[Tensor], found: kernels.Documents | None) -> list[Tensor]:
    """Output and gradients with the default scale."""
    query, key, value, grad = operands
    scale = query.shape[-1] ** -0.5
    result = kernels.forward(query, key, value, scale=scale, causal=True, found=found)
    return [result[0], *kernels.backward(grad, query, key, value, result, scale=scale, causal=True, found=found)]


@pytest.mark.parametrize("size", [pytest.param(2, id="2 GPUs", marks=needs_gpus(2))])
def test_ring_and_ulysses_agree_with_one_gpu(size: int) -> None:
    results = run_ranks(shared_rank, size, backend="nccl", timeout_s=TIMEOUT_S)
    assert all(len(result) == 48 for result in results)


def shared_decoder_rank(rank: int, world_size: int) -> None:
    torch.cuda.set_device(rank)
    assert dist.group.WORLD is not None
    whole = model()
    tokens = torch.randint(128, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0)).cuda()
    logits, _ = whole(tokens, document_ids_BT=ids().cuda())
    methods: list[Literal["ring", "ulysses"]] = ["ring", "ulysses"]
    for method in methods:
        context = Context(dist.group.WORLD, method)
        shared = copy.deepcopy(whole).bfloat16()
        share_sequences(shared, context.core)
        for block in blocks(shared):
            block.compile()
        part = context.cut_batch(tokens, document_ids_BW=ids().cuda())
        parts, _ = shared(part.tokens, positions_BT=part.positions, document_ids_BT=part.document_ids)
        parts.float().square().mean().backward()
        mine = context.gather(parts).float()
        assert float((mine - logits).norm() / logits.norm()) < 0.02


@pytest.mark.parametrize("size", [pytest.param(2, id="2 GPUs", marks=needs_gpus(2))])
def test_a_compiled_decoder_on_two_gpus_agrees_with_one(size: int) -> None:
    run_ranks(shared_decoder_rank, size, backend="nccl", timeout_s=TIMEOUT_S)
