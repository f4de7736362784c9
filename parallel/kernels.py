"""Softmax attention with its log-sum-exp, forward and backward, by the fastest kernel that a device and dtype have.

    flash   CUDA, bf16 or fp16, head widths that are multiples of 8 up to 256: the flash kernels of torch, which read
            packed documents by their bounds (`aten._flash_attention_forward`, its arguments alike in torch 2.8 to
            2.13); without documents, from Hopper on and for widths up to 128, cuDNN's, which torch's own attention
            takes there
    cpu     CPU, fp32, bf16 or fp16: torch's fused CPU kernel, documents as an additive mask
    plain   everything else, above all float64: products and exponentials, a bounded number of scores at a time

`choose` says which. All return the output in the dtype of the query and the log-sum-exp in at least fp32, and their
backward takes the output and log-sum-exp over ALL keys, of which those at hand may be a part: what a ring needs.
"""

# Shapes: B batch, T query tokens, S key tokens, H query heads, K key/value heads, G = H / K, E head width; N, M
# tokens of several rows side by side.

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

_MOST_SCORES = 2**24
"""Most scores that the plain kernel holds at a time; 128 MiB in float64."""


class Documents(NamedTuple):
    """Packed documents of a batch, found once a forward; attention is causal inside each and nowhere else."""

    numbers_BT: Tensor
    """Rising numbers; equal inside a document and nowhere else in the row."""
    bounds_N: Tensor
    """int32: where documents begin in the rows laid end to end, then the end, which may be repeated."""
    longest: int
    """At least the tokens of the longest document."""
    bias_BTT: Tensor | None
    """[B, 1, T, T], 0 where a token sees and -inf where not, in the dtype of the activations; None for flash."""


