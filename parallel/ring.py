"""Ring attention: every rank keeps its queries while keys and values of the others pass by; exact.

A sequence is cut zigzag: of 2 x size chunks rank r has chunks r and 2 x size - 1 - r, so that causal work is even. On a
rank the two lie in true order, which leaves three cases (L tokens a chunk):

    own keys                    causal attention over the 2 L tokens that are there
    keys of a lower rank        all 2 L queries see its first chunk, whole
    keys of a higher rank       the last L queries see both of its chunks, whole

With packed documents only one document reaches from another rank's keys into this rank's queries: the one that the
queries begin with. Then a row's rectangle is a prefix of those queries and a suffix of those keys: still no mask.

In step s a rank sends to s ranks up and receives from s ranks down, directly: only keys that will be seen (three
quarters of them without documents), nothing where none are. A step's keys travel while the step before is computed; in
backward they travel again, and the gradients of keys and values go straight back to their owner (`parallel.transfers`).
Merging is by log-sum-exp, in at least fp32. Follows Ring Attention (arXiv 2310.01889) and the zigzag order of Striped
Attention's (arXiv 2311.09431) successors; differs: no neighbour forwards what it does not need, which on a fabric that
connects neighbours only makes hops longer.
"""

# Shapes: B batch, T tokens of this rank, H query heads, K key/value heads, E head width, W all tokens of a sequence.

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from parallel import kernels
from parallel.blocks import Block, Plan, Span, Step, causal_steps, document_block, rectangle_sizes
from parallel.collectives import all_gather
from parallel.symmetric import copy_into
from parallel.transfers import transfers


class Ring:
    """The attention core of a rank in a ring; made for any number of local heads, grouped or not.

    All ranks of `group` must call both methods alike.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group
        self._run: Callable[..., Tensor] = _Ring.apply

    def prepare(self, document_ids_BT: Tensor | None, positions_BT: Tensor | None, like: Tensor) -> Plan | None:
        """Return the plan of a forward, None for causal; waits once for an accelerator where there are documents.

        `document_ids_BT` are this rank's part of numbers that rise along the sequence (`Context.cut_documents`);
        `like` has the device and dtype of the activations.

        Raises: ValueError, on every rank, if they do not rise.
        """
        self._run = outside_graphs(_Ring.apply)
        if document_ids_BT is None:
            return None
        rank, size = self.group.rank(), self.group.size()
        numbers_RBT = all_gather(document_ids_BT[None].to(like.device, torch.int32), 0, self.group)
        pairs = [(rank, (rank - shift) % size) for shift in range(1, size)]
        pairs += [((rank + shift) % size, rank) for shift in range(1, size)]
        rising = torch.stack([in_order(numbers_RBT).diff(dim=1).amin().ge(0)])
        sizes = [rectangle_sizes(numbers_RBT, *pair).flatten() for pair in pairs]
        is_rising, *counts = torch.cat((rising, *sizes)).tolist()
        if not is_rising:
            raise ValueError("parallel: document ids fall along a sequence; number them with Context.cut_documents")
        batch, length = document_ids_BT.shape
        both = [(counts[i : i + batch], counts[i + batch : i + 2 * batch]) for i in range(0, len(counts), 2 * batch)]
        blocks = [
            document_block(length, *pair, of_pair, like.device) for pair, of_pair in zip(pairs, both, strict=True)
        ]
        # Steps in which a rank does nothing stay, so that all ranks order their messages alike.
        steps = [
            Step(shift, block, None if given is None else given.keys)
            for shift, block, given in zip(range(1, size), blocks[: size - 1], blocks[size - 1 :], strict=True)
        ]
        return Plan(kernels.documents(document_ids_BT, like), tuple(steps))

    def __call__(
        self,
        query_BTHE: Tensor,
        key_BTKE: Tensor,
        value_BTKE: Tensor,
        plan: Plan | None,
        *,
        scale: float | None = None,
    ) -> Tensor:
        """Return the mixed values [B, T, H, E] of this rank's tokens; `scale` is of scores, by default E^-1/2."""
        if plan is None:
            plan = Plan(None, causal_steps(query_BTHE.shape[1], self.group.rank(), self.group.size()), is_causal=True)
        scale = query_BTHE.shape[-1] ** -0.5 if scale is None else scale
        return self._run(query_BTHE, key_BTKE, value_BTKE, scale, plan, self.group)


