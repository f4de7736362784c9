"""One look at a whole job: what every rank recorded and what its signs of life were, matched without any clock."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from faulttol.events import UNEVEN, CollectiveEvent, RankRecord
from faulttol.health import Vitals

CpuWaits = Sequence[tuple[int, float]]
"""(moment on the rank's clock in nanoseconds, `Vitals.cpu_wait_s` then), in order."""


@dataclass(frozen=True, slots=True)
class JobView:
    """What is known of the ranks of one generation at one moment; either part may be missing for a rank."""

    records: Mapping[int, RankRecord]
    vitals: Mapping[int, Vitals] = field(default_factory=dict)
    cpu_waits: Mapping[int, CpuWaits] = field(default_factory=dict)
    """What each rank's threads had waited for a CPU until when, as far back as it is known."""

    @property
    def ranks(self) -> list[int]:
        """Every rank of which something is known, ascending."""
        return sorted(self.records.keys() | self.vitals.keys())


class OperationKey(NamedTuple):
    """What is the same on all ranks of one operation; source and target are -1 for a collective."""

    group: str
    source: int
    target: int
    seq: int


@dataclass(frozen=True, slots=True)
class Operation:
    """One collective or message, with what each rank that entered it recorded."""

    key: OperationKey
    members: tuple[int, ...]
    events: dict[int, CollectiveEvent] = field(default_factory=dict)

    @property
    def absent(self) -> tuple[int, ...]:
        """Members that have not entered it, as far as the events at hand tell."""
        return tuple(rank for rank in self.members if rank not in self.events)

    @property
    def is_message(self) -> bool:
        """True for a message between two ranks."""
        return self.key.source >= 0


def key_of(event: CollectiveEvent) -> OperationKey | None:
    """What identifies the event's operation; None for a receipt from any source, which nothing matches."""
    if not event.is_message:
        return OperationKey(event.group, -1, -1, event.seq)
    source, target = event.source, event.target
    if source is None or target is None or event.kind == "recv_any_source":
        return None
    return OperationKey(event.group, source, target, event.seq)


def members_of(event: CollectiveEvent) -> tuple[int, ...]:
    """The ranks that take part in the event's operation."""
    key = key_of(event)
    if key is None or key.source < 0:
        return event.group_ranks
    return key.source, key.target


def match(events: Iterable[CollectiveEvent]) -> dict[OperationKey, Operation]:
    """Return the operations that the events of all ranks belong to."""
    operations: dict[OperationKey, Operation] = {}
    for event in events:
        key = key_of(event)
        if key is None:
            continue
        if key not in operations:
            operations[key] = Operation(key, members_of(event))
        operations[key].events[event.rank] = event
    return operations


def signature(event: CollectiveEvent) -> tuple[str, int, str, int]:
    """What all ranks must have in common in one operation: kind, bytes, dtype, root."""
    if event.is_message:
        return "message", event.bytes, event.dtype, -1
    size = -1 if event.kind in UNEVEN else event.bytes
    return event.kind, size, event.dtype, -1 if event.peer is None else event.peer


def role_signature(event: CollectiveEvent) -> tuple[str, int, int]:
    """What an event has in common with the same place of the program in another step, or on a rank of equal role."""
    return event.kind, event.bytes, len(event.group_ranks)
