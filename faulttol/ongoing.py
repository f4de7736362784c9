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
        "numbers",
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
        self.numbers: dict[str, int] = {}
        """By device type: the ring's number of this group with the backend it has there."""
        self.backends: dict[str, str] = {}
        self.timed = False
        self.timed_kinds: set[str] = set()
        """Kinds of which the backend has told a duration."""
        self.coalesces = False
        self.unfinished: list[Token] = []
        """Begun while it coalesces: one work will stand for all of them."""


class Token:
    """An operation that goes on."""

    __slots__ = (
        "age",
        "channel",
        "device",
        "group",
        "in_backward",
        "index",
        "is_over",
        "kind",
        "output",
        "passed",
        "ready",
        "ref",
        "work",
    )

    def __init__(self, index: int, kind: str, group: Group, device: Any, ready: Any) -> None:
        self.index, self.kind, self.group = index, kind, group
        self.device = device
        """Index of the device that works on it; None on the CPU."""
        self.ready = ready
        """The device's event before it."""
        self.passed: Any = None
        """The device's event after it, where it runs on the stream that it was called from."""
        self.output = 0
        """Address of the result of a reduce-scatter on the CPU, by which a functional wait is known."""
        self.work: Any = None
        self.in_backward = False
        """Whether it was begun inside autograd's backward, on the CPU."""
        self.ref: Any = None
        self.channel: object = None
        """What the device runs one after the other, and this among it."""
        self.age = 0
        self.is_over = False
