"""Reads the file that an offline Weights & Biases run leaves: protobuf records in LevelDB's log format."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

_BLOCK = 32768
_HEADER = struct.Struct("<IHB")  # checksum, length, kind
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4
_FILE_HEADER_BYTES = 7


def history(path: Path) -> list[dict[str, Any]]:
    """Every logged record, as key -> value."""
    found = []
    for payload in _payloads(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(payload)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            found.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return found


def _payloads(content: bytes) -> Iterator[bytes]:
    at, parts = _FILE_HEADER_BYTES, b""
    while at + _HEADER.size <= len(content):
        if _BLOCK - at % _BLOCK < _HEADER.size:  # a header never crosses a block; the rest of the block is padding
            at += _BLOCK - at % _BLOCK
            continue
        _, length, kind = _HEADER.unpack_from(content, at)
        at += _HEADER.size
        parts += content[at : at + length]
        at += length
        if kind in (_FULL, _LAST):
            yield parts
            parts = b""
