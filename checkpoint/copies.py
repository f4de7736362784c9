"""The bytes of a parcel into its slot, from host memory or a GPU, without keeping the interpreter."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor

from checkpoint.arena import Slot
from checkpoint.digest import SMALL_BYTES, digests
from checkpoint.errors import TornSnapshot
from checkpoint.format import SAME_SIZE
from checkpoint.planning import Draft
from checkpoint.region import Region, Shape
from checkpoint.shard import Cut, Parcel

_BRIEF_BYTES = 64 << 10
"""Copies up to this keep the interpreter's lock: they are over (10 us) sooner than a lock given up is had again."""
_CACHED_BYTES = 512 << 10
"""What a core's own cache holds of both a source and its copy; a multiple of DIGEST_BYTES."""
_copy_releasing = ctypes.CDLL(None).memmove
_copy_holding = ctypes.PyDLL(None).memmove
for _copy in (_copy_releasing, _copy_holding):
    _copy.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
    _copy.restype = None

Events = dict[torch.device, Any]
"""For each device, the event after which copies from it are over."""
Boxes = Iterator[tuple[tuple[slice, ...], Shape]]
"""Where boxes of a tensor lie, and their shapes."""


def moments(devices: Sequence[torch.device]) -> list[Any]:
    """Return, for each device, an event after all that is ordered on its current stream."""
    return [torch.cuda.current_stream(device).record_event() for device in devices]


class Streams:
    """For each GPU, the one stream on which copies are ordered."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, Any] = {}

    @contextlib.contextmanager
    def on(self, device: torch.device) -> Iterator[Any]:
        """Let what the block orders for the device go to the stream; yields it."""
        stream = self._streams.get(device)
        if stream is None:
            stream = self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        with torch.cuda.device(device), torch.cuda.stream(stream):
            yield stream

    def wait(self) -> None:
        """Return when nothing that was ordered is under way any more."""
        for stream in self._streams.values():
            stream.synchronize()

    def mark(self, device: torch.device) -> Any:
        """Return an event after all that was ordered on the device's stream; waiting for it leaves the core free."""
        with self.on(device) as stream:
            event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            event.record(stream)
        return event


