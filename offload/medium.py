"""What a tier is made of: places for bytes, and blocking copies to and from them."""

from __future__ import annotations

from typing import Protocol, TypeVar

import torch

P = TypeVar("P")


class Medium(Protocol[P]):
    """Where bytes are: reserves places and copies to and from them, blocking.

    `store` and `load` are called from several threads at once, but never twice at once for one place; the
    others one at a time. Failures are OSErrors, or TierErrors that say more.
    """

    granularity_bytes: int
    """What a place takes is rounded up to a multiple of this."""

    def reserve(self, num_bytes: int) -> P:
        """Return a place for so many bytes, a multiple of the granularity. Raises `TierFull`."""
        ...

    def release(self, place: P) -> None:
        """Take a place back."""
        ...

    def store(self, place: P, data: torch.Tensor) -> None:
        """Copy a flat uint8 tensor to the start of the place."""
        ...

    def load(self, place: P, into: torch.Tensor) -> None:
        """Fill a flat uint8 tensor from the start of the place."""
        ...

    def view(self, place: P, num_bytes: int) -> torch.Tensor | None:
        """Return the first bytes of the place where the CPU can address them, else None."""
        ...

    def close(self) -> None:
        """Drop all places."""
        ...