def documents(ids_BT: Tensor | None, like: Tensor) -> Documents | None:
    """Find the documents of a batch; None where every row is one. `like` has the device and dtype of activations.

    A document ends wherever the id changes, also when an id comes back later. The host waits once for an accelerator
    that has the ids; ids that stay on the CPU cost no wait.
    """
    if ids_BT is None:
        return None
    batch, length = ids_BT.shape
    change_BT = functional.pad(ids_BT[:, 1:] != ids_BT[:, :-1], (1, 0))
    first_BT = change_BT.clone()
    first_BT[:, 0] = True
    starts = first_BT.flatten().nonzero().flatten().cpu()
    if len(starts) == batch:
        return None
    end = torch.tensor([batch * length])
    longest = int(torch.cat((starts, end)).diff().max())
    # Few shapes, so that compiled code is compiled for few: documents of no tokens cost the kernels nothing.
    padded = 1 << len(starts).bit_length()
    bounds = torch.cat((starts, end.expand(padded - len(starts)))).to(torch.int32)
    numbers_BT = change_BT.to(like.device).cumsum(1)
    bias = None if _flash_device(like) else _bias(numbers_BT, like.dtype)
    return Documents(numbers_BT, bounds.to(like.device), -(-longest // 128) * 128, bias)


def choose(query: Tensor) -> Literal["flash", "cpu", "plain"]:
    """Return the name of the kernel for queries like this one, whose last dimension is the head width."""
    width = query.shape[-1]
    if _flash_device(query) and width % 8 == 0 and width <= 256:
        return "flash"
    if query.device.type == "cpu" and query.dtype in (torch.float32, torch.bfloat16, torch.float16):
        return "cpu"
    return "plain"


def packed_attention(
    query_BTHE: Tensor, key_BTKE: Tensor, value_BTKE: Tensor, found: Documents, *, scale: float | None = None
) -> Tensor:
    """Return causal attention inside documents [B, T, H, E] by the flash kernel; autograd and torch.compile know it."""
    query, key, value = (x.flatten(0, 1) for x in (query_BTHE, key_BTKE, value_BTKE))
    bounds, longest = found.bounds_N, found.longest
    out: Tensor = torch.ops.aten._flash_attention_forward(
        query, key, value, bounds, bounds, longest, longest, 0.0, True, False, scale=scale
    )[0]
    return out.view(query_BTHE.shape)


def forward(
    query_BTHE: Tensor,
    key_BSKE: Tensor,
    value_BSKE: Tensor,
    *,
    scale: float,
    causal: bool,
    found: Documents | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the output [B, T, H, E] and log-sum-exp [B, T, H]; causal wants T = S, documents want causal."""
    kernel = choose(query_BTHE)
    if kernel == "flash" and found is None and _takes_cudnn(query_BTHE, key_BSKE):
        return _cudnn_forward(query_BTHE, key_BSKE, value_BSKE, scale, causal)
    if kernel == "cpu":
        return _cpu_forward(query_BTHE, key_BSKE, value_BSKE, scale, causal, found)
    if kernel == "plain":
        return _plain_forward(query_BTHE, key_BSKE, value_BSKE, scale, causal, found)
    if found is None:
        tokens, keys = query_BTHE.shape[1], key_BSKE.shape[1]
        out, lse_BHT = torch.ops.aten._flash_attention_forward(
            query_BTHE, key_BSKE, value_BSKE, None, None, tokens, keys, 0.0, causal, False, scale=scale
        )[:2]
        return out, lse_BHT.transpose(1, 2)
    query, key, value = (x.flatten(0, 1) for x in (query_BTHE, key_BSKE, value_BSKE))
    bounds, longest = found.bounds_N, found.longest
    out, lse_HN = torch.ops.aten._flash_attention_forward(
        query, key, value, bounds, bounds, longest, longest, 0.0, causal, False, scale=scale
    )[:2]
    return out.view(query_BTHE.shape), lse_HN.T.unflatten(0, query_BTHE.shape[:2])


def backward(
    grad_BTHE: Tensor,
    query_BTHE: Tensor,
    key_BSKE: Tensor,
    value_BSKE: Tensor,
    result: tuple[Tensor, Tensor],
    *,
    scale: float,
    causal: bool,
    found: Documents | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value; `result` is output and log-sum-exp [B, T, H] over all keys."""
    tensors = (query_BTHE, key_BSKE, value_BSKE)
    kernel = choose(query_BTHE)
    if kernel == "flash" and found is None and _takes_cudnn(query_BTHE, key_BSKE):
        return _cudnn_backward(grad_BTHE, tensors, result, scale, causal)
    if kernel == "cpu":
        return _cpu_backward(grad_BTHE, tensors, result, scale, causal, found)
    if kernel == "plain":
        return _plain_backward(grad_BTHE, tensors, result, scale, causal, found)
    (out, lse_BTH), (grad, shape) = result, (grad_BTHE, query_BTHE.shape)
    if found is None:
        return _flash_backward(
            grad, tensors, out, lse_BTH.transpose(1, 2), None, (shape[1], key_BSKE.shape[1]), (causal, scale)
        )
    flat = tuple(x.flatten(0, 1) for x in tensors)
    bounds = (found.bounds_N, found.bounds_N)
    longest = (found.longest, found.longest)
    lse_HN = lse_BTH.flatten(0, 1).T
    grads = _flash_backward(grad.flatten(0, 1), flat, out.flatten(0, 1), lse_HN, bounds, longest, (causal, scale))
    return grads[0].view(shape), grads[1].view(key_BSKE.shape), grads[2].view(value_BSKE.shape)


class Pieces(NamedTuple):
    """Rectangles of attention laid end to end: piece i is `queries[i]` tokens that see all of `keys[i]` tokens."""

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    query_bounds: Tensor
    """int32, on the device of the activations: where pieces begin, then the end."""
    key_bounds: Tensor

    @classmethod
    def of(cls, queries: Sequence[int], keys: Sequence[int], device: torch.device) -> Pieces:
        """Return the pieces of these sizes."""
        query_bounds, key_bounds = (
            functional.pad(torch.tensor(sizes).cumsum(0), (1, 0)).to(torch.int32).to(device)
            for sizes in (queries, keys)
        )
        return cls(tuple(queries), tuple(keys), query_bounds, key_bounds)


def pieces_forward(
    query_NHE: Tensor, key_MKE: Tensor, value_MKE: Tensor, pieces: Pieces, *, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the output [N, H, E] and log-sum-exp [N, H] of pieces, each of which sees all of its keys."""
    if choose(query_NHE) == "flash":
        bounds = (pieces.query_bounds, pieces.key_bounds)
        longest = (max(pieces.queries), max(pieces.keys))
        out, lse_HN = torch.ops.aten._flash_attention_forward(
            query_NHE, key_MKE, value_MKE, *bounds, *longest, 0.0, False, False, scale=scale
        )[:2]
        return out, lse_HN.T
    parts = [
        forward(query, key, value, scale=scale, causal=False)
        for query, key, value in zip(*_split(pieces, (query_NHE,), (key_MKE, value_MKE)), strict=True)
    ]
    return torch.cat([out[0] for out, _ in parts]), torch.cat([lse[0] for _, lse in parts])


def pieces_backward(
    grad_NHE: Tensor,
    query_NHE: Tensor,
    key_MKE: Tensor,
    value_MKE: Tensor,
    result: tuple[Tensor, Tensor],
    pieces: Pieces,
    *,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value; `result` is output and log-sum-exp [N, H] over all keys."""
    out, lse = result
    if choose(query_NHE) == "flash":
        return _flash_backward(
            grad_NHE,
            (query_NHE, key_MKE, value_MKE),
            out,
            lse.T,
            (pieces.query_bounds, pieces.key_bounds),
            (max(pieces.queries), max(pieces.keys)),
            (False, scale),
        )
    split = _split(pieces, (grad_NHE, query_NHE, out, lse), (key_MKE, value_MKE))
    parts = [
        backward(grad, query, key, value, (part, part_lse), scale=scale, causal=False)
        for grad, query, part, part_lse, key, value in zip(*split, strict=True)
    ]
    dq, dk, dv = (torch.cat([part[i][0] for part in parts]) for i in range(3))
    return dq, dk, dv


def _split(pieces: Pieces, by_query: Sequence[Tensor], by_key: Sequence[Tensor]) -> list[list[Tensor]]:
    """Tensors by piece, each piece a batch of one row."""
    sized = [(x, pieces.queries) for x in by_query] + [(x, pieces.keys) for x in by_key]
    return [[part[None] for part in torch.split(x, list(sizes))] for x, sizes in sized]


def _flash_device(like: Tensor) -> bool:
    if like.device.type != "cuda" or like.dtype not in (torch.bfloat16, torch.float16):
        return False
    has_kernel = torch.backends.cuda.is_flash_attention_available() and torch.version.cuda is not None
    return has_kernel and torch.cuda.get_device_capability(like.device) >= (8, 0)


_CUDNN_TOKENS = 256
"""cuDNN plans anew for every length, so it gets multiples of this alone: chunks of sequences, not ends of documents."""


def _takes_cudnn(query: Tensor, key: Tensor) -> bool:
    lengths = query.shape[1] % _CUDNN_TOKENS == 0 and key.shape[1] % _CUDNN_TOKENS == 0
    return lengths and query.shape[-1] <= 128 and _has_cudnn(query.device)


@cache
def _has_cudnn(device: torch.device) -> bool:
    is_available: bool = torch.backends.cudnn.is_available()  # type: ignore[no-untyped-call]
    return is_available and torch.cuda.get_device_capability(device) >= (9, 0)


def _cudnn_forward(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    by_head = (x.transpose(1, 2) for x in (query, key, value))
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *by_head, None, True, 0.0, causal, False, scale=scale
    )
    return out.transpose(1, 2), lse.view(out.shape[:3]).transpose(1, 2)


def _cudnn_backward(
    grad: Tensor, tensors: Sequence[Tensor], result: tuple[Tensor, Tensor], scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    out, lse_BTH = result
    query, key, value, out, grad = (x.transpose(1, 2) for x in (*tensors, out.contiguous(), grad.contiguous()))
    no_dropout = torch.zeros(2, 1, dtype=torch.int64, device=grad.device).unbind()
    grads: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        grad,
        query,
        key,
        value,
        out,
        lse_BTH.transpose(1, 2).contiguous()[..., None],
        *no_dropout,
        None,
        None,
        None,
        query.shape[2],
        key.shape[2],
        0.0,
        causal,
        scale=scale,
    )
    dq, dk, dv = (x.transpose(1, 2) for x in grads)
    return dq, dk, dv


def _flash_backward(
    grad: Tensor,
    tensors: Sequence[Tensor],
    out: Tensor,
    lse: Tensor,
    bounds: tuple[Tensor, Tensor] | None,
    longest: tuple[int, int],
    how: tuple[bool, float],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by the flash kernel; `lse` is [B, H, T] or [H, N], `how` is whether it is causal, and the scale."""
    causal, scale = how
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=grad.device), grad.new_empty(0)
    grads: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._flash_attention_backward(
        grad.contiguous(),
        *tensors,
        out.contiguous(),
        lse.contiguous(),
        *(bounds or (None, None)),
        *longest,
        0.0,
        causal,
        *no_dropout,
        scale=scale,
    )
    return grads


def _bias(numbers_BT: Tensor, dtype: torch.dtype) -> Tensor:
    visible_BTT = (numbers_BT[:, :, None] == numbers_BT[:, None, :]).tril_()
    return torch.zeros_like(visible_BTT, dtype=dtype).masked_fill_(~visible_BTT, float("-inf"))[:, None]


def _repeated(x_BSKE: Tensor, num_heads: int) -> Tensor:
    group = num_heads // x_BSKE.shape[2]
    return x_BSKE if group == 1 else x_BSKE.repeat_interleave(group, 2)


def _cpu_forward(
    query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool, found: Documents | None
) -> tuple[Tensor, Tensor]:
    heads = query.shape[2]
    out_BHTE, lse_BHT = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *(x.transpose(1, 2) for x in (query, _repeated(key, heads), _repeated(value, heads))),
        0.0,
        causal and found is None,
        attn_mask=None if found is None else found.bias_BTT,
        scale=scale,
    )
    return out_BHTE.transpose(1, 2), lse_BHT.transpose(1, 2)


def _cpu_backward(
    grad: Tensor,
    tensors: tuple[Tensor, Tensor, Tensor],
    result: tuple[Tensor, Tensor],
    scale: float,
    causal: bool,
    found: Documents | None,
) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = tensors
    heads, kv_heads = query.shape[2], key.shape[2]
    inputs = (grad, query, _repeated(key, heads), _repeated(value, heads), *result)
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *(x.transpose(1, 2) for x in inputs),
        0.0,
        causal and found is None,
        attn_mask=None if found is None else found.bias_BTT,
        scale=scale,
    )
    dq, dk, dv = (x.transpose(1, 2) for x in grads)
    if heads != kv_heads:
        dk, dv = (torch.unflatten(x, 2, (kv_heads, -1)).sum(3) for x in (dk, dv))
    return dq, dk, dv


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _plain_scores(
    query: Tensor, key: Tensor, scale: float, causal: bool, found: Documents | None
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Scores [B, K, G, t, s], some rows of queries at a time: which queries, which keys, and the scores."""
    (batch, tokens, heads, _), keys = query.shape, key.shape[1]
    query_BTKGE, key = torch.unflatten(_wide(query), 2, (key.shape[2], -1)), _wide(key)
    rows = max(1, _MOST_SCORES // max(1, batch * heads * keys))
    for start in range(0, tokens, rows):
        stop = min(tokens, start + rows)
        seen = slice(0, stop if causal else keys)
        scores = torch.einsum("btkge,bske->bkgts", query_BTKGE[:, start:stop] * scale, key[:, seen])
        if causal:
            index = torch.arange(stop, device=query.device)
            hidden = index[None, :] > index[start:stop, None]
            if found is not None:
                other = found.numbers_BT[:, start:stop, None] != found.numbers_BT[:, None, seen]
                hidden = (hidden | other)[:, None, None]
            scores = scores.masked_fill(hidden, float("-inf"))
        yield slice(start, stop), seen, scores


def _plain_forward(
    query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool, found: Documents | None
) -> tuple[Tensor, Tensor]:
    wide_value = _wide(value)
    out, lse = torch.empty_like(query), _wide(query.new_empty(query.shape[:3]))
    for rows, seen, scores in _plain_scores(query, key, scale, causal, found):
        part_lse = scores.logsumexp(-1, keepdim=True)
        part = torch.einsum("bkgts,bske->btkge", (scores - part_lse).exp(), wide_value[:, seen])
        out[:, rows] = part.flatten(2, 3)
        lse[:, rows] = part_lse[..., 0].flatten(1, 2).transpose(1, 2)
    return out, lse


def _plain_backward(
    grad: Tensor,
    tensors: tuple[Tensor, Tensor, Tensor],
    result: tuple[Tensor, Tensor],
    scale: float,
    causal: bool,
    found: Documents | None,
) -> tuple[Tensor, Tensor, Tensor]:
    (query, key, value), (out, lse) = tensors, result
    grouped = (key.shape[2], -1)
    wide_query, wide_key, wide_value = torch.unflatten(_wide(query), 2, grouped), _wide(key), _wide(value)
    wide_grad = _wide(grad)
    delta_BKGT, lse_BKGT = (
        torch.unflatten(x, 2, grouped).movedim(1, -1) for x in ((wide_grad * _wide(out)).sum(-1), lse)
    )
    wide_grad = torch.unflatten(wide_grad, 2, grouped)
    dq = torch.empty_like(query)
    dk, dv = torch.zeros_like(wide_key), torch.zeros_like(wide_value)
    for rows, seen, scores in _plain_scores(query, key, scale, causal, found):
        weights = (scores - lse_BKGT[..., rows, None]).exp()
        dv[:, seen] += torch.einsum("bkgts,btkge->bske", weights, wide_grad[:, rows])
        dweights = torch.einsum("btkge,bske->bkgts", wide_grad[:, rows], wide_value[:, seen])
        dscores = weights * (dweights - delta_BKGT[..., rows, None]) * scale
        dq[:, rows] = torch.einsum("bkgts,bske->btkge", dscores, wide_key[:, seen]).flatten(2, 3)
        dk[:, seen] += torch.einsum("bkgts,btkge->bske", dscores, wide_query[:, rows])
    return dq, dk.to(key.dtype), dv.to(value.dtype)


class CausalAttention(torch.autograd.Function):
    """Causal attention of whole sequences, inside documents where there are any; for Ulysses' share of heads."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, found: Documents | None) -> Tensor:
        out, lse = forward(query, key, value, scale=scale, causal=True, found=found)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.scale, ctx.found = scale, found
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        result = (out, lse)
        return *backward(grads[0], query, key, value, result, scale=ctx.scale, causal=True, found=ctx.found), None, None
