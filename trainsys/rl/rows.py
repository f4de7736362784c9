"""Completions as micro-batches: sorted by length, padded, always as many as a step of the engine takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainsys.data import IGNORE, MicroBatch
from trainsys.rl.policy import Row


@dataclass(frozen=True, slots=True)
class Part:
    """Some of a step's rows, as one forward takes them."""

    indices: tuple[int, ...]
    """Of the rows, in their order here; fewer than the batch has rows where padding fills it up."""
    batch: MicroBatch


def parts(rows: Sequence[Row], *, micro_rows: int, num_parts: int) -> list[Part]:
    """Return rows in `num_parts` micro-batches of at most `micro_rows`, like lengths together.

    Fewer rows than there is room for leave micro-batches of one token without target, which every engine needs: it
    counts them.
    """
    assert len(rows) <= micro_rows * num_parts, (len(rows), micro_rows, num_parts)
    order = sorted(range(len(rows)), key=lambda index: len(rows[index].prompt) + len(rows[index].completion))
    chunks = [order[start : start + micro_rows] for start in range(0, len(order), micro_rows)]
    chunks += [[] for _ in range(num_parts - len(chunks))]
    return [_part(rows, chunk) for chunk in chunks]


def with_extras(part: Part, extras: Mapping[str, Sequence[Tensor]]) -> MicroBatch:
    """Return a part's micro-batch with further values of each target: name -> of each row, one a token [n]."""
    batch = part.batch
    return MicroBatch(
        batch.tokens,
        batch.targets,
        None,
        None,
        batch.num_targets,
        {name: _aligned(part, values) for name, values in extras.items()},
    )


def spread(part: Part, values_BT: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield (row, its values one a token [n]) of values at the targets of a part."""
    counts_BT = part.batch.targets != IGNORE
    for place, index in enumerate(part.indices):
        yield index, values_BT[place][counts_BT[place]]


def _part(rows: Sequence[Row], chunk: Sequence[int]) -> Part:
    width = max((len(rows[index].prompt) + len(rows[index].completion) - 1 for index in chunk), default=1)
    tokens = torch.zeros(max(1, len(chunk)), width, dtype=torch.int64)
    targets = torch.full_like(tokens, IGNORE)
    for place, index in enumerate(chunk):
        prompt, completion = rows[index].prompt, rows[index].completion
        fed = (*prompt, *completion)[: max(1, len(prompt) + len(completion) - 1)]
        tokens[place, : len(fed)] = torch.tensor(fed)
        targets[place, len(prompt) - 1 : len(prompt) - 1 + len(completion)] = torch.tensor(completion).long()
    return Part(tuple(chunk), MicroBatch(tokens, targets, None, None, int((targets != IGNORE).sum())))


def _aligned(part: Part, values: Sequence[Tensor]) -> Tensor:
    """Return values one a token at the places of the targets, 0 elsewhere."""
    counts_BT = part.batch.targets != IGNORE
    flat = [values[index] for index in part.indices]
    dtype = flat[0].dtype if flat else torch.float32
    result_BT = torch.zeros(counts_BT.shape, dtype=dtype)
    if flat:
        result_BT[counts_BT] = torch.cat(flat)
    return result_BT
