"""Bytes on disk: safetensors shards whose data starts on a page, and digests per chunk. Pure.

A shard is a plain safetensors file (`u64 header length | JSON header | tensors without holes`); its header is
padded with spaces, which the format allows, so that the first tensor starts on a multiple of `ALIGN_BYTES`
and aligned direct I/O and page-aligned mapping stay possible. Tensors are ordered so that each is aligned to
its own element size. Digests are xxh3-64 of the consecutive `DIGEST_BYTES` of each slice, counted from the
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

# Part of the format, but in a module that a process without torch can import.
from checkpoint.digest import ALIGN_BYTES as ALIGN_BYTES
from checkpoint.digest import CHUNK_BYTES as CHUNK_BYTES
from checkpoint.digest import DEVICE_CHUNK_BYTES as DEVICE_CHUNK_BYTES
from checkpoint.digest import DIGEST_BYTES as DIGEST_BYTES
from checkpoint.digest import LARGEST_DIGEST_BYTES as LARGEST_DIGEST_BYTES
from checkpoint.digest import chunk_count as chunk_count
from checkpoint.digest import digest as digest
from checkpoint.digest import digests as digests
from checkpoint.digest import fingerprint as fingerprint
from checkpoint.errors import CorruptCheckpoint, SaveFailed, UnsupportedFormat
from checkpoint.region import Shape

FORMAT = "checkpoint/1"
"""Name and version of the format; a reader refuses any other."""
MAX_HEADER_BYTES = 100_000_000
"""The safetensors format's own limit."""

_COMPLEX128 = "C128"
"""Not among the safetensors codes: a shard's header tells of pairs of F64 in its place."""
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
    torch.complex128: _COMPLEX128,
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
}
"""Element types that can be saved, and their codes, which are those of safetensors where it has one."""
SAME_SIZE: Mapping[int, torch.dtype] = {
    1: torch.uint8,
    2: torch.int16,
    4: torch.int32,
    8: torch.int64,
    16: torch.complex128,
}
"""By bytes of an element, a type that NumPy has too and copies bit for bit."""
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


def encode_header(entries: Sequence[Entry], metadata: Mapping[str, str], lead_bytes: int = 0) -> bytes:
    """Return the length prefix and the padded header of a shard with these tensors, in this order.

    The first `lead_bytes` of the tensors end on a multiple of ALIGN_BYTES; 0 lets the first tensor start on one.
    """
    table: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    for entry in entries:
        end = position + entry.nbytes
        pairs = entry.dtype == _COMPLEX128
        dtype, shape = ("F64", [*entry.shape, 2]) if pairs else (entry.dtype, list(entry.shape))
        table[entry.key] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
        position = end
    if len(table) != len(entries) + 1:
        raise AssertionError("keys of a shard repeat")
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    padded = -(-(8 + len(text) + lead_bytes) // ALIGN_BYTES) * ALIGN_BYTES - lead_bytes - 8
    if padded > MAX_HEADER_BYTES:
        raise SaveFailed(
            f"{len(entries)} tensors need a shard header of {padded} bytes; the safetensors format allows "
            f"{MAX_HEADER_BYTES}: save fewer, larger tensors per rank"
        )
    return padded.to_bytes(8, "little") + text.ljust(padded)


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
