"""Page-locked memory, for a GPU's copy engine; exactly as much as asked for, and given back."""

from __future__ import annotations

from typing import Any

import torch

from offload.errors import TierError


class Pinned:
    """Locks and unlocks memory that others own. torch's own pinned allocator rounds sizes up to powers of two.

    Raises:
        TierError: there is no GPU that could use it.
    """

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise TierError("pinned: memory is locked for a GPU, and there is none; use pinned=False")
        self._runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        self._locked: dict[int, torch.Tensor] = {}

    @property
    def num_bytes(self) -> int:
        """Bytes that are locked."""
        return sum(memory.nbytes for memory in self._locked.values())

    def lock(self, memory: torch.Tensor) -> None:
        """Lock a flat tensor's memory, which stays alive until it is unlocked; copies of it may be asynchronous."""
        code = int(self._runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
        if code:
            raise TierError(
                f"pinned: {memory.nbytes} bytes cannot be locked (CUDA error {code}), beside {self.num_bytes} that "
                "are; raise the limit of locked memory (ulimit -l) or lower the tier's capacity"
            )
        self._locked[memory.data_ptr()] = memory

    def unlock(self, memory: torch.Tensor) -> None:
        """Unlock it again; no copy of it may be under way."""
        del self._locked[memory.data_ptr()]
        self._runtime.cudaHostUnregister(memory.data_ptr())

    def close(self) -> None:
        """Unlock everything."""
        for memory in list(self._locked.values()):
            self.unlock(memory)
