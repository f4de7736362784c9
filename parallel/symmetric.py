"""Parts that GPUs fetch from each other's memory by their copy engines, which leaves all cores to the products.

Every GPU of a group has a buffer that the others can read. A rank puts its part there, tells the others and waits for
their word, and each fetches what it needs; all on a stream of its own, so nothing waits on the host. Words are written
and waited for by the stream itself (`cuStreamWriteValue32`, `cuStreamWaitValue32`): a kernel that did it, such as the
barrier of torch's symmetric memory, would have to wait for a product to leave a core free, and the copies with it.

Multicast is never used: torch would set it up with the first buffers of a process, so its switch for that, the
environment variable TORCH_SYMM_MEM_DISABLE_MULTICAST, is set before.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

_SLOTS = 3
"""Buffers in turn. Two operations of a rank may be under way at once, and what the one before them put in place may
still be read by others, who are known to be done with it when the next barrier was passed."""
_ALIGNMENT = 256
_WORD_BYTES = 4
_GREATER_OR_EQUAL = 0
"""CU_STREAM_WAIT_VALUE_GEQ; it compares cyclically."""


def available(group: ProcessGroup, like: Tensor) -> bool:
    """Return whether GPUs of the group can read each other's memory."""
    if not like.is_cuda:
        return False
    return _can_read(group.group_name, group.size(), like.device)


class Buffers:
    """A group's buffers; every rank makes the same calls in the same order, from one stream."""

    def __init__(self, group: ProcessGroup, device: torch.device) -> None:
        self.group, self.rank, self.size = group, group.rank(), group.size()
        self._stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        self._slot = 0
        self._slot_bytes = 0
        self._memory: Any = None
        self._meetings = 0
        self._own_words: list[int] = []
        self._words_of_peers: list[int] = []

    def gather(self, part: Tensor, put: Callable[[int, Tensor], None], *, own: bool = False) -> Callable[[], None]:
        """Begin to hand every other rank's tensor, shaped like this rank's contiguous `part`, to `put(rank, tensor)`.

        `put` enqueues copies out of it; with `own` of `part` too, which must not change before they are done. The
        function that is returned makes the current stream wait for them.
        """
        offset = self._claim(part.nbytes, part.itemsize)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._at(self.rank, part.shape, part.dtype, offset).copy_(part)
            if own:
                put(self.rank, part)
        return self._fetch(lambda rank: self._at(rank, part.shape, part.dtype, offset), put, part)

    def outbox(self, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Callable[..., Callable[[], None]]]:
        """Return (a tensor [ranks, *shape] to write each rank's part into, what begins to fetch once it is written).

        `begin(put)` hands the part that each other rank has for this one to `put(rank, tensor)`, as `gather` does.
        """
        numel = 1
        for length in shape:
            numel *= length
        offset = self._claim(self.size * numel * dtype.itemsize, dtype.itemsize)
        boxes = self._at(self.rank, (self.size, *shape), dtype, offset)

        def begin(put: Callable[[int, Tensor], None]) -> Callable[[], None]:
            self._stream.wait_stream(torch.cuda.current_stream())
            return self._fetch(lambda rank: self._at(rank, shape, dtype, offset + self.rank * numel), put)

        return boxes, begin

    def _fetch(
        self, at: Callable[[int], Tensor], put: Callable[[int, Tensor], None], *kept: Tensor
    ) -> Callable[[], None]:
        """Fetch others' parts; `kept` is what the stream still reads, whose memory is not given away before."""
        with torch.cuda.stream(self._stream):
            self._meet()
            for step in range(1, self.size):
                rank = (self.rank - step) % self.size
                put(rank, at(rank))
            done = self._stream.record_event()
        held = list(kept)

        def wait() -> None:
            torch.cuda.current_stream().wait_event(done)
            held.clear()

        return wait

    def _meet(self) -> None:
        """Let the stream tell all others that it got here, and wait until they did."""
        self._meetings = (self._meetings + 1) % 2**32
        stream, word = self._stream.cuda_stream, self._meetings
        for address in self._words_of_peers:
            _checked(_driver().cuStreamWriteValue32_v2(stream, address, word, 0))
        for address in self._own_words:
            _checked(_driver().cuStreamWaitValue32_v2(stream, address, word, _GREATER_OR_EQUAL))

    def _claim(self, num_bytes: int, itemsize: int) -> int:
        """Return the offset, in elements, of the next slot, after all ranks have made it large enough."""
        if num_bytes > self._slot_bytes:
            os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"  # torch reads it once, at its first buffer
            import torch.distributed._symmetric_memory as symmetric_memory

            torch.cuda.synchronize()
            dist.barrier(self.group)
            self._slot_bytes = -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
            end = _SLOTS * self._slot_bytes
            device = torch.device("cuda", torch.cuda.current_device())
            whole = symmetric_memory.empty(end + self.size * _WORD_BYTES, dtype=torch.uint8, device=device)
            whole[end:].zero_()
            self._whole = whole
            self._memory = symmetric_memory.rendezvous(whole, self.group.group_name)
            self._meetings = 0
            others = [rank for rank in range(self.size) if rank != self.rank]
            own = whole.data_ptr() + end
            self._own_words = [own + rank * _WORD_BYTES for rank in others]
            theirs = [self._at(rank, (1,), torch.uint8, end + self.rank * _WORD_BYTES) for rank in others]
            self._words_of_peers = [word.data_ptr() for word in theirs]
            torch.cuda.synchronize()
            dist.barrier(self.group)  # all words are 0 before the first is written
        self._slot = (self._slot + 1) % _SLOTS
        return self._slot * self._slot_bytes // itemsize

    def _at(self, rank: int, shape: tuple[int, ...], dtype: torch.dtype, offset: int) -> Tensor:
        return self._memory.get_buffer(rank, tuple(shape), dtype, offset)  # type: ignore[no-any-return]


@cache
def buffers(group: ProcessGroup, device: torch.device) -> Buffers:
    """Return the buffers of a group, which are made once."""
    return Buffers(group, device)


@cache
def _driver() -> Any:
    """Return CUDA's driver library, two functions of which take a stream, an address, a word and flags."""
    library = ctypes.CDLL("libcuda.so.1")
    for function in (library.cuStreamWriteValue32_v2, library.cuStreamWaitValue32_v2):
        function.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint]
        function.restype = ctypes.c_int
    return library


def _checked(code: int) -> None:
    if code:
        raise RuntimeError(
            f"parallel.overlap: CUDA's driver refuses a word between GPUs (error {code}); set it to false"
        )


@cache
def _can_read(name: str, size: int, device: torch.device) -> bool:
    """Return whether this host's GPUs reach each other; a group over several hosts has more ranks than those."""
    peers = range(torch.cuda.device_count())
    here = device.index if device.index is not None else torch.cuda.current_device()
    local = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    return size <= local and all(torch.cuda.can_device_access_peer(here, peer) for peer in peers if peer != here)
