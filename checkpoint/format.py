"""Bytes on disk: safetensors shards whose data starts on a page, and digests per chunk. Pure.

A shard is a plain safetensors file (`u64 header length | JSON header | tensors without holes`); its header is
padded with spaces, which the format allows, so that the first tensor starts on a multiple of `ALIGN_BYTES`
and aligned direct I/O and page-aligned mapping stay possible. Tensors are ordered by falling element size, so
each is aligned to its own. Digests are xxh3-64 of the consecutive `DIGEST_BYTES` of each slice, counted from the
slice's first byte: what a load reads it can verify alone, and an unchanged chunk keeps its digest when the
file around it changes.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import xxhash

from checkpoint.errors import CorruptCheckpoint, SaveFailed, UnsupportedFormat
from checkpoint.region import Shape

FORMAT = "checkpoint/1"
"""Name and version of the format; a reader refuses any other."""
CHUNK_BYTES = 8 << 20
"""What is copied, written and read at once; a multiple of `DIGEST_BYTES`."""
DIGEST_BYTES = 64 << 10
"""Bytes of a slice under one digest; a multiple of every element size.

Small, so that a part of a slice can be verified without reading much more than it: a third of 16 MiB costs 1 % more.
Below 100 kB xxhash keeps the interpreter's lock: at 24 GB/s that is 0.3 ms a `CHUNK_BYTES`, where giving it up and
waiting to get it back from a busy training loop cost up to 5 ms a digest. A digest is 8 bytes, 0.012 % of the data."""
LARGEST_DIGEST_BYTES = 8 << 20
"""Tables of the format may have larger chunks, up to this; the first versions of this package wrote 8 MiB."""
ALIGN_BYTES = 4096
"""The data of a shard starts on a multiple of this."""
MAX_HEADER_BYTES = 100_000_000
"""The safetensors format's own limit."""

DTYPES: Mapping[torch.dtype, str] = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
}
"""Element types that can be saved, and their safetensors codes."""
CODES: Mapping[str, torch.dtype] = {code: dtype for dtype, code in DTYPES.items()}

if sys.byteorder != "little":
    raise ImportError("checkpoint writes tensors as they lie in memory, little-endian; this machine is not")


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a shard: its key, its type and its size, in file order."""

    key: str
    dtype: str
    shape: Shape

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * CODES[self.dtype].itemsize


def encode_header(entries: Sequence[Entry], metadata: Mapping[str, str]) -> bytes:
    """Return the length prefix and the padded header of a shard with these tensors, in this order."""
    table: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    for entry in entries:
        end = position + entry.nbytes
        table[entry.key] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [position, end]}
        position = end
    if len(table) != len(entries) + 1:
        raise AssertionError("keys of a shard repeat")
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    padded = -(-(8 + len(text)) // ALIGN_BYTES) * ALIGN_BYTES - 8
    if padded > MAX_HEADER_BYTES:
        raise SaveFailed(
            f"{len(entries)} tensors need a shard header of {padded} bytes; the safetensors format allows "
            f"{MAX_HEADER_BYTES}: save fewer, larger tensors per rank"
        )
    return padded.to_bytes(8, "little") + text.ljust(padded)


def digest(data: Any) -> int:
    """Return the xxh3-64 of a buffer."""
    return xxhash.xxh3_64_intdigest(data)


def fingerprint(data: Any) -> str:
    """Return the xxh3-128 of a buffer, named: what records and small files are held by."""
    return "xxh3-128:" + xxhash.xxh3_128_hexdigest(data)


def digests(data: memoryview) -> list[int]:
    """Return the digest of each consecutive `DIGEST_BYTES` of a buffer of bytes; the last may be shorter.

    A slice may be digested piecewise, if every piece but its last is whole chunks.
    """
    return [digest(data[start : start + DIGEST_BYTES]) for start in range(0, data.nbytes, DIGEST_BYTES)]


def chunk_count(nbytes: int, chunk_bytes: int = DIGEST_BYTES) -> int:
    """Return how many digests a slice of `nbytes` has."""
    return -(-nbytes // chunk_bytes)


def check_version(found: object, source: str) -> None:
    """Raise UnsupportedFormat unless `found` is the version that this code writes."""
    if found == FORMAT:
        return
    if not isinstance(found, str) or not found.startswith("checkpoint/"):
        raise CorruptCheckpoint(f"{source}: format: {found!r} is not a format of this package")
    raise UnsupportedFormat(
        f"{source}: format {found} is not known here (this code reads {FORMAT}); "
        "read it with the version of the package that wrote it"
    )
