"""Parts that GPUs write into each other's memory by their copy engines, which leaves all cores to the products.

Every GPU of a group has slots that the others can write into. A rank writes its part there, piece by piece as it has
them, and says so after each; what reads a piece waits for that word alone. Nothing is copied before it is sent, and
nobody has to be ready for it: a slot is used again when its owner said that it has read what came four transfers ago,
which it did long since. Copies are on a stream of their own, so nothing waits on the host.

Words are written and waited for by the streams themselves (`cuStreamWriteValue32`, `cuStreamWaitValue32`): a kernel
that did it, such as the barrier of torch's symmetric memory, would have to wait for a product to leave a core free, and
the copies with it. So does a copy inside one GPU, which takes cores: it gets another stream.

Multicast is never used: torch would set it up with the first buffers of a process, so its switch for that, the
environment variable TORCH_SYMM_MEM_DISABLE_MULTICAST, is set before.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

_SLOTS = 4
"""Transfers that may be under way at once. Two are, at most, in a product's backward, four in a long ring's."""
_ALIGNMENT = 256
_WORD_BYTES = 4
_BOOT = Path("/proc/sys/kernel/random/boot_id")
_GREATER_OR_EQUAL = 0
"""CU_STREAM_WAIT_VALUE_GEQ; it compares cyclically."""


def available(group: ProcessGroup, like: Tensor) -> bool:
    """Return whether GPUs of the group can reach each other's memory; all ranks ask alike, and are told the same."""
    return like.is_cuda and _can_reach(group, like.device)


class Buffers:
    """A group's slots; every rank makes the same calls in the same order, from one stream."""

    def __init__(self, group: ProcessGroup, device: torch.device) -> None:
        self.group, self.rank, self.size = group, group.rank(), group.size()
        self.pushing = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        self.aside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._region: _Region | None = None
        self._closed: list[int] = []

    def open(self, num_bytes: int, num_pieces: int) -> Transfer:
        """Begin a transfer for which every rank has `num_bytes` of a slot, and which comes in `num_pieces` of each.

        The pieces of one transfer are all pushed before the next one is opened. Blocks the host where the slots have
        to grow, until all ranks are there.
        """
        if self._region is None or num_bytes > self._region.slot_bytes:
            self._region = _Region(self.group, num_bytes)
            self._closed.clear()
        transfer = Transfer(self, self._region, num_pieces)
        # First what others may wait for. The slots that are given back were read on the current stream.
        self.pushing.wait_stream(torch.cuda.current_stream())
        for number in self._closed:
            for peer in self.others:
                self._region.write(self.pushing, self._region.releases_at[peer], number)
        self._closed.clear()
        for peer in self.others:
            self._region.wait(self.pushing, self._region.releases[peer], transfer.number - _SLOTS)
        return transfer

    def give_back(self, transfer: Transfer) -> None:
        """Let others know, when the next transfer is opened, that they may write into this one's slot again."""
        if transfer.region is self._region:
            assert not self._closed or self._closed[-1] < transfer.number, "a word says that all before are closed too"
            self._closed.append(transfer.number)

    @property
    def others(self) -> list[int]:
        """The other ranks, beginning with the next: so not all send to the same one at once."""
        return [(self.rank + step) % self.size for step in range(1, self.size)]


class Transfer:
    """What is under way between all ranks: pieces that this one sends, and those that come into its slot."""

    def __init__(self, buffers: Buffers, region: _Region, num_pieces: int) -> None:
        self._buffers, self.region = buffers, region
        self.number, self._first_word = region.count(num_pieces)
        self._num_sent = 0
        self._held: list[Tensor] = []
        self._sent: torch.cuda.Event | None = None
        self._copied: torch.cuda.Event | None = None

    def memory(self, shape: Sequence[int], dtype: torch.dtype, rank: int | None = None) -> Tensor:
        """Return a rank's slot, by default this one's, as a tensor of this shape."""
        owner = self._buffers.rank if rank is None else rank
        return self.region.slot(owner, self.number, shape, dtype)

    def send(self, copies: Mapping[int, Iterable[tuple[Tensor, Tensor]]], *, is_old: bool = False) -> None:
        """Send one more piece: by rank (source, place in its slot), each contiguous; every rank is told.

        Sources must not change before `close`; with `is_old` they were complete when the transfer was opened.
        """
        self._num_sent += 1
        stream = self._buffers.pushing
        if not is_old:
            stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for peer in self._buffers.others:
                for source, place in copies.get(peer, ()):
                    place.copy_(source, non_blocking=True)
                    self._held.append(source)
                self.region.write(stream, self.region.arrivals_at[peer], self._first_word + self._num_sent)
            self._sent = stream.record_event()

    def copy(self, source: Tensor, place: Tensor) -> None:
        """Copy into this rank's own slot, aside; `arrived` waits for it."""
        aside = self._buffers.aside
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            copy_into(place, source)
            self._copied = aside.record_event()
        self._held.append(source)

    def arrived(self, rank: int, num_pieces: int = 1) -> None:
        """Let the current stream wait until so many pieces from a rank are in this one's slot, or what was copied."""
        stream = torch.cuda.current_stream()
        if rank != self._buffers.rank:
            self.region.wait(stream, self.region.arrivals[rank], self._first_word + num_pieces)
        elif self._copied is not None:
            stream.wait_event(self._copied)

    def close(self) -> None:
        """Give the slot back: all that reads it is on the current stream by now."""
        stream = torch.cuda.current_stream()
        for event in (self._sent, self._copied):
            if event is not None:
                stream.wait_event(event)
        self._held.clear()
        self._buffers.give_back(self)


