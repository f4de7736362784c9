"""How keys and values pass between the ranks of a ring, and their gradients go back: by messages, or pushed.

Both do what `parallel.ring` asks for, a step at a time: `fetch` begins to bring a step's keys and values, `fetched`
waits for them, `give_back` begins to return their gradients, some rows of the batch at a time, and `returned` waits for
those of own keys. What `fetched` and `returned` hand out is read before `release` and `taken`. Waiting is a stream's.
"""

# Shapes: B batch, T tokens of this rank, t some of them, N those of rows that differ, K key/value heads, E head width.

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from parallel import symmetric
from parallel.blocks import Plan, Span

_MOST_PIECES = 4
"""In which gradients go back: what the last of them takes is not hidden."""


class Transfers(Protocol):
    """What travels in one pass; all ranks call alike, also in steps in which nothing travels."""

    rows: Sequence[slice]
    """Rows of the batch whose gradients go back together: as soon as they are there, in this order."""

    def fetch(self, number: int) -> None:
        """Begin the transfer of a step's keys and values; of no step past the last."""

    def fetched(self, number: int) -> Tensor | None:
        """Return a step's keys and values, [2, B, t, K, E] or [2, N, K, E]; None where none are seen."""

    def release(self, number: int) -> None:
        """Say that all that reads what `fetched` returned is under way."""

    def give_back(self, number: int, grads: Sequence[Tensor]) -> None:
        """Return gradients of a step's keys and values; called for each of `rows`, with none where none are seen."""

    def returned(self, number: int) -> tuple[Span, Tensor] | None:
        """Return which own keys a step's gradients are of, and those; None where none was seen."""

    def taken(self, number: int) -> None:
        """Say that all that reads what `returned` returned is under way."""


def transfers(plan: Plan, group: ProcessGroup, key_value_2BTKE: Tensor) -> Transfers:
    """Return the transfers of one pass by the fastest way there is."""
    if symmetric.available(group, key_value_2BTKE):
        return Pushes(plan, symmetric.buffers(group, key_value_2BTKE.device), key_value_2BTKE)
    return Messages(plan, group, key_value_2BTKE)


class Messages:
    """Point-to-point messages of a process group."""

    rows: Sequence[slice] = (slice(None),)

    def __init__(self, plan: Plan, group: ProcessGroup, key_value_2BTKE: Tensor) -> None:
        self._steps, self._group, self._key_value = plan.steps, group, key_value_2BTKE
        self._rank, self._size = group.rank(), group.size()
        self._fetches: dict[int, _Message] = {}
        self._returns: dict[int, _Message] = {}

    def fetch(self, number: int) -> None:
        if number < len(self._steps):
            step = self._steps[number]
            sent = None if step.given is None else torch.stack([step.given.take(x) for x in self._key_value])
            received = None if step.block is None else _empty(step.block.keys, self._key_value)
            self._fetches[number] = self._start(step.shift, sent, received)

    def fetched(self, number: int) -> Tensor | None:
        message = self._fetches.pop(number)
        message.wait()
        return message.received

    def release(self, number: int) -> None:
        pass

    def give_back(self, number: int, grads: Sequence[Tensor]) -> None:
        step = self._steps[number]
        received = None if step.given is None else _empty(step.given, self._key_value)
        self._returns[number] = self._start(-step.shift, torch.stack(tuple(grads)) if grads else None, received)

    def returned(self, number: int) -> tuple[Span, Tensor] | None:
        message = self._returns.pop(number)
        message.wait()
        given = self._steps[number].given
        if message.received is None or given is None:
            return None
        return given, message.received

    def taken(self, number: int) -> None:
        pass

    def _start(self, shift: int, sent: Tensor | None, received: Tensor | None) -> _Message:
        up, down = ((self._rank + way) % self._size for way in (shift, -shift))
        operations = []
        if sent is not None:
            operations.append(dist.P2POp(dist.isend, sent, group=self._group, group_peer=up))
        if received is not None:
            operations.append(dist.P2POp(dist.irecv, received, group=self._group, group_peer=down))
        works = dist.batch_isend_irecv(operations) if operations else []
        return _Message(works, sent, received)


