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
backward they travel again, and the gradients of keys and values go straight back to their owner. Merging is by
log-sum-exp, in at least fp32. Follows Ring Attention (arXiv 2310.01889) and the zigzag order of Striped Attention's
(arXiv 2311.09431) successors; differs: no neighbour forwards what it does not need, which on a fabric that connects
neighbours only makes hops longer.
"""

# Shapes: B batch, T tokens of this rank, H query heads, K key/value heads, E head width, W all tokens of a sequence.

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from parallel import kernels
from parallel.collectives import all_gather


@dataclass(frozen=True, slots=True)
class Span:
    """Some tokens of a rank: the same slice of every row, or others in each row, by index into B x T."""

    along: slice
    index_N: Tensor | None = None

    def take(self, x_BT: Tensor) -> Tensor:
        """Return these tokens of `x` [B, T, ...]: [B, t, ...], or [N, ...] where rows differ."""
        return x_BT[:, self.along] if self.index_N is None else x_BT.flatten(0, 1)[self.index_N]

    def put(self, x_BT: Tensor, values: Tensor) -> None:
        """Write what `take` would return."""
        if self.index_N is None:
            x_BT[:, self.along] = values
        else:
            x_BT.flatten(0, 1).index_copy_(0, self.index_N, values.to(x_BT.dtype))

    def add(self, x_BT: Tensor, values: Tensor) -> None:
        """Add to what `take` would return."""
        if self.index_N is None:
            x_BT[:, self.along] += values
        else:
            x_BT.flatten(0, 1).index_add_(0, self.index_N, values.to(x_BT.dtype))

    def empty(self, x_BT: Tensor) -> Tensor:
        """Return a contiguous tensor for what `take` would return."""
        if self.index_N is not None:
            return x_BT.new_empty(len(self.index_N), *x_BT.shape[2:])
        start, stop, _ = self.along.indices(x_BT.shape[1])
        return x_BT.new_empty(x_BT.shape[0], stop - start, *x_BT.shape[2:])


@dataclass(frozen=True, slots=True)
class Block:
    """Queries of one rank that see keys of another: all of `queries` see all of `keys`, row by row."""

    queries: Span
    keys: Span
    pieces: kernels.Pieces | None = None
    """Where rows differ: how many of each belong together."""


@dataclass(frozen=True, slots=True)
class Step:
    """What one rank does in one step of the ring."""

    shift: int
    block: Block | None
    """Of own queries with the keys of the rank `shift` below; None where none is seen."""
    given: Span | None
    """Own keys that the rank `shift` above sees; None where none is."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How one rank attends, the same in every layer of a forward."""

    found: kernels.Documents | None
    """Documents among its own tokens."""
    steps: tuple[Step, ...]


def causal_block(length: int, queries_rank: int, keys_rank: int) -> Block:
    """Return what queries of one rank see of another's keys without documents; `length` tokens are on each rank."""
    half = length // 2
    if keys_rank < queries_rank:
        return Block(Span(slice(0, length)), Span(slice(0, half)))
    return Block(Span(slice(half, length)), Span(slice(0, length)))


def causal_steps(length: int, rank: int, size: int) -> tuple[Step, ...]:
    """Return a rank's steps where every row is one document."""
    return tuple(
        Step(
            shift,
            causal_block(length, rank, (rank - shift) % size),
            causal_block(length, (rank + shift) % size, rank).keys,
        )
        for shift in range(1, size)
    )


def rectangle_sizes(numbers_RBT: Tensor, queries_rank: int, keys_rank: int) -> Tensor:
    """Return [2, B]: how many queries of one rank, counted from the first that may, see how many last keys of another.

    `numbers_RBT` are the documents' numbers by rank. Both counts of a row are 0 where nothing is seen.
    """
    block = causal_block(numbers_RBT.shape[2], queries_rank, keys_rank)
    queries_BT, keys_BT = block.queries.take(numbers_RBT[queries_rank]), block.keys.take(numbers_RBT[keys_rank])
    first_B1 = queries_BT[:, :1]
    counts_2B = torch.stack(((queries_BT == first_B1).sum(1), (keys_BT == first_B1).sum(1)))
    return counts_2B * (counts_2B[1] > 0)


