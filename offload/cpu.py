"""The CPU tier: blocks in the memory of this process."""

from __future__ import annotations

import torch

from offload.threaded import ThreadedTier
from offload.tier import TierSpec


class CpuTier(ThreadedTier[torch.Tensor]):
    """Blocks in pageable memory, which is touched at the first write. `num_threads` copies run at once."""

    def __init__(self, spec: TierSpec, *, num_threads: int = 2) -> None:
        super().__init__(spec, _Memory(), num_threads=num_threads)


class _Memory:
    """A medium whose places are tensors. torch's copy releases the interpreter lock."""

    granularity_bytes = 64  # a cache line, so that blocks do not share one

    def reserve(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def release(self, place: torch.Tensor) -> None:
        """Nothing to do: the memory goes with the last reference."""

    def store(self, place: torch.Tensor, data: torch.Tensor) -> None:
        place[: data.numel()].copy_(data)

    def load(self, place: torch.Tensor, into: torch.Tensor) -> None:
        into.copy_(place[: into.numel()])

    def close(self) -> None:
        """Nothing to do: the memory went with the blocks."""
