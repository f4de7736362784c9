"""Errors that a user of `offload` can cause or meet, as a tree.

OffloadError
├── SpecError          a capacity, rate or latency that no tier can have (also a ValueError)
├── BlockError         a block, or a tensor for it, that the tier cannot take (also a ValueError)
├── TierError          a transfer failed: the disk, the file, a timeout
│   ├── TierFull       no room for another block
│   └── Corrupted      what came back is not what was written
├── KernelError        the native optimizer kernel cannot be built or run here
├── OptimizerError     a tiered optimizer was asked for what its mode or state does not allow
├── PlacementError     the tensors do not fit into the tiers (also a ValueError)
├── StreamError        layers that cannot be streamed (also a ValueError)
└── BudgetError        a memory budget that a model cannot keep (also a ValueError)
"""

from __future__ import annotations


class OffloadError(Exception):
    """Base of every error of this package."""


class SpecError(OffloadError, ValueError):
    """A capacity, rate or latency that no tier can have; one line a problem."""


class BlockError(OffloadError, ValueError):
    """A block is not the tier's (any more) or holds nothing yet, or a tensor does not fit it."""


class TierError(OffloadError):
    """A transfer failed; the bytes it was about are not to be relied on."""


class TierFull(TierError):
    """A tier has no room for another block; the message has what was asked and what there is."""


class Corrupted(TierError):
    """What came back from a tier is not what was written to it."""


class PlacementError(OffloadError, ValueError):
    """The tensors do not fit into the tiers; the message has what is missing and what would help."""

    def __init__(self, message: str, missing_bytes: int) -> None:
        super().__init__(message)
        self.missing_bytes = missing_bytes


class StreamError(OffloadError, ValueError):
    """Layers, or tensors that they save, that cannot be streamed; the message says why."""


class BudgetError(OffloadError, ValueError):
    """A memory budget that a model cannot keep; the message has what it needs at least."""


class KernelError(OffloadError):
    """The native optimizer kernel cannot be built or run here; the message has the remedy."""


class OptimizerError(OffloadError):
    """A tiered optimizer was asked for what its mode, its settings or its state do not allow."""