class _Region:
    """Memory of all ranks: the slots, and words from each of the others."""

    def __init__(self, group: ProcessGroup, num_bytes: int) -> None:
        os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"  # torch reads it once, at its first buffer
        import torch.distributed._symmetric_memory as symmetric_memory

        torch.cuda.synchronize()
        dist.barrier(group)
        rank, size = group.rank(), group.size()
        self.slot_bytes = -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        end = _SLOTS * self.slot_bytes
        device = torch.device("cuda", torch.cuda.current_device())
        self._whole = symmetric_memory.empty(end + 2 * size * _WORD_BYTES, dtype=torch.uint8, device=device)
        self._whole[end:].zero_()
        self._memory: Any = symmetric_memory.rendezvous(self._whole, group.group_name)
        self._num_transfers = self._num_words = 0
        own = self._whole.data_ptr() + end
        self.arrivals = [own + other * _WORD_BYTES for other in range(size)]
        """Addresses of words here: how many pieces have come from a rank."""
        self.releases = [own + (size + other) * _WORD_BYTES for other in range(size)]
        """Addresses of words here: which transfer a rank has closed."""
        theirs = [self._memory.get_buffer(other, (1,), torch.uint8, end).data_ptr() for other in range(size)]
        self.arrivals_at = [address + rank * _WORD_BYTES for address in theirs]
        """Addresses of the words of this rank in the memory of each."""
        self.releases_at = [address + (size + rank) * _WORD_BYTES for address in theirs]
        torch.cuda.synchronize()
        dist.barrier(group)  # all words are 0 before the first is written

    def count(self, num_pieces: int) -> tuple[int, int]:
        """Return the number of one more transfer, from 1 on, and how many words came before its own."""
        self._num_transfers += 1
        before = self._num_words
        self._num_words += num_pieces
        return self._num_transfers, before

    def slot(self, rank: int, number: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return the slot of a transfer at a rank."""
        offset = number % _SLOTS * self.slot_bytes // dtype.itemsize
        return self._memory.get_buffer(rank, tuple(shape), dtype, offset)  # type: ignore[no-any-return]

    def write(self, stream: torch.cuda.Stream, address: int, word: int) -> None:
        """Let a stream write a word once all before it is done."""
        _checked(_driver().cuStreamWriteValue32_v2(stream.cuda_stream, address, word % 2**32, 0))

    def wait(self, stream: torch.cuda.Stream, address: int, word: int) -> None:
        """Let a stream wait for a word, or a later one."""
        if word > 0:
            _checked(_driver().cuStreamWaitValue32_v2(stream.cuda_stream, address, word % 2**32, _GREATER_OR_EQUAL))


_WIDE = torch.complex128
"""16 bytes: as torch's kernel copies a strided tensor element by element, few and wide ones."""


def copy_into(place: Tensor, source: Tensor) -> None:
    """Copy between tensors of one dtype on one GPU, at the rate of its memory where their rows allow it."""
    ratio = _WIDE.itemsize // place.itemsize
    fits = ratio > 1 and all(
        x.stride(-1) == 1
        and x.data_ptr() % _WIDE.itemsize == 0
        and all(n % ratio == 0 for n in (x.shape[-1], x.storage_offset(), *x.stride()[:-1]))
        for x in (place, source)
    )
    if fits:
        place, source = place.view(_WIDE), source.view(_WIDE)
    place.copy_(source, non_blocking=True)


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
def _can_reach(group: ProcessGroup, device: torch.device) -> bool:
    """Return whether all ranks are on one host whose GPUs reach each other; waits for all of them, once."""
    here = device.index if device.index is not None else torch.cuda.current_device()
    reaches = all(
        torch.cuda.can_device_access_peer(here, peer) for peer in range(torch.cuda.device_count()) if peer != here
    )
    name = hashlib.sha256(f"{platform.node()} {_BOOT.read_text() if _BOOT.exists() else ''}".encode()).digest()
    place = int.from_bytes(name[:7], "little") if reaches else -1 - group.rank()
    mine = torch.tensor([place], device=device)
    places = mine.new_empty(group.size())
    dist.all_gather_into_tensor(places, mine, group=group)
    return len(set(places.tolist())) == 1
