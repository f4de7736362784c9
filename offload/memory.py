"""A medium whose places are pages of memory."""

from __future__ import annotations

import torch

from offload.pages import PAGE_BYTES, allocate_pages
from offload.pinned import Pinned


class Memory:
    """Memory of this process, locked to a NUMA node and page-locked where asked.

    Its copies are torch's, which release the interpreter lock.
    """

    def __init__(self, *, pinned: bool = False, node: int | None = None) -> None:
        self._pinned = Pinned() if pinned else None
        self._node = node
        # Page locks and NUMA nodes are for whole pages; a cache line is enough to keep blocks from sharing one.
        self.granularity_bytes = PAGE_BYTES if pinned or node is not None else 64

    def reserve(self, num_bytes: int) -> torch.Tensor:
        """Return memory that is not touched yet."""
        memory = allocate_pages(num_bytes, node=self._node)
        if self._pinned is not None:
            self._pinned.lock(memory)
        return memory

    def release(self, place: torch.Tensor) -> None:
        """Unlock; the memory goes with the last reference."""
        if self._pinned is not None:
            self._pinned.unlock(place)

    def store(self, place: torch.Tensor, data: torch.Tensor) -> None:
        """Copy into the memory."""
        place[: data.numel()].copy_(data)

    def load(self, place: torch.Tensor, into: torch.Tensor) -> None:
        """Copy out of it."""
        into.copy_(place[: into.numel()])

    def view(self, place: torch.Tensor, num_bytes: int) -> torch.Tensor:
        """Return the memory itself."""
        return place[:num_bytes]

    def close(self) -> None:
        """Unlock what is left; the memory went with the blocks."""
        if self._pinned is not None:
            self._pinned.close()
