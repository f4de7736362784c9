"""What a swarm's messages may hold at most, and what its nodes may be called: what a recipe is checked against."""

from __future__ import annotations

import re
from dataclasses import dataclass

_NODE = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Bounds:
    """The largest message that is looked into."""

    message_bytes: int = 8 * 2**20
    rows: int = 256
    completions: int = 64
    completion_bytes: int = 8 * 2**10
    prompt_bytes: int = 16 * 2**10
    parameter_bytes: int = 4 * 2**10
    name_bytes: int = 128
    """Of a task, a version, a model."""


def is_node_name(text: str) -> bool:
    """Return whether a node may be called so."""
    return _NODE.fullmatch(text) is not None
