"""What a recorder knows of process groups, and of the operations that go on in them."""

from __future__ import annotations

import weakref
from typing import Any


class Group:
    """One process group, or a bare backend."""

    __slots__ = (
        "backends",
        "coalesces",
        "messages",
        "name",
        "names",
        "ranks",
        "ref",
        "seq",
        "timed",
        "timed_kinds",
        "unfinished",
    )

    def __init__(self, group: Any, name: str, ranks: tuple[int, ...]) -> None:
        self.ref = weakref.ref(group)
        self.name, self.ranks = name, ranks
        self.seq = 0
        """How many collectives were begun in it."""
        self.messages: dict[tuple[int, bool], int] = {}
        """How many messages were begun, by (peer, whether this rank sends)."""
        self.names: dict[tuple[str, object], tuple[int, int]] = {}
        """By device type and dtype: the ring's numbers of this group, with the backend it has there, and the dtype."""
        self.backends: dict[str, str] = {}
        self.timed = False
        self.timed_kinds: set[str] = set()
        """Kinds of which the backend has told a duration."""
        self.coalesces = False
        self.unfinished: list[Token] = []
        """Begun while it coalesces: one work will stand for all of them."""


class Token:
    """An operation that goes on. What few of them have is only set on those: one is made for every collective."""

    device: Any = None
    """Index of the device that works on it; None on the CPU."""
    on_host = True
    """Whether its tensors are on the CPU, which those that a device does not work on need not be."""
    ready: Any = None
    """The device's event before it."""
    passed: Any = None
    """The device's event after it, where it runs on the stream that it was called from."""
    channel: object = None
    """What the device runs one after the other, and this among it."""
    output = 0
    """Address of the result of a reduce-scatter on the CPU, by which a functional wait is known."""
    work: Any = None
    in_backward = False
    """Whether it was begun inside autograd's backward, on the CPU."""
    ref: Any = None
    is_late = False
    """Whether it was over before somebody waited for it."""
    is_over = False

    def __init__(self, index: int, kind: str, group: Group, begin_ns: int) -> None:
        self.index, self.kind, self.group, self.begin_ns = index, kind, group, begin_ns
