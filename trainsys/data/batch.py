"""Batches: what one rank feeds in one optimizer step; targets and positions stop at document boundaries.

Shapes: b sequences of a micro-batch, T tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

IGNORE = -100
"""Target of a token that has none; the default `ignore_index` of torch's cross entropy."""

Window = tuple[NDArray[np.int64], NDArray[np.int32]]


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What one forward takes; CPU tensors, the caller's own."""

    tokens: torch.Tensor
    """int64 [b, T]."""
    targets: torch.Tensor
    """int64 [b, T]: the next token, or IGNORE."""
    document_ids: torch.Tensor | None
    """int32 [b, T], from 0 in each sequence; None where each sequence is one document, or without mask."""
    positions: torch.Tensor | None
    """int64 [b, T], from 0 in each document of each sequence; None where document_ids is."""
    num_targets: int
    """Targets that are not IGNORE."""
    extras: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Further arguments of a model that has a loss of its own, each [b, T]."""


@dataclass(frozen=True, slots=True)
class StepBatch:
    """What one rank feeds in one optimizer step."""

    position: int
    """Global sample position the step starts at."""
    micro_batches: list[MicroBatch]
    num_targets: int
    """Of all micro-batches of this rank."""


def micro_batch(windows: Sequence[Window], *, document_mask: bool, num_real: int | None = None) -> MicroBatch:
    """The windows (each [T+1]) as one micro-batch; those from `num_real` on have no targets.

    With `document_mask`, a token whose successor begins another document has no target, and positions restart
    there.
    """
    tokens_bT = np.stack([tokens for tokens, _ in windows])
    documents_bT = np.stack([documents for _, documents in windows])
    inputs, targets = tokens_bT[:, :-1], tokens_bT[:, 1:].copy()
    if document_mask:
        targets[documents_bT[:, 1:] != documents_bT[:, :-1]] = IGNORE
    if num_real is not None:
        targets[num_real:] = IGNORE
    documents_bT = documents_bT[:, :-1]
    masked = document_mask and bool((documents_bT[:, -1] != documents_bT[:, 0]).any())
    return MicroBatch(
        tokens=torch.from_numpy(np.ascontiguousarray(inputs)),
        targets=torch.from_numpy(targets),
        document_ids=torch.from_numpy(np.ascontiguousarray(documents_bT)) if masked else None,
        positions=torch.from_numpy(document_positions(documents_bT)) if masked else None,
        num_targets=int((targets != IGNORE).sum()),
    )


def document_positions(documents_bT: NDArray[np.int32]) -> NDArray[np.int64]:
    """Each token's distance from the start of its document, or of its row where the document began before."""
    index_T = np.arange(documents_bT.shape[1])
    starts_bT = np.zeros(documents_bT.shape, np.int64)
    starts_bT[:, 1:] = np.where(documents_bT[:, 1:] != documents_bT[:, :-1], index_T[1:], 0)
    positions: NDArray[np.int64] = index_T - np.maximum.accumulate(starts_bT, axis=1)
    return positions
