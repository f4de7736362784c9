"""The GPU tier: blocks in the memory of a device."""

from __future__ import annotations

import torch

from offload.threaded import ThreadedTier
from offload.tier import TierSpec


class GpuTier(ThreadedTier[torch.Tensor]):
    """Blocks on `device`. Transfers run on a stream of their own and wait for nothing that others enqueued.

    As for every tier, `write` takes from and `read` gives to tensors on the CPU.
    """

    def __init__(self, spec: TierSpec, device: torch.device, *, num_threads: int = 1, digests: bool = False) -> None:
        super().__init__(spec, _DeviceMemory(device), num_threads=num_threads, digests=digests)


class _DeviceMemory:
    """A medium whose places are tensors on a device."""

    granularity_bytes = 512  # what CUDA's allocator rounds to

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def reserve(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device=self._device)

    def release(self, place: torch.Tensor) -> None:
        """Nothing to do: the memory goes with the last reference."""

    def store(self, place: torch.Tensor, data: torch.Tensor) -> None:
        self._copy(place[: data.numel()], data)

    def load(self, place: torch.Tensor, into: torch.Tensor) -> None:
        self._copy(into, place[: into.numel()])

    def view(self, place: torch.Tensor, num_bytes: int) -> torch.Tensor | None:
        """Return None where the CPU cannot address the device."""
        return place[:num_bytes] if self._device.type == "cpu" else None

    def close(self) -> None:
        """Nothing to do: the memory went with the blocks."""

    def _copy(self, into: torch.Tensor, source: torch.Tensor) -> None:
        if self._stream is None:
            into.copy_(source)
            return
        with torch.cuda.stream(self._stream):
            into.copy_(source, non_blocking=True)
        self._stream.synchronize()
