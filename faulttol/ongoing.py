"""What a recorder knows of process groups, and of the operations that go on in them."""

from __future__ import annotations

import contextlib
import itertools
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from faulttol.channels import Channels
from faulttol.ring import Ring

if TYPE_CHECKING:
    from faulttol.compiled import Compiled


class Group:
    """One process group, or a bare backend."""

    __slots__ = (
        "backends",
        "coalesces",
        "count",
        "messages",
        "name",
        "names",
        "ranks",
        "ref",
        "telling",
        "timed",
        "timed_kinds",
        "unfinished",
    )

    def __init__(self, group: Any, name: str, ranks: tuple[int, ...]) -> None:
        self.ref = weakref.ref(group)
        self.name, self.ranks = name, ranks
        self.count: Callable[[], int] = itertools.count(1).__next__
        """Counts one more collective in it."""
        self.telling = threading.Lock()
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

    def count_and_tell(self, compiled: Compiled, names: tuple[int, int] | None) -> int:
        """Count one more collective; with names, let the part in C++ record the next like it, if this came from it.

        One thread at a time: what is counted here is told of before the other part counts on.
        """
        with self.telling:
            seq = self.count()
            group = self.ref()
            told = compiled.know(names, self.ranks, seq) if names and self.backends.get("cpu") == "gloo" else None
            if told is not None:
                self.count, forget = told
                # Of the process group, not of this: another of its name may take this one's place before it is gone.
                weakref.finalize(group, forget).atexit = False
            return seq


class Groups:
    """All process groups and bare backends that operations were begun in."""

    def __init__(self, ring: Ring) -> None:
        self._ring = ring
        self._by_name: dict[str, Group] = {}
        self._meeting = threading.Lock()

    def of(self, group: Any) -> Group:
        """Return what is known of a process group."""
        known = self._by_name.get(group.group_name)
        return known if known is not None and known.ref() is group else self._meet(group)

    def named(self, name: str) -> Group | None:
        """Return what is known of the newest process group of a name; None of one that was never met."""
        return self._by_name.get(name)

    def of_backend(self, backend: Any, channels: Channels) -> Group:
        """Return what is known of a bare backend."""
        known: Group | None = channels.known(backend)
        if known is None:
            known = Group(backend, *channels.resolve(backend))
            channels.know(backend, known)
        elif not known.ranks:
            name, ranks = channels.resolve(backend)
            if ranks:  # the other end had not told before: what was counted goes on under the ranks' names
                known.name, known.ranks = name, ranks
                known.messages = {(ranks[place], sends): n for (place, sends), n in known.messages.items()}
                known.names.clear()
        return known

    def number(self, known: Group, bare: Any, device_type: str, dtype: torch.dtype | None) -> tuple[int, int]:
        """Return the ring's numbers of a group, with the backend that it has for a device, and of a dtype."""
        backend = bare if bare is not None else known.ref()._get_backend(torch.device(device_type))  # type: ignore[union-attr]
        name = known.backends[device_type] = backend.name().lower()
        number = self._ring.number("group", known.name, name, known.ranks)
        dtype_number = 0 if dtype is None else self._ring.number("dtype", str(dtype).removeprefix("torch."))
        known.names[device_type, dtype] = (number, dtype_number)
        return number, dtype_number

    def _meet(self, group: Any) -> Group:
        """Get to know a group; one that has the name of a group that is gone gets a name of its own."""
        name, ranks = group.group_name, tuple(dist.get_process_group_ranks(group))
        with self._meeting:
            earlier = self._by_name.get(name)
            shown = name
            if earlier is not None:
                if earlier.ref() is group:  # another thread was first
                    return earlier
                base, _, count = earlier.name.rpartition("~")
                shown = f"{base}~{int(count) + 1}" if base else f"{name}~2"
            known = self._by_name[name] = Group(group, shown, ranks)
            return known


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
    channel: tuple[str, int] = ("", -1)
    """Group and peer (-1: none): what the device runs one after the other, and this among it."""
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


REST_NS = 10_000_000
"""How long the threads of a backend get to let go of what is over."""


class Resting:
    """Works on the CPU that began inside autograd's backward and are over.

    Whoever lets go of such a work last needs Python's lock. Were that gloo's thread, it could wait for a thread that
    holds the lock and waits for gloo's: DDP's reducer ends so when it outlives the process group.
    """

    def __init__(self) -> None:
        self._works: deque[tuple[int, Any]] = deque()

    def __len__(self) -> int:
        return len(self._works)

    def __iter__(self) -> Iterator[Any]:
        return iter([work for _, work in self._works])

    def add(self, now_ns: int, work: Any) -> None:
        """Hold a work from now on."""
        self._works.append((now_ns, work))

    def let_go(self, now_ns: int) -> None:
        """Let go of the works that have rested."""
        with contextlib.suppress(IndexError):  # another thread took the last one
            while self._works:
                since_ns, work = self._works.popleft()
                if since_ns + REST_NS > now_ns:
                    self._works.appendleft((since_ns, work))
                    return

    def clear(self) -> None:
        """Let go of all."""
        self._works.clear()


def work_is_over(token: Token) -> bool:
    """Whether the operation of a work is over, by the work."""
    return bool(token.work.is_completed())


def has_passed(token: Token) -> bool:
    """Whether the device has come past the event after the operation."""
    return bool(token.passed.query())


def num_over(tokens: deque[Token], is_over: Callable[[Token], bool], *, in_order: bool) -> int:
    """Return how many operations are over: those before the first that is not. In order, the last stands for all."""
    num = len(tokens)
    try:
        if in_order and num > 1 and is_over(tokens[num - 1]):
            return num
        return next((place for place in range(num) if not is_over(tokens[place])), num)
    except RuntimeError:  # the device has an error: all of them are over
        return num
