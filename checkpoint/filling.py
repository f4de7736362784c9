"""Destinations filled with what a checkpoint's chunks hold, after or while these are verified."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

import numpy
import torch

from checkpoint.errors import CorruptCheckpoint
from checkpoint.format import CHUNK_BYTES, CODES, SAME_SIZE
from checkpoint.region import Region, Shape
from checkpoint.reshard import Read, view
from checkpoint.state import Piece
from checkpoint.transfer import Bytes, Transfer, Window, allocate, windows

LEAST_BUFFER_BYTES = 32 << 20
"""A load holds this much even where less is allowed: less would keep its threads waiting for each other."""


def difference(piece: Piece, dtype: torch.dtype, shape: Shape) -> str | None:
    """Return why a destination cannot take a tensor that was saved with this dtype and shape; None if it can."""
    if piece.tensor.dtype != dtype:
        found, saved = (str(d).removeprefix("torch.") for d in (piece.tensor.dtype, dtype))
        return f"was saved as {saved}, the destination is {found}"
    if piece.global_shape != shape:
        return f"was saved with shape {list(shape)}, the destination has {list(piece.global_shape)}"
    tensor = piece.tensor
    if any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        return (
            "cannot be filled: elements of the destination are one place in memory; pass an expanded tensor's clone()"
        )
    return None


def raise_first(faults: Iterator[CorruptCheckpoint], *, overwriting: bool = False) -> None:
    """Raise the first fault there is, which says so if destinations are partly overwritten."""
    for fault in faults:
        if overwriting:
            fault.add_note("destinations hold a part of it: load another checkpoint into them")
        raise fault


def fill(
    transfer: Transfer, held: Sequence[Window], copy: Callable[[Read, Bytes], None], on_host: Collection[int]
) -> int:
    """Verify all, then copy all; return the bytes that were read until all was verified.

    The last window stays in memory meanwhile. `on_host` are the targets that any thread may fill.
    """

    def copy_all(window: Window) -> None:
        def copy_here(read: Read, data: Bytes) -> None:
            if read.target in on_host:
                copy(read, data)

        def copy_there(read: Read, data: Bytes) -> None:
            if read.target not in on_host:  # from this thread, and so in its stream
                copy(read, data)

        transfer.hand_out(window, memory, copy_here)
        window.each(memory, copy_there)

    *earlier, last = held or [Window()]
    raise_first(transfer.stream((w for e in earlier for w in windows(e.reads, CHUNK_BYTES)), None))
    memory = allocate(max(window.nbytes for window in (last, *earlier)))
    raise_first(transfer.fetch(last, memory))
    read_bytes = transfer.read_bytes
    copy_all(last)
    for window in earlier:
        raise_first(transfer.fetch(window, memory), overwriting=True)
        copy_all(window)
    return read_bytes


def fill_fresh(transfer: Transfer, found: Sequence[tuple[Read, Piece]], copy: Callable[[Read, Bytes], None]) -> int:
    """Copy each chunk as soon as it is verified; return the bytes that were read until all was verified.

    What is one rank's own another checkpoint may not have for it: that must not keep a part of this one, and is copied
    after everything else.
    """
    own = {read.target for read, piece in found if piece.kind == "local"}
    here = [read for read, piece in found if piece.tensor.device.type == "cpu" or read.target in own]
    there = [read for read, piece in found if piece.tensor.device.type != "cpu" and read.target not in own]

    def copy_shared(read: Read, data: Bytes) -> None:
        if read.target not in own:
            copy(read, data)

    raise_first(transfer.stream(windows(here, CHUNK_BYTES), copy_shared), overwriting=True)
    is_pinned = any(piece.tensor.device.type == "cuda" for _, piece in found)
    _copy_in_turn(transfer, there, copy, is_pinned=is_pinned)
    read_bytes = transfer.read_bytes
    _copy_in_turn(transfer, [read for read in here if read.target in own], copy, is_pinned=is_pinned)
    return read_bytes


def _copy_in_turn(
    transfer: Transfer, reads: Sequence[Read], copy: Callable[[Read, Bytes], None], *, is_pinned: bool
) -> None:
    """Read, verify and copy window by window: to devices from this thread, and so in its stream."""
    if not reads:
        return
    memory = torch.empty(2 * LEAST_BUFFER_BYTES, dtype=torch.uint8, pin_memory=is_pinned).numpy()
    for window in windows(reads, LEAST_BUFFER_BYTES):
        raise_first(transfer.fetch(window, memory), overwriting=True)
        window.each(memory, copy)


@torch.no_grad()
def scatter(read: Read, data: Bytes, tensor: torch.Tensor, region: Region) -> None:
    """Copy what `region` wants of some chunks into the tensor that holds it."""
    source = torch.from_numpy(data).view(CODES[read.row.dtype])
    for offset, shape in read.boxes:
        found, target = view(source, read.region, offset, shape), view(tensor, region, offset, shape)
        if target.device.type == "cpu":  # torch would have every reading thread start threads of its own
            bits = SAME_SIZE[target.element_size()]
            numpy.copyto(target.view(bits).numpy(), found.view(bits).numpy())
        else:
            target.copy_(found)