def document_block(
    length: int, queries_rank: int, keys_rank: int, sizes: Sequence[Sequence[int]], device: torch.device
) -> Block | None:
    """Return the block of `rectangle_sizes` as numbers; None where nothing is seen."""
    whole = causal_block(length, queries_rank, keys_rank)
    query_start, *_ = whole.queries.along.indices(length)
    _, key_stop, _ = whole.keys.along.indices(length)
    rows = [(row, *both) for row, both in enumerate(zip(*sizes, strict=True)) if both[0]]
    if not rows:
        return None
    if len(rows) == len(sizes[0]) and len({(queries, keys) for _, queries, keys in rows}) == 1:
        (_, queries, keys) = rows[0]
        return Block(Span(slice(query_start, query_start + queries)), Span(slice(key_stop - keys, key_stop)))
    starts = [(row * length + query_start, row * length + key_stop - keys) for row, _, keys in rows]
    query_sizes, key_sizes = [queries for _, queries, _ in rows], [keys for _, _, keys in rows]
    return Block(
        Span(whole.queries.along, _ranges([start for start, _ in starts], query_sizes, device)),
        Span(whole.keys.along, _ranges([start for _, start in starts], key_sizes, device)),
        kernels.Pieces.of(query_sizes, key_sizes, device),
    )


def _ranges(starts: Sequence[int], sizes: Sequence[int], device: torch.device) -> Tensor:
    parts = [torch.arange(start, start + size) for start, size in zip(starts, sizes, strict=True)]
    return torch.cat(parts).to(device)


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
            plan = Plan(None, causal_steps(query_BTHE.shape[1], self.group.rank(), self.group.size()))
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
        transfers = _Transfers(plan.steps, group, torch.stack((key, value), 2))
        transfers.fetch(0)
        local, local_lse = kernels.forward(query, key, value, scale=scale, causal=True, found=plan.found)
        # Copies: what is merged below must not change a result that selective recomputation keeps.
        out, lse = local.to(local_lse.dtype, copy=True), local_lse.clone(memory_format=torch.contiguous_format)
        for number, step in enumerate(plan.steps):
            transfers.fetch(number + 1)
            key_value = transfers.fetched(number)
            if step.block is not None:
                assert key_value is not None
                part = _block_forward(step.block, query, key_value, scale)
                _merge(step.block.queries, out, lse, *part)
        transfers.finish()
        mixed = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, mixed, lse)
        ctx.scale, ctx.plan, ctx.group = scale, plan, group
        return mixed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mixed, lse = ctx.saved_tensors
        plan: Plan = ctx.plan
        result, (grad,) = (mixed, lse), grads
        transfers = _Transfers(plan.steps, ctx.group, torch.stack((key, value), 2))
        transfers.fetch(0)
        own = kernels.backward(grad, query, key, value, result, scale=ctx.scale, causal=True, found=plan.found)
        dquery = own[0].to(lse.dtype)
        dkey_value = torch.stack(own[1:], 2).to(lse.dtype)
        for number, step in enumerate(plan.steps):
            transfers.fetch(number + 1)
            key_value = transfers.fetched(number)
            dblock: Tensor | None = None
            if step.block is not None:
                assert key_value is not None
                part, *rest = _block_backward(step.block, grad, query, key_value, result, ctx.scale)
                step.block.queries.add(dquery, part)
                dblock = torch.stack(rest, -3)
            if number:
                transfers.add_returned(number - 1, dkey_value)
            transfers.give_back(number, dblock)
        if plan.steps:
            transfers.add_returned(len(plan.steps) - 1, dkey_value)
        transfers.finish()
        dkey, dvalue = dkey_value.to(key.dtype).unbind(2)
        return dquery.to(query.dtype), dkey, dvalue, None, None, None