@dataclass(slots=True)
class _Message:
    """A message on its way, with the tensors it reads and writes."""

    works: Sequence[Any]
    sent: Tensor | None
    received: Tensor | None

    def wait(self) -> None:
        """Wait until both directions are done; a GPU's stream waits, not the host."""
        for work in self.works:
            work.wait()


class Pushes:
    """Copies into other GPUs' memory (`parallel.symmetric`), which take no core from the attention that hides them."""

    def __init__(self, plan: Plan, buffers: symmetric.Buffers, key_value_2BTKE: Tensor) -> None:
        self._steps, self._buffers, self._key_value = plan.steps, buffers, key_value_2BTKE
        # Rows of packed documents see different keys, in one kernel.
        batch = key_value_2BTKE.shape[1]
        count = min(batch, _MOST_PIECES) if plan.is_causal else 1
        cuts = [batch * number // count for number in range(count + 1)]
        self.rows: Sequence[slice] = [slice(first, last) for first, last in itertools.pairwise(cuts)]
        self._fetches: dict[int, symmetric.Transfer] = {}
        self._returns: dict[int, symmetric.Transfer] = {}
        self._num_given_back: dict[int, int] = {}

    def fetch(self, number: int) -> None:
        if number == len(self._steps):
            return
        step = self._steps[number]
        transfer = self._fetches[number] = self._buffers.open(self._key_value.nbytes, 1)
        if step.given is None:
            transfer.send({})
            return
        peer = self._rank_at(step.shift)
        copies: list[tuple[Tensor, Tensor]] = []
        for x, place in zip(self._key_value, self._room(transfer, step.given, peer), strict=True):
            taken = step.given.take(x)
            copies += [(taken, place)] if taken.is_contiguous() else zip(taken, place, strict=True)
        transfer.send({peer: copies}, is_old=step.given.index_N is None)

    def fetched(self, number: int) -> Tensor | None:
        step, transfer = self._steps[number], self._fetches[number]
        if step.block is None:
            return None
        transfer.arrived(self._rank_at(-step.shift))
        return self._room(transfer, step.block.keys)

    def release(self, number: int) -> None:
        self._fetches.pop(number).close()

    def give_back(self, number: int, grads: Sequence[Tensor]) -> None:
        step = self._steps[number]
        if number not in self._returns:
            self._returns[number] = self._buffers.open(self._key_value.nbytes, len(self.rows))
            self._num_given_back[number] = 0
        transfer, rows = self._returns[number], self.rows[self._num_given_back[number]]
        self._num_given_back[number] += 1
        if not grads or step.block is None:
            transfer.send({})
            return
        peer = self._rank_at(-step.shift)
        room = self._room(transfer, step.block.keys, peer)
        places = room[:, rows] if len(self.rows) > 1 else room
        transfer.send({peer: [(grad.contiguous(), place) for grad, place in zip(grads, places, strict=True)]})

    def returned(self, number: int) -> tuple[Span, Tensor] | None:
        step, transfer = self._steps[number], self._returns[number]
        if step.given is None:
            return None
        transfer.arrived(self._rank_at(step.shift), len(self.rows))
        return step.given, self._room(transfer, step.given)

    def taken(self, number: int) -> None:
        self._returns.pop(number).close()

    def _room(self, transfer: symmetric.Transfer, span: Span, rank: int | None = None) -> Tensor:
        """What a rank's slot has for the keys and values of a span."""
        shape = _empty(span, self._key_value.to("meta")).shape
        return transfer.memory(shape, self._key_value.dtype, rank)

    def _rank_at(self, shift: int) -> int:
        return (self._buffers.rank + shift) % self._buffers.size


def _empty(span: Span, key_value_2BTKE: Tensor) -> Tensor:
    """Return a contiguous tensor for keys and values of a span."""
    one = span.empty(key_value_2BTKE[0])
    return one.new_empty(2, *one.shape)
