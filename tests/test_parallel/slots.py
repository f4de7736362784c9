"""What `parallel.symmetric` offers, among processes that share files: every access in the order of the calls."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

_SLOTS = 4
_SLOT_BYTES = 2**20
_TIMEOUT_S = 30.0


class Buffers:
    """A rank's view of all ranks' slots; `folder` is new, and the same for all ranks."""

    def __init__(self, folder: Path, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.num_transfers = self.num_words = self.num_open = self.num_closed = 0
        shape = (_SLOTS, _SLOT_BYTES)
        names = [str(folder / f"slots{owner}") for owner in range(size)]
        self.slots = [
            torch.from_file(name, True, _SLOTS * _SLOT_BYTES, dtype=torch.uint8).view(shape) for name in names
        ]
        words = torch.from_file(str(folder / "words"), True, 2 * size * size, dtype=torch.int64)
        self.arrivals, self.releases = words.view(2, size, size)
        """[owner, writer]"""

    @property
    def others(self) -> list[int]:
        return [(self.rank + step) % self.size for step in range(1, self.size)]

    def open(self, num_bytes: int, num_pieces: int) -> Transfer:
        assert num_bytes <= _SLOT_BYTES
        return Transfer(self, num_pieces)


class Transfer:
    """One transfer; what a slot had when it was closed is overwritten."""

    def __init__(self, buffers: Buffers, num_pieces: int) -> None:
        self._buffers, self._num_pieces, self._num_sent = buffers, num_pieces, 0
        buffers.num_transfers += 1
        buffers.num_open += 1
        assert buffers.num_open <= _SLOTS, "more at once than there are slots: ranks would wait for each other"
        self._number, self._first_word = buffers.num_transfers, buffers.num_words
        buffers.num_words += num_pieces
        for peer in range(buffers.size):
            if peer != buffers.rank:
                _wait(buffers.releases[buffers.rank, peer], self._number - _SLOTS)

    def memory(self, shape: Sequence[int], dtype: torch.dtype, rank: int | None = None) -> Tensor:
        owner = self._buffers.rank if rank is None else rank
        slot = self._buffers.slots[owner][self._number % _SLOTS]
        num_bytes = torch.Size(shape).numel() * dtype.itemsize
        return slot[:num_bytes].view(dtype).view(*shape)

    def send(self, copies: Mapping[int, Iterable[tuple[Tensor, Tensor]]], *, is_old: bool = False) -> None:
        self._num_sent += 1
        assert self._num_sent <= self._num_pieces
        assert self._buffers.num_words == self._first_word + self._num_pieces, "the one before is not sent yet"
        for peer in range(self._buffers.size):
            if peer != self._buffers.rank:
                for source, place in copies.get(peer, ()):
                    assert source.is_contiguous()
                    assert place.is_contiguous()
                    place.copy_(source)
                self._buffers.arrivals[peer, self._buffers.rank] = self._first_word + self._num_sent

    def copy(self, source: Tensor, place: Tensor) -> None:
        place.copy_(source)

    def arrived(self, rank: int, num_pieces: int = 1) -> None:
        if rank != self._buffers.rank:
            _wait(self._buffers.arrivals[self._buffers.rank, rank], self._first_word + num_pieces)

    def close(self) -> None:
        assert self._num_sent == self._num_pieces
        for peer in range(self._buffers.size):  # what nobody waited for may still be on its way
            self.arrived(peer, self._num_pieces)
        self._buffers.num_open -= 1
        self._buffers.num_closed += 1
        assert self._number == self._buffers.num_closed, "a word says that all before are closed too"
        self._buffers.slots[self._buffers.rank][self._number % _SLOTS] = 255
        for peer in range(self._buffers.size):
            self._buffers.releases[peer, self._buffers.rank] = self._number


def _wait(word: Tensor, value: int) -> None:
    deadline = time.monotonic() + _TIMEOUT_S
    while int(word) < value:
        assert time.monotonic() < deadline, f"a word is {int(word)} and was to become {value}"
        time.sleep(0.0002)
