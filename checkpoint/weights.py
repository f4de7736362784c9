"""Plain safetensors files as the source of an import: read by ranges, and never believed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from checkpoint.errors import CorruptCheckpoint
from checkpoint.format import CHUNK_BYTES, CODES, MAX_HEADER_BYTES
from checkpoint.region import Region
from checkpoint.storage import Storage
from checkpoint.stream import Contents, Stream

_INDEX = ".safetensors.index.json"
_MAX_DIMS = 64
_MAX_BYTES = 2**63 - 1
"""What torch allows of a tensor."""


def files_of(storage: Storage) -> list[str]:
    """Return the safetensors files of a folder: those of its index, if it has one, else all."""
    names = {entry.name for entry in storage.entries("") if not entry.is_folder}
    indices = sorted(name for name in names if name.endswith(_INDEX))
    if len(indices) > 1:
        raise CorruptCheckpoint(f"{storage.url}: has several indices ({', '.join(indices)}); import one file by name")
    if not indices:
        return sorted(name for name in names if name.endswith(".safetensors"))
    path = f"{storage.url}/{indices[0]}"
    try:
        files = set(json.loads(storage.read(indices[0]))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptCheckpoint(f"{path}: is not an index ({error!r})") from error
    missing = sorted(str(file) for file in files if file not in names)
    if missing:
        raise CorruptCheckpoint(f"{path}: names {', '.join(missing)}, which the folder does not hold")
    return sorted(files)


def contents(storage: Storage, files: Sequence[str]) -> Contents:
    """Return the tensors of safetensors files together. Raises CorruptCheckpoint."""
    streams: dict[str, Stream] = {}
    for file in files:
        for stream in _streams(storage, file):
            if stream.name in streams:
                raise CorruptCheckpoint(f"{storage.url}: holds tensor {stream.name!r} twice")
            streams[stream.name] = stream
    return Contents(step=0, streams=list(streams.values()), objects={}, shared={"imported": "safetensors"})


def _streams(storage: Storage, file: str) -> Iterator[Stream]:
    source = f"{storage.url}/{file}"
    total = storage.size(file) or 0
    start, header = _header(storage, file, total, source)
    for name, value in header.items():
        if name == "__metadata__":
            continue
        problem = _problem(value, total - start)
        if problem:
            raise CorruptCheckpoint(f"{source}: tensor {name!r}: {problem}")
        first, end = (start + offset for offset in value["data_offsets"])
        shape = tuple(value["shape"])
        read = partial(_read, storage, file, first, end)
        yield Stream(name, CODES[value["dtype"]], shape, Region.whole(shape), read)


def _header(storage: Storage, file: str, total: int, source: str) -> tuple[int, dict[str, Any]]:
    """Return where the tensors start, and the header."""
    with storage.open(file) as data:
        prefix = bytearray(8)
        count = data.read_into(0, memoryview(prefix))
        length = int.from_bytes(prefix, "little")
        if count < 8 or length > min(MAX_HEADER_BYTES, total - 8):
            raise CorruptCheckpoint(f"{source}: is not a safetensors file, or was cut short")
        text = bytearray(length)
        data.read_into(8, memoryview(text))
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpoint(f"{source}: has no readable header ({error})") from error
    if not isinstance(header, dict):
        raise CorruptCheckpoint(f"{source}: has no readable header")
    return 8 + length, header


def _problem(value: Any, available: int) -> str | None:
    """Say what is wrong with an entry of a header; None if nothing is."""
    try:
        dtype, shape, (first, end) = value["dtype"], value["shape"], value["data_offsets"]
    except (TypeError, KeyError, ValueError):
        return "its entry is malformed"
    if dtype not in CODES:
        return f"unknown dtype {dtype!r}"
    if not isinstance(shape, list) or any(type(n) is not int or n < 0 for n in [*shape, first, end]):
        return "its entry is malformed"
    if len(shape) > _MAX_DIMS or math.prod(n for n in shape if n) * CODES[dtype].itemsize > _MAX_BYTES:
        return "has a shape that no tensor can have"
    if not first <= end <= available:
        return f"lies at [{first}, {end}) of {available} bytes"
    expected = math.prod(shape) * CODES[dtype].itemsize
    return None if end - first == expected else f"has {end - first} bytes, its shape needs {expected}"


def _read(storage: Storage, file: str, start: int, end: int) -> Iterator[torch.Tensor]:
    """Yield the bytes of a tensor."""
    with storage.open(file) as data:
        for position in range(start, end, CHUNK_BYTES):
            buffer = bytearray(min(CHUNK_BYTES, end - position))
            if data.read_into(position, memoryview(buffer)) < len(buffer):
                raise CorruptCheckpoint(f"{storage.url}/{file}: was cut short")
            yield torch.frombuffer(buffer, dtype=torch.uint8)