def _block_forward(block: Block, query: Tensor, key_value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    key, value = key_value.unbind(-3)
    seeing = block.queries.take(query)
    if block.pieces is None:
        return kernels.forward(seeing, key, value, scale=scale, causal=False)
    return kernels.pieces_forward(seeing, key, value, block.pieces, scale=scale)


def _block_backward(
    block: Block, grad: Tensor, query: Tensor, key_value: Tensor, result: tuple[Tensor, Tensor], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    key, value = key_value.unbind(-3)
    grad, query, out, lse = (block.queries.take(x) for x in (grad, query, *result))
    if block.pieces is None:
        return kernels.backward(grad, query, key, value, (out, lse), scale=scale, causal=False)
    return kernels.pieces_backward(grad, query, key, value, (out, lse), block.pieces, scale=scale)


def _merge(span: Span, out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Take in what some queries saw elsewhere: the mean of both outputs by the weight of their scores."""
    before, before_lse = span.take(out), span.take(lse)
    share = (part_lse - before_lse).sigmoid_()[..., None]
    span.put(out, torch.lerp(before, part.to(before.dtype), share))
    span.put(lse, torch.logaddexp(before_lse, part_lse))


class _Transfers:
    """What travels in one pass: a step's keys and values here, later their gradients back."""

    def __init__(self, steps: Sequence[Step], group: ProcessGroup, key_value: Tensor) -> None:
        self._steps, self._group, self._key_value = steps, group, key_value
        self._rank, self._size = group.rank(), group.size()
        self._fetches: dict[int, _Transfer] = {}
        self._returns: dict[int, _Transfer] = {}

    def fetch(self, number: int) -> None:
        """Start the transfer of a step's keys and values; of no step past the last."""
        if number < len(self._steps):
            step = self._steps[number]
            sent = None if step.given is None else step.given.take(self._key_value).contiguous()
            received = None if step.block is None else step.block.keys.empty(self._key_value)
            self._fetches[number] = self._start(step.shift, sent, received)

    def fetched(self, number: int) -> Tensor | None:
        """Wait for a step's keys and values, [B, t, 2, K, E] or [N, 2, K, E]."""
        transfer = self._fetches.pop(number)
        transfer.wait()
        return transfer.received

    def give_back(self, number: int, grad: Tensor | None) -> None:
        """Start the return of a block's gradients, and of those of own keys that went out in that step."""
        step = self._steps[number]
        received = None if step.given is None else step.given.empty(self._key_value)
        self._returns[number] = self._start(-step.shift, grad, received)

    def add_returned(self, number: int, grad: Tensor) -> None:
        """Wait for what comes back in a step and add it to the gradient of own keys and values."""
        transfer = self._returns.pop(number)
        transfer.wait()
        if transfer.received is not None:
            given = self._steps[number].given
            assert given is not None
            given.add(grad, transfer.received)

    def finish(self) -> None:
        """See that all is over."""
        assert not self._fetches
        assert not self._returns

    def _start(self, shift: int, sent: Tensor | None, received: Tensor | None) -> _Transfer:
        up, down = ((self._rank + way) % self._size for way in (shift, -shift))
        operations = []
        if sent is not None:
            operations.append(dist.P2POp(dist.isend, sent, group=self._group, group_peer=up))
        if received is not None:
            operations.append(dist.P2POp(dist.irecv, received, group=self._group, group_peer=down))
        works = dist.batch_isend_irecv(operations) if operations else []
        return _Transfer(works, sent, received)


@dataclass(slots=True)
class _Transfer:
    """A transfer on its way, with the tensors it reads and writes."""

    works: Sequence[Any]
    sent: Tensor | None
    received: Tensor | None

    def wait(self) -> None:
        """Wait until both directions are done; a GPU's stream waits, not the host."""
        for work in self.works:
            work.wait()
