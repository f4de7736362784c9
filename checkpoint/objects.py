"""Plain Python values as JSON and back, equal to what they were: no pickle, nothing lossy.

JSON keeps None, bool, int, finite floats, strings, lists and dicts with string keys as they are. Tuples,
bytes, nan and the infinities, and dicts with other keys become `{"$": kind, "value": ...}`; so does a dict
that has a "$" itself.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
from collections.abc import Callable
from typing import Any

from checkpoint.errors import CorruptCheckpoint, InvalidState

_TAG = "$"
_MAX_INT_BITS = 14_000
"""Python itself reads no text of an integer that has more than 4,300 digits."""


def encode(value: object, source: str) -> bytes:
    """Return the JSON text of a value. Raises InvalidState, naming the place of what cannot be kept."""
    try:
        return canonical(to_json(value, source))
    except (UnicodeEncodeError, RecursionError) as error:
        raise InvalidState(f"{source}: cannot be kept as JSON ({error})") from error


def canonical(tree: object) -> bytes:
    """Return the compact JSON text of a tree of JSON values; the order of keys is kept, and counts."""
    return json.dumps(tree, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def decode(text: bytes, source: str) -> Any:
    """Return the value whose text `encode` made. Raises CorruptCheckpoint."""
    return from_json(parse(text, source), source)


def parse(text: bytes, source: str) -> Any:
    """Return the tree of a JSON text. Raises CorruptCheckpoint."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpoint(f"{source}: is not JSON ({error})") from error


def to_json(value: object, source: str) -> Any:
    """Return a tree of JSON values that `from_json` turns back into an equal value."""
    if value is None or type(value) is bool:
        return value
    if type(value) is str:
        if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
            raise InvalidState(f"{source}: has half of a surrogate pair, which is no text; pass bytes")
        return value
    if type(value) is int:
        if value.bit_length() > _MAX_INT_BITS:
            raise InvalidState(f"{source}: has {value.bit_length()} bits; allowed are {_MAX_INT_BITS}; pass bytes")
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {_TAG: "float", "value": repr(value)}
    if type(value) is list:
        return [to_json(v, f"{source}[{i}]") for i, v in enumerate(value)]
    if type(value) is tuple:
        return {_TAG: "tuple", "value": [to_json(v, f"{source}[{i}]") for i, v in enumerate(value)]}
    if type(value) is bytes:
        return {_TAG: "bytes", "value": base64.b64encode(value).decode()}
    if type(value) is dict:
        if _TAG not in value and all(type(k) is str for k in value):
            return {k: to_json(v, f"{source}[{k!r}]") for k, v in value.items()}
        return {
            _TAG: "dict",
            "value": [[to_json(k, source), to_json(v, f"{source}[{k!r}]")] for k, v in value.items()],
        }
    raise InvalidState(
        f"{source}: is a {type(value).__name__}; allowed are None, bool, int, float, str, bytes, list, "
        "tuple and dict (tensors go into tensors)"
    )


def from_json(tree: Any, source: str) -> Any:
    """Return the value that `to_json` was given. Raises CorruptCheckpoint."""
    try:
        return _restored(tree, source)
    except RecursionError as error:
        raise CorruptCheckpoint(f"{source}: is nested too deep ({error})") from error


def _restored(tree: Any, source: str) -> Any:
    if isinstance(tree, list):
        return [_restored(v, source) for v in tree]
    if not isinstance(tree, dict):
        return tree
    if _TAG not in tree:
        return {k: _restored(v, source) for k, v in tree.items()}
    restore = _RESTORE.get(tree[_TAG]) if isinstance(tree[_TAG], str) else None
    if restore is None:
        raise CorruptCheckpoint(f"{source}: holds a value of unknown kind {tree[_TAG]!r}")
    try:
        return restore(_restored(tree["value"], source))
    except (KeyError, TypeError, ValueError, OverflowError, binascii.Error) as error:
        raise CorruptCheckpoint(f"{source}: holds a malformed {tree[_TAG]} ({error})") from error


_RESTORE: dict[str, Callable[[Any], object]] = {
    "float": float,
    "tuple": tuple,
    "bytes": lambda text: base64.b64decode(text, validate=True),
    "dict": lambda items: {k: v for k, v in items},  # noqa: C416  a pair of another length must raise
}
