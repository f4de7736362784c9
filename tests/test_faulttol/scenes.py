"""Records of jobs that never ran: ranks that work, meet in all-reduces, and do to each other what a test wants."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from faulttol.events import CollectiveEvent, RankRecord, StepMark
from faulttol.finding import Finding, FindingKind
from faulttol.health import Vitals
from faulttol.view import JobView

MS = 1_000_000
WORLD = "0"


@dataclass
class Scene:
    """One synchronous job: in each step every rank works, then meets the others in two all-reduces."""

    num_ranks: int = 4
    work_ms: Callable[[int, int], float] = lambda rank, step: 10.0
    """Of a rank in a step."""
    transfer_ms: Callable[[int], float] = lambda step: 2.0
    """Of all transfers of a step."""
    tokens: Callable[[int, int], int | None] = lambda rank, step: None
    phase: Callable[[int, int], str] = lambda rank, step: "train"
    norms: Callable[[int, int], float | None] = lambda rank, step: None
    offsets_ms: Mapping[int, float] = field(default_factory=dict)
    """By how much the clock of a rank is ahead."""

    def run(self, num_steps: int, waiting_ms: float = 0.0) -> dict[int, RankRecord]:
        """Return the records of that many whole steps, read `waiting_ms` after the last."""
        ranks = range(self.num_ranks)
        events: dict[int, list[CollectiveEvent]] = {rank: [] for rank in ranks}
        marks: dict[int, list[StepMark]] = {rank: [] for rank in ranks}
        now_ms, index = 0.0, 1
        for step in range(num_steps):
            for rank in ranks:
                marks[rank].append(self._mark(rank, index, step, now_ms))
            arrived = {rank: now_ms + self.work_ms(rank, step) for rank in ranks}
            for half in range(2):
                index += 1
                over_ms = max(arrived.values()) + self.transfer_ms(step) / 2
                for rank in ranks:
                    event = all_reduce(rank, ranks, seq=2 * step + half + 1, step=step, index=index)
                    clock = self.offsets_ms.get(rank, 0.0)
                    begin_ns, end_ns = (round((clock + ms) * MS) for ms in (arrived[rank], over_ms))
                    phase = self.phase(rank, step)
                    events[rank].append(replace(event, begin_ns=begin_ns, end_ns=end_ns, state="ended", phase=phase))
                arrived = dict.fromkeys(ranks, over_ms)
            now_ms = over_ms
            index += 1
        return {
            rank: RankRecord(
                rank=rank,
                world_size=self.num_ranks,
                generation=0,
                events=tuple(events[rank]),
                marks=(*marks[rank], self._mark(rank, index, num_steps, now_ms)),
                now_ns=round((self.offsets_ms.get(rank, 0.0) + now_ms + waiting_ms) * MS),
            )
            for rank in ranks
        }

    def _mark(self, rank: int, index: int, step: int, at_ms: float) -> StepMark:
        return StepMark(
            rank=rank,
            index=index,
            kind="step_begin",
            step=step,
            phase=self.phase(rank, step),
            at_ns=round((self.offsets_ms.get(rank, 0.0) + at_ms) * MS),
            tokens=self.tokens(rank, step),
            grad_norm=self.norms(rank, step),
        )


def all_reduce(rank: int, ranks: Sequence[int], *, seq: int, group: str = WORLD, **more: Any) -> CollectiveEvent:
    """An all-reduce that a rank has begun."""
    values: dict[str, Any] = {
        "rank": rank,
        "index": seq,
        "kind": "all_reduce",
        "group": group,
        "group_ranks": tuple(ranks),
        "backend": "gloo",
        "seq": seq,
        "peer": None,
        "bytes": 1 << 20,
        "dtype": "float32",
        "step": -1,
        "phase": "train",
        "state": "begun",
        "begin_ns": 0,
        "end_ns": None,
    }
    return CollectiveEvent(**(values | more))


def message(rank: int, kind: str, peer: int, *, seq: int = 1, **more: Any) -> CollectiveEvent:
    """A send or a receipt that a rank has begun."""
    return all_reduce(rank, range(4), seq=seq, kind=kind, peer=peer, **more)


def after(records: Mapping[int, RankRecord], open_events: Sequence[CollectiveEvent], age_s: float) -> JobView:
    """The job some time after its last step: the given events have been open for so long."""
    found = {}
    for rank, record in records.items():
        now_ns = record.now_ns + round(age_s * 1e9)
        more = [
            replace(event, begin_ns=record.now_ns, index=10_000 + i)
            for i, event in enumerate(open_events)
            if event.rank == rank
        ]
        found[rank] = replace(record, events=(*record.events, *more), now_ns=now_ns)
    return JobView(found)


def with_vitals(view: JobView, *vitals: Vitals) -> JobView:
    """The view with signs of life."""
    return replace(view, vitals={one.rank: one for one in vitals})


def proven(findings: Sequence[Finding]) -> list[Finding]:
    """The findings, each with what it goes by, and suspects in order of their scores."""
    for finding in findings:
        assert finding.summary
        assert finding.evidence, finding
        scores = [suspect.score for suspect in finding.suspects]
        assert scores == sorted(scores, reverse=True), finding
        assert all(0 < score <= 1 for score in scores), finding
        assert scores or finding.kind is FindingKind.COMMUNICATION_SLOW, finding  # which a probe names the suspects of
    return list(findings)


def relabelled(view: JobView, names: Mapping[int, int]) -> JobView:
    """The same job with its ranks called otherwise."""
    found = {}
    for rank, record in view.records.items():
        new = names[rank]
        events = tuple(
            replace(
                event,
                rank=new,
                group_ranks=tuple(sorted(names[member] for member in event.group_ranks)),
                peer=None if event.peer is None else names[event.peer],
            )
            for event in record.events
        )
        marks = tuple(replace(mark, rank=new) for mark in record.marks)
        found[new] = replace(record, rank=new, events=events, marks=marks)
    vitals = {names[rank]: replace(one, rank=names[rank]) for rank, one in view.vitals.items()}
    return JobView(found, vitals)


def with_clocks(view: JobView, offsets_ns: Mapping[int, int]) -> JobView:
    """The same job on machines whose clocks differ."""
    found = {}
    for rank, record in view.records.items():
        offset = offsets_ns[rank]
        events = tuple(
            replace(
                event, begin_ns=event.begin_ns + offset, end_ns=None if event.end_ns is None else event.end_ns + offset
            )
            for event in record.events
        )
        marks = tuple(replace(mark, at_ns=mark.at_ns + offset) for mark in record.marks)
        found[rank] = replace(record, events=events, marks=marks, now_ns=record.now_ns + offset)
    return JobView(found, view.vitals)
