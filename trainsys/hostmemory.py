"""The memory tier of a run: an agent on every host, found again by the run's next start."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import distributed as dist

from checkpoint import hosts

if TYPE_CHECKING:
    from checkpoint.memory import MemoryStorage
    from trainsys.setup import Setup


class HostMemory:
    """The agents of one run, as one rank sees them; every rank makes one, and all call the same methods."""

    def __init__(self, shared: Setup) -> None:
        """Start this host's agent or find the one that an earlier start of the run left behind.

        Raises:
            checkpoint.StorageError: it cannot be started.
        """
        memory = shared.config.checkpoint.memory
        self._control = shared.control
        self._is_first_here = shared.context.env.local_rank == 0
        self._folder = Path(tempfile.gettempdir(), f"trainsys-{os.getuid()}", shared.run_id)
        self._limit_bytes = memory.limit_bytes or _half_of_memory()
        self.storage: MemoryStorage = hosts.join(
            self._folder,
            "checkpoints",
            gather_on(shared.control),
            peers=memory.peers,
            limit_bytes=self._limit_bytes,
            host=_own_address(shared.context.env.store_host),
        )
        """What a Checkpointer takes for its memory tier."""

    def end(self) -> None:
        """Give the memory back, of a run that is over: its checkpoints there are lost."""
        dist.barrier(group=self._control)  # other ranks of this host may still be saving
        self.storage.close()
        if self._is_first_here:
            hosts.start(self._folder, limit_bytes=self._limit_bytes).stop()
            shutil.rmtree(self._folder)


def gather_on(control: dist.ProcessGroup) -> Callable[[Any], Sequence[Any]]:
    """Return what gives a value to all ranks of a group and returns those of all, by rank."""

    def gather(value: Any) -> Sequence[Any]:
        values = [None] * control.size()
        dist.all_gather_object(values, value, group=control)
        return values

    return gather


def _half_of_memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _own_address(meeting_host: str) -> str:
    """Return the address of this host on the network that leads to where the ranks meet; nothing is sent."""
    if not meeting_host:
        return "127.0.0.1"
    family = socket.AF_INET6 if ":" in meeting_host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((meeting_host, 9))
        address: str = probe.getsockname()[0]
    return address
