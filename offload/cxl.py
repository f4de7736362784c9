"""The CXL tier: memory behind a link, on a NUMA node without CPUs; or other memory slowed down to it."""

from __future__ import annotations

import torch

from offload.errors import SpecError
from offload.memory import Memory
from offload.numa import memory_only, numa_nodes
from offload.threaded import ThreadedTier
from offload.tier import TierSpec


class CxlTier(ThreadedTier[torch.Tensor]):
    """Blocks on one NUMA node and no other; the CPU can address them, slowly.

    With `spec.emulated` it takes any memory, its transfers are slowed to the spec, and there is no `view`: what the
    CPU addresses by itself cannot be slowed. `pinned` and `digests` as for `CpuTier`.

    Raises:
        SpecError: neither a node nor an emulated spec.
        TierError: the kernel refuses the node (at the first block).
    """

    def __init__(
        self,
        spec: TierSpec,
        *,
        node: int | None = None,
        num_threads: int = 2,
        pinned: bool = False,
        digests: bool = False,
    ) -> None:
        if (node is None) != spec.emulated:
            found = [str(each.index) for each in memory_only(numa_nodes())]
            raise SpecError(
                f"tier {spec.label}: node: {node}; an emulated tier has none, a real one needs the index of a NUMA "
                f"node with memory and no CPUs (here: {', '.join(found) or 'none, so only an emulated one'})"
            )
        super().__init__(spec, Memory(pinned=pinned, node=node), num_threads=num_threads, digests=digests)