class Copies:
    """Copies of one state's pieces."""

    def __init__(self, draft: Draft, streams: Streams) -> None:
        blueprint = draft.blueprint
        self._draft = draft
        self._streams = streams
        self._bases = [draft.tensors[base] for base in blueprint.bases]
        self._addresses = [draft.addresses[base] for base in blueprint.bases]
        self._flats: dict[int, Tensor | None] = {}
        self._is_plain = [
            base.device.type == "cpu" and piece.tensor.is_contiguous()
            for base, piece in zip(self._bases, blueprint.pieces, strict=True)
        ]

    def fill_and_digest(self, parcel: Parcel, slot: Slot) -> list[int]:
        """Copy a parcel of host memory into its slot; return the digests of its cuts.

        By turns, piece by piece, so that what is digested is still in the core's own cache: half the time.
        """
        found: list[int] = []
        for cut in parcel.cuts:
            start = parcel.page_offset + cut.start
            if not self._is_plain[cut.source]:
                self._copy_strided(parcel, (cut,), slot)
                found += digests(slot.memory[start : start + cut.nbytes])
                continue
            source = self._address(cut.source) + self._draft.blueprint.offsets[cut.source] + cut.source_start
            for done in range(0, cut.nbytes, _CACHED_BYTES):
                size = min(_CACHED_BYTES, cut.nbytes - done)
                copy = _copy_holding if size <= _BRIEF_BYTES else _copy_releasing
                copy(slot.address + start + done, source + done, size)
                found += digests(slot.memory[start + done : start + done + size])
        return found

    def fill(self, batch: Sequence[tuple[Parcel, Slot]]) -> Events:
        """Order the copies of parcels into their slots; they are over when the events are, at once without any."""
        orders: dict[torch.device, tuple[list[Tensor], list[Tensor]]] = {}
        for parcel, slot in batch:
            for is_plain, cuts in itertools.groupby(parcel.cuts, lambda cut: self._is_plain[cut.source]):
                if is_plain:
                    self._copy_plain(parcel, cuts, slot)
                    continue
                for device, alike in itertools.groupby(cuts, lambda cut: self._bases[cut.source].device):
                    if device.type == "cpu":
                        self._copy_strided(parcel, alike, slot)
                    else:
                        slot.pin()
                        targets, sources = orders.setdefault(device, ([], []))
                        for target, source in self._order(device, parcel, alike, slot):
                            targets.append(target)
                            sources.append(source)
        for device, (targets, sources) in orders.items():
            if targets:
                with self._streams.on(device):
                    # One call for all: between two, a busy training loop has the interpreter for up to 5 ms.
                    torch._foreach_copy_(targets, sources, non_blocking=True)
        return {device: self._streams.mark(device) for device in orders}

    def _copy_plain(self, parcel: Parcel, cuts: Iterable[Cut], slot: Slot) -> None:
        target = slot.address + parcel.page_offset
        for cut in cuts:
            address = self._address(cut.source) + self._draft.blueprint.offsets[cut.source]
            copy = _copy_holding if cut.nbytes <= _BRIEF_BYTES else _copy_releasing
            copy(target + cut.start, address + cut.source_start, cut.nbytes)

    def _copy_strided(self, parcel: Parcel, cuts: Iterable[Cut], slot: Slot) -> None:
        for cut in cuts:
            start = parcel.page_offset + cut.start
            source, boxes = self._view(cut)
            elements = source.view(SAME_SIZE[source.element_size()]).numpy()
            found = numpy.frombuffer(slot.memory[start : start + cut.nbytes], elements.dtype)
            position = 0
            for place, shape in boxes:
                size = math.prod(shape)
                numpy.copyto(found[position : position + size].reshape(shape), elements[place])
                position += size

    def _order(
        self, device: torch.device, parcel: Parcel, cuts: Iterable[Cut], slot: Slot
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield where large cuts from a GPU go, and their bytes; order the copies of all others.

        Those are put together on the GPU first, in memory that the next parcel's take over.
        """
        for is_direct, found in itertools.groupby(cuts, self._is_direct):
            run = list(found)
            if is_direct:
                for cut in run:
                    flat = self._flat(cut.source)
                    assert flat is not None
                    start = parcel.page_offset + cut.start
                    source = flat[cut.source_start : cut.source_start + cut.nbytes]
                    yield slot.tensor[start : start + cut.nbytes], source
                continue
            start = parcel.page_offset + run[0].start
            target = slot.tensor[start : start + sum(cut.nbytes for cut in run)]
            with self._streams.on(device):
                target.copy_(torch.cat([bits for cut in run for bits in self._runs(cut)]), non_blocking=True)

    def _is_direct(self, cut: Cut) -> bool:
        """Whether a cut from a GPU is worth a copy of its own, and lies there as in the file."""
        return cut.nbytes > SMALL_BYTES and self._flat(cut.source) is not None

    def _flat(self, source: int) -> Tensor | None:
        """Return the bytes of a piece without copying it; None where its elements do not lie side by side."""
        self._address(source)
        if source not in self._flats:
            tensor = self._draft.piece(source).tensor
            self._flats[source] = tensor.view(-1).view(torch.uint8) if tensor.is_contiguous() else None
        return self._flats[source]

    def _runs(self, cut: Cut) -> Iterator[Tensor]:
        flat = self._flat(cut.source)
        if flat is not None:
            yield flat[cut.source_start : cut.source_start + cut.nbytes]
            return
        source, boxes = self._view(cut)
        for place, _ in boxes:
            yield source[place].contiguous().view(-1).view(torch.uint8)

    def _view(self, cut: Cut) -> tuple[Tensor, Boxes]:
        """Return a piece's tensor, and where in it the boxes of a cut's elements lie."""
        self._address(cut.source)
        source = self._draft.piece(cut.source).tensor
        size = source.element_size()
        if source.is_contiguous():
            source = source.view(-1)
        start = cut.source_start // size
        boxes = Region.whole(tuple(source.shape)).part(start, start + cut.nbytes // size).boxes()
        return source, (
            (tuple(slice(first, first + n) for first, n in zip(offset, shape, strict=True)), shape)
            for offset, shape in boxes
        )

    def _address(self, source: int) -> int:
        """Return where an entry's memory starts. Raises TornSnapshot if it is not what it was."""
        address = self._bases[source].data_ptr()
        if address != self._addresses[source]:
            name = self._draft.blueprint.pieces[source].name
            raise TornSnapshot(
                f"{name!r} lost its memory before its copy was over; call fence() before tensors are resized or freed",
                (name,),
            )
        return address
