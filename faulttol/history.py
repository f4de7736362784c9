"""The last records of every rank of a job, followed in their rings."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from faulttol.errors import RingError
from faulttol.events import CollectiveEvent, RankRecord, StepMark
from faulttol.health import Vitals
from faulttol.ring import RingReader, ring_path
from faulttol.view import JobView

_WAITS_EVERY_NS, _MAX_WAITS = 250_000_000, 512
"""Between two moments at which it is kept how long a rank has waited for a CPU, and how many are; the newer half of
them stays whole."""
_OLD_S = 0.5
"""Vitals that are older say nothing of now."""


@dataclass(slots=True)
class WaitHistory:
    """For how long one rank had waited for a CPU at moments as far back as they go; the further, the fewer."""

    _moments: list[tuple[int, float]] = field(default_factory=list)

    def add(self, now_ns: int, waited_s: float) -> tuple[tuple[int, float], ...]:
        """Take in what is so now, and return all that is kept."""
        moments = self._moments
        if moments and (waited_s < moments[-1][1] or now_ns < moments[-1][0]):
            moments.clear()  # somebody else looks after the process now, and counts from the beginning
        if len(moments) > 1 and moments[-1][0] < moments[-2][0] + _WAITS_EVERY_NS:
            moments.pop()  # the newest is always kept
        moments.append((now_ns, waited_s))
        if len(moments) > _MAX_WAITS:
            newer = len(moments) - _MAX_WAITS // 2
            self._moments = moments[:newer:2] + moments[newer:]
        return tuple(self._moments)


@dataclass(slots=True)
class History:
    """One rank's last events and marks, out of what a reader finds new from time to time."""

    capacity: int = 1024
    """Events that are kept, and as many marks."""
    _events: dict[int, CollectiveEvent] = field(default_factory=dict)
    _marks: dict[int, StepMark] = field(default_factory=dict)
    _num_dropped: int = 0

    def add(self, new: RankRecord) -> RankRecord:
        """Take in what is new and return all that is kept. An event that is there again replaces the earlier one."""
        self._events.update((event.index, event) for event in new.events)
        self._marks.update((mark.index, mark) for mark in new.marks)
        self._num_dropped += _keep_last(self._events, self.capacity)
        _keep_last(self._marks, self.capacity)
        return replace(
            new,
            events=tuple(self._events[index] for index in sorted(self._events)),
            marks=tuple(self._marks[index] for index in sorted(self._marks)),
            num_lost=new.num_lost + self._num_dropped,
        )


class Follower:
    """Follows the rings of a job's ranks in one directory; use as a context manager."""

    def __init__(self, directory: Path, ranks: Iterable[int], generation: int = 0, capacity: int = 1024) -> None:
        self._paths = {rank: ring_path(directory, rank, generation) for rank in ranks}
        self._capacity = capacity
        self._readers: dict[int, RingReader] = {}
        self._files: dict[int, int] = {}
        """By rank: which file its reader reads, whatever has its name now."""
        self._histories: dict[int, History] = {}
        self._waits: dict[int, WaitHistory] = {}

    def look(self, vitals: Iterable[Vitals] = ()) -> JobView:
        """Return what is known now; a rank without a ring yet is missing."""
        for rank, path in self._paths.items():
            try:
                file = path.stat().st_ino
                if self._files.get(rank) == file:
                    continue
                reader = RingReader(path)
            except (FileNotFoundError, RingError):  # it is being made
                continue
            if rank in self._readers:
                self._readers[rank].close()  # a ring of an earlier launch
            self._readers[rank], self._files[rank] = reader, file
            self._histories[rank] = History(self._capacity)
            self._waits[rank] = WaitHistory()
        records = {rank: self._histories[rank].add(reader.poll()) for rank, reader in self._readers.items()}
        known = {one.rank: one for one in vitals}
        waits = {
            rank: self._waits[rank].add(records[rank].now_ns, waited_s)
            for rank in records.keys() & known.keys()
            if (waited_s := known[rank].cpu_wait_s) is not None and known[rank].report_age_s < _OLD_S
        }
        return JobView(records, known, waits)

    def close(self) -> None:
        """Unmap the rings. Idempotent."""
        for reader in self._readers.values():
            reader.close()

    def __enter__(self) -> Follower:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _keep_last(kept: dict[int, CollectiveEvent] | dict[int, StepMark], capacity: int) -> int:
    """Drop what came first; return how many."""
    too_many = sorted(kept)[: max(0, len(kept) - capacity)]
    for index in too_many:
        del kept[index]
    return len(too_many)
