"""Errors that a user of `offload` can cause or meet, as a tree.

OffloadError
├── SpecError          a capacity, rate or latency that no tier can have (also a ValueError)
├── BlockError         a block, or a tensor for it, that the tier cannot take (also a ValueError)
└── TierError          a transfer failed: the disk, the file, a timeout
    └── TierFull       no room for another block
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
