"""Safetensors files written from streams of tensors, on the calling thread, one chunk in memory at a time.

For what converts, exports or is driven by another saver: there is no training loop to hide from, and the source
may be larger than memory. The saves of a `Checkpointer` have their own, concurrent path.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from checkpoint.errors import InvalidState
from checkpoint.format import CHUNK_BYTES, CODES, DTYPES, Entry, digests, encode_header, fingerprint
from checkpoint.manifest import SHARED, FileRecord, SavedSlice
from checkpoint.region import Region, Shape
from checkpoint.shard import Written, rank_name
from checkpoint.storage import Storage

Bytes = np.ndarray[tuple[int], np.dtype[np.uint8]]
Tensors = Callable[[], Iterator[torch.Tensor]]
"""Yields the elements of something in row-major order, in tensors of any shape, device and strides."""


@dataclass(frozen=True, slots=True, eq=False)
class Item:
    """One tensor of a file, and where its elements come from."""

    entry: Entry
    tensors: Tensors


@dataclass(frozen=True, slots=True)
class Placed:
    """Where an item came to lie, and what proves it."""

    byte_start: int
    """From the start of the file."""
    digests: tuple[int, ...]
    """Of its consecutive chunks."""


@dataclass(frozen=True, slots=True, eq=False)
class Stream:
    """One slice of a state, as a stream of its elements."""

    name: str
    dtype: torch.dtype
    global_shape: Shape
    region: Region
    tensors: Tensors
    owner: int = SHARED

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor) -> Stream:
        """Return the stream of a whole tensor."""
        shape = tuple(tensor.shape)
        return cls(name, tensor.dtype, shape, Region.whole(shape), lambda: iter((tensor,)))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Contents:
    """A checkpoint of another library, ready to be written as one of ours."""

    step: int
    streams: Sequence[Stream]
    objects: Mapping[str, Any]
    """Plain values, kept as rank 0's."""
    shared: Mapping[str, Any]
    """Plain values, kept in the commit record."""


def write_file(
    storage: Storage, path: str, items: Sequence[Item], progress: Callable[[int], None] | None = None
) -> tuple[FileRecord, list[Placed]]:
    """Write a plain safetensors file; return what proves it, and the places of the items as given.

    Args:
        storage: where to.
        path: the file; it is whole and durable when this returns.
        items: in any order; in the file they go by falling element size.
        progress: called with the number of bytes that each write added.
    """
    order = sorted(range(len(items)), key=lambda i: (-CODES[items[i].entry.dtype].itemsize, items[i].entry.key))
    header = encode_header([items[i].entry for i in order], {"format": "pt"})
    placed: dict[int, Placed] = {}
    position = len(header)
    buffer = np.empty(CHUNK_BYTES, dtype=np.uint8)
    with storage.create(path) as sink:
        sink.write(header)
        for i in order:
            found: list[int] = []
            for chunk in _chunks(items[i], buffer):
                found += digests(chunk.data)
                sink.write(chunk.data)
                if progress:
                    progress(chunk.nbytes)
            placed[i] = Placed(position, tuple(found))
            position += items[i].entry.nbytes
    record = FileRecord(path.rpartition("/")[2], position, len(header), fingerprint(header))
    return record, [placed[i] for i in range(len(items))]


def write_part(storage: Storage, folder: str, rank: int, streams: Sequence[Stream], objects: bytes) -> Written:
    """Write a rank's shard and objects into an attempt's folder, durable when it returns.

    Raises InvalidState, naming every stream whose dtype cannot be saved.
    """
    wrong = sorted(f"{s.name!r}: has dtype {s.dtype}" for s in streams if s.dtype not in DTYPES)
    if wrong:
        raise InvalidState("; ".join(wrong))
    items = [
        Item(Entry(key, DTYPES[s.dtype], s.region.shape if s.region.is_box else (s.region.numel,)), s.tensors)
        for key, s in zip(_keys(streams, rank), streams, strict=True)
    ]
    path = f"{rank_name(rank)}.safetensors"
    shard, places = write_file(storage, f"{folder}/{path}", items)
    rows = [
        SavedSlice(
            name=s.name,
            owner=s.owner,
            dtype=DTYPES[s.dtype],
            global_shape=s.global_shape,
            region=s.region,
            file=path,
            byte_start=place.byte_start,
            digests=place.digests,
        )
        for s, place in zip(streams, places, strict=True)
    ]
    kept = f"{rank_name(rank)}.objects.json"
    storage.write(f"{folder}/{kept}", objects)
    return Written(tuple(rows), (shard, FileRecord(kept, len(objects), len(objects), fingerprint(objects))))


def _chunks(item: Item, buffer: Bytes) -> Iterator[Bytes]:
    """Yield the item's bytes in runs of CHUNK_BYTES, gathered in `buffer`."""
    fill = total = 0
    for tensor in item.tensors():
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        total += data.nbytes
        while data.nbytes:
            count = min(data.nbytes, buffer.nbytes - fill)
            buffer[fill : fill + count] = data[:count]
            data, fill = data[count:], fill + count
            if fill == buffer.nbytes:
                yield buffer
                fill = 0
    if fill:
        yield buffer[:fill]
    if total != item.entry.nbytes:
        raise InvalidState(f"{item.entry.key!r}: its source holds {total} bytes, {item.entry.nbytes} were announced")


def _keys(streams: Sequence[Stream], rank: int) -> list[str]:
    """Return the names tensors have inside the shard: of whole ones their own; for other tools only."""
    whole = {s.name for s in streams if _is_whole(s)}
    seen: Counter[str] = Counter()
    keys = []
    for s in streams:
        if _is_whole(s):
            keys.append(s.name)
            continue
        key = f"{s.name}@{rank_name(rank)}"
        while (found := f"{key}.{seen[key]}" if seen[key] else key) in whole:
            seen[key] += 1
        seen[key] += 1
        keys.append(found)
    return keys


def _is_whole(stream: Stream) -> bool:
    if stream.owner != SHARED or stream.name == "__metadata__":
        return False
    return stream.region == Region.whole(stream.global_shape)
