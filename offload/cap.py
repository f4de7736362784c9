"""A cap on device memory that holds: what goes beyond it fails, and what was used is told."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from offload.errors import BudgetError


@dataclass(slots=True)
class Usage:
    """What was used under a cap."""

    peak_bytes: int = 0
    """Most that torch's allocator had given out, once the block is over."""


@contextlib.contextmanager
def capped(device: torch.device, num_bytes: int) -> Iterator[Usage]:
    """Let this process have no more than `num_bytes` of a GPU: an allocation beyond raises `torch.OutOfMemoryError`.

    Raises:
        BudgetError: no CUDA device, or more is in use already.
    """
    if device.type != "cuda":
        raise BudgetError(f"cap: {device} has no memory of its own to cap; give a stream a budget instead")
    index = torch.cuda.current_device() if device.index is None else device.index  # a fraction needs a number
    torch.cuda.empty_cache()
    used, total = torch.cuda.memory_allocated(device), torch.cuda.get_device_properties(device).total_memory
    if used > num_bytes:
        raise BudgetError(f"cap: {used} bytes of {device} are in use already, which is more than {num_bytes}")
    usage = Usage()
    torch.cuda.reset_peak_memory_stats(device)
    torch.cuda.set_per_process_memory_fraction(min(1.0, num_bytes / total), index)
    try:
        yield usage
    finally:
        usage.peak_bytes = torch.cuda.max_memory_allocated(device)
        torch.cuda.set_per_process_memory_fraction(1.0, index)
