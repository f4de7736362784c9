"""The CPU tier: blocks in the memory of this process."""

from __future__ import annotations

import torch

from offload.memory import Memory
from offload.threaded import ThreadedTier
from offload.tier import TierSpec


class CpuTier(ThreadedTier[torch.Tensor]):
    """Blocks in memory that is touched at the first write; `num_threads` copies run at once.

    `pinned`: the blocks are page-locked for a GPU's copy engine, which makes its copies several times faster and
    asynchronous, and locked memory is never more than the capacity. It takes about 0.9 s a GiB, once a block.
    `digests`: see `ThreadedTier`; memory that reports its own errors does not need them.

    Raises:
        TierError: `pinned` without a GPU.
    """

    def __init__(self, spec: TierSpec, *, num_threads: int = 2, pinned: bool = False, digests: bool = False) -> None:
        super().__init__(spec, Memory(pinned=pinned), num_threads=num_threads, digests=digests)