def outside_graphs(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the function for use in compiled code, which runs it as it is and goes on behind it.

    Importing the compiler takes 2 s, so it is left alone where nothing else has loaded it: then nothing is compiled.
    """
    if "torch._dynamo" not in sys.modules:
        return function
    return torch.compiler.disable(function)  # type: ignore[no-any-return, no-untyped-call]


def in_order(parts_RBT: Tensor) -> Tensor:
    """Return [B, W, ...]: the zigzag parts of all ranks [R, B, T, ...] in the order of the sequence."""
    first, second = parts_RBT.chunk(2, 2)
    chunks = torch.cat((first, second.flip(0)))
    return chunks.transpose(0, 1).flatten(1, 2)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, plan: Plan, group: ProcessGroup
    ) -> Tensor:
        key_value = _fused(_stacked, key)(key, value)
        passing = transfers(plan, group, key_value)
        passing.fetch(0)
        result = kernels.forward(query, *key_value.unbind(), scale=scale, causal=True, found=plan.found)
        for number, step in enumerate(plan.steps):
            passing.fetch(number + 1)
            seen = passing.fetched(number)
            if step.block is not None:
                assert seen is not None
                part = _block_forward(step.block, query, seen, scale)
                is_last = number == len(plan.steps) - 1
                result = _merge(step.block.queries, *result, *part, query.dtype if is_last else part[1].dtype)
            passing.release(number)
        out, lse = result
        mixed = out.to(query.dtype)  # where nothing was seen in the last step it is not yet
        ctx.save_for_backward(query, key_value, mixed, lse)
        ctx.scale, ctx.plan, ctx.group = scale, plan, group
        return mixed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key_value, mixed, lse = ctx.saved_tensors
        plan: Plan = ctx.plan
        grad, result = grads[0], (mixed, lse)
        passing = transfers(plan, ctx.group, key_value)
        passing.fetch(0)
        how: dict[str, Any] = {"scale": ctx.scale, "causal": True, "found": plan.found}
        key, value = key_value
        own = kernels.backward(grad, query, key, value, result, **how)
        # The sum of two terms is rounded once in any case.
        sums_in = lse.dtype if len(plan.steps) > 1 else query.dtype
        dquery, dkey, dvalue = (x.to(sums_in).contiguous() for x in own)

        def add_returned(number: int) -> None:
            found = passing.returned(number)
            if found is not None:
                given, returned = found
                for dx, part in zip((dkey, dvalue), returned, strict=True):
                    given.add(dx, part)
            passing.taken(number)

        for number, step in enumerate(plan.steps):
            passing.fetch(number + 1)
            seen = passing.fetched(number)
            for rows in passing.rows:
                dblock: list[Tensor] = []
                if step.block is not None:
                    assert seen is not None
                    keys = seen if len(passing.rows) == 1 else seen[:, rows]
                    of_rows = (mixed[rows], lse[rows])
                    part, *dblock = _block_backward(step.block, grad[rows], query[rows], keys, of_rows, ctx.scale)
                    step.block.queries.add(dquery[rows], part)
                passing.give_back(number, dblock)
            passing.release(number)
            if number:
                add_returned(number - 1)
        if plan.steps:
            add_returned(len(plan.steps) - 1)
        return *(x.to(query.dtype) for x in (dquery, dkey, dvalue)), None, None, None


def _block_forward(block: Block, query: Tensor, key_value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    key, value = key_value
    seeing = block.queries.take(query)
    if block.pieces is None:
        return kernels.forward(seeing, key, value, scale=scale, causal=False)
    return kernels.pieces_forward(seeing, key, value, block.pieces, scale=scale)


def _block_backward(
    block: Block, grad: Tensor, query: Tensor, key_value: Tensor, result: tuple[Tensor, Tensor], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    key, value = key_value
    grad, query, out, lse = (block.queries.take(x) for x in (grad, query, *result))
    if block.pieces is None:
        return kernels.backward(grad, query, key, value, (out, lse), scale=scale, causal=False)
    return kernels.pieces_backward(grad, query, key, value, (out, lse), block.pieces, scale=scale)


def _merge(
    span: Span, out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp with what some queries saw elsewhere: the mean by the weight of their scores.

    Never changes its arguments: selective recomputation keeps the first of them. The output is of `dtype`.
    """
    if span.index_N is None:
        merged, merged_lse = torch.empty_like(out, dtype=dtype), torch.empty_like(lse)
        merge = _fused(_merge_into, out)
        merge(*(span.take(x) for x in (merged, merged_lse, out, lse)), part, part_lse)
        start, stop, _ = span.along.indices(out.shape[1])
        for rest in (slice(0, start), slice(stop, out.shape[1])):
            copy_into(merged[:, rest], out[:, rest].to(dtype))
            merged_lse[:, rest] = lse[:, rest]
        return merged, merged_lse
    out, lse = out.to(part_lse.dtype, copy=True), lse.clone(memory_format=torch.contiguous_format)
    before, before_lse = span.take(out), span.take(lse)
    share = (part_lse - before_lse).sigmoid_()[..., None]
    span.put(out, torch.lerp(before, part.to(before.dtype), share))
    span.put(lse, torch.logaddexp(before_lse, part_lse))
    return out.to(dtype), lse


def _merge_into(
    place: Tensor, place_lse: Tensor, before: Tensor, before_lse: Tensor, part: Tensor, part_lse: Tensor
) -> None:
    wide = part_lse.dtype
    share = (part_lse - before_lse).sigmoid()[..., None]
    place.copy_(torch.lerp(before.to(wide), part.to(wide), share))
    place_lse.copy_(torch.logaddexp(before_lse, part_lse))


def _stacked(key: Tensor, value: Tensor) -> Tensor:
    """Return [2, B, T, K, E], contiguous."""
    return torch.stack((key, value))


def _fused(function: Callable[..., Any], like: Tensor) -> Callable[..., Any]:
    """Return the function, in one pass over memory where that is known to pay and the compiler is loaded anyway."""
    return _compiled(function) if like.is_cuda and "torch._dynamo" in sys.modules else function


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)
