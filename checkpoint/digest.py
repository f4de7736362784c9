"""Units of copying, digesting and aligning, and the digests themselves: what a process needs that has no torch."""

from __future__ import annotations

from typing import Any

import xxhash

CHUNK_BYTES = 8 << 20
"""What is copied, written and read at once; a multiple of `DIGEST_BYTES`."""
DEVICE_CHUNK_BYTES = 64 << 20
"""What is copied and written at once of a state on a GPU.

A stream takes about a thousand orders before it keeps the host: 14 GB in pieces of `CHUNK_BYTES` are more."""
SMALL_BYTES = 1 << 20
"""Tensors up to this lie together in a file, and are copied together from a GPU."""
DIGEST_BYTES = 64 << 10
"""Bytes of a slice under one digest; a multiple of every element size.

Small, so that a part of a slice can be verified without reading much more than it: a third of 16 MiB costs 1 % more.
Below 100 kB xxhash keeps the interpreter's lock: at 24 GB/s that is 0.3 ms a `CHUNK_BYTES`, where giving it up and
waiting to get it back from a busy training loop cost up to 5 ms a digest. A digest is 8 bytes, 0.012 % of the data."""
LARGEST_DIGEST_BYTES = 8 << 20
"""Tables of the format may have larger chunks, up to this; the first versions of this package wrote 8 MiB."""
ALIGN_BYTES = 4096
"""The data of a shard starts on a multiple of this."""


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
