"""Who waits for whom, over all groups of a job, and where the waiting ends.

A rank waits for the members of its open operation that have not entered it. Where that chain ends tells what is wrong:

    a rank that waits for nobody             it hangs outside of any collective
    an operation that all of them entered    the communication hangs, or they do not mean the same operation
    a cycle                                  they entered their groups in different orders: the program's error

Whether somebody entered is read from sequence numbers of the group, so no clock is compared, and rings that have
lost their oldest records do no harm.
"""

from __future__ import annotations

from dataclasses import dataclass

from faulttol.events import CollectiveEvent
from faulttol.view import JobView, Operation, OperationKey, key_of, match

_ROOTED = frozenset({"broadcast", "reduce", "scatter", "gather"})
"""Kinds that are over for some members before others have the result."""


@dataclass(frozen=True, slots=True)
class Wait:
    """One rank's open operation."""

    rank: int
    event: CollectiveEvent
    age_s: float
    """For how long it is open, on the rank's own clock."""
    operation: Operation
    absent: tuple[int, ...]
    """Members that have not entered it; empty when all have."""

    @property
    def is_weak(self) -> bool:
        """True for a send, which may have left although the receiver has not asked for it yet."""
        return self.event.kind == "send"


@dataclass(frozen=True, slots=True)
class Chain:
    """Where the waiting ends."""

    ranks: tuple[int, ...]
    """One rank that waits for nobody; or those of a cycle; or those in an operation that all entered."""
    kind: str
    """`sink`, `cycle` or `entered`."""
    operation: Operation
    """What is waited in, for `sink`: by the others."""
    age_s: float
    """The longest that anybody waits for it."""
    num_waiting: int
    """How many ranks wait for it, through others too."""
    circle: tuple[int, ...] = ()
    """With a `sink` whose sends were taken to have left: all of the circle that it is in if they have not."""


def waits(view: JobView) -> list[Wait]:
    """Return what the ranks wait in: their open operations that are not over for the others."""
    entered = _last_entered(view)
    operations = match(event for record in view.records.values() for event in record.events)
    found = []
    for rank, record in sorted(view.records.items()):
        for event in record.events:
            if event.state != "begun":
                continue
            key = key_of(event)
            if key is None:
                operation = Operation(OperationKey(event.group, -1, -1, event.seq), event.group_ranks, {rank: event})
            else:
                operation = operations[key]
            absent = tuple(other for other in operation.absent if entered.get(_track(key, other), 0) < event.seq)
            if not absent and _is_over(operation, event):
                continue
            age_s = (record.now_ns - event.begin_ns) / 1e9
            found.append(Wait(rank, event, age_s, operation, absent))
    return found


def chains(view: JobView) -> list[Chain]:
    """Return where the waiting of all ranks ends, the longest waited for first."""
    blocked: dict[int, list[Wait]] = {}
    for wait in waits(view):
        blocked.setdefault(wait.rank, []).append(wait)
    edges = {rank: _others(rank, own) for rank, own in blocked.items()}
    found: list[Chain] = []
    for component in _terminal(edges, view.ranks):
        found += [chain for chain in _chain(component, blocked, edges) if not _is_in(chain, found)]
    return sorted(found, key=lambda chain: -chain.age_s)


def _track(key: OperationKey | None, rank: int) -> tuple[str, int, int, int]:
    """One rank's own count of a group's collectives, or of its messages of one direction."""
    return ("", -1, -1, rank) if key is None else (key.group, key.source, key.target, rank)


def _last_entered(view: JobView) -> dict[tuple[str, int, int, int], int]:
    last: dict[tuple[str, int, int, int], int] = {}
    for rank, record in view.records.items():
        for event in record.events:
            key = key_of(event)
            if key is not None:
                track = _track(key, rank)
                last[track] = max(last.get(track, 0), event.seq)
    return last


def _is_over(operation: Operation, event: CollectiveEvent) -> bool:
    """True when others ended what this rank has only not waited for yet."""
    if event.kind in _ROOTED or event.kind == "recv":  # a message sent may still be on its way
        return False
    return any(other.state == "ended" for other in operation.events.values() if other.rank != event.rank)


def _others(rank: int, own: list[Wait]) -> set[int]:
    return {other for wait in own for other in wait.absent if other != rank}


def _is_in(chain: Chain, found: list[Chain]) -> bool:
    """True when another rank's waiting already ended in the same operation that all entered."""
    return chain.kind == "entered" and any(
        other.kind == "entered" and other.operation.key == chain.operation.key for other in found
    )


def _chain(component: set[int], blocked: dict[int, list[Wait]], edges: dict[int, set[int]]) -> list[Chain]:
    """Return what a terminal component means; nothing for a rank that neither waits nor is waited for."""
    waiting_for = _reaching(component, edges)
    held_up = [wait for rank in waiting_for for wait in blocked[rank]]
    circle = tuple(sorted(component)) if len(component) > 1 else ()
    if circle:
        component = _without_weak(component, blocked)
    own = [wait for rank in component for wait in blocked.get(rank, ())]
    if len(component) > 1:
        first = max(own, key=lambda wait: wait.age_s)
        return [Chain(tuple(sorted(component)), "cycle", first.operation, first.age_s, len(waiting_for))]
    (rank,) = component
    complete = [wait for wait in own if not wait.absent]
    if complete:
        first = max(complete, key=lambda wait: wait.age_s)
        return [Chain(first.operation.members, "entered", first.operation, first.age_s, len(waiting_for) + 1)]
    pointing = [wait for wait in held_up if rank in wait.absent]
    if not pointing:
        return []
    first = max(pointing, key=lambda wait: wait.age_s)
    return [Chain((rank,), "sink", first.operation, first.age_s, len(waiting_for - {rank}), circle)]


def _without_weak(component: set[int], blocked: dict[int, list[Wait]]) -> set[int]:
    """The one rank that ends the chain when sends are taken to have left, or the whole cycle."""
    strong = {
        rank: _others(rank, [wait for wait in blocked.get(rank, ()) if not wait.is_weak]) & component
        for rank in component
    }
    ends = [rank for rank, others in strong.items() if not others]
    return {ends[0]} if len(ends) == 1 else component


def _reaching(component: set[int], edges: dict[int, set[int]]) -> set[int]:
    """The ranks from which a member of the component is reached, members with an edge included."""
    reached, grew = set(component), True
    while grew:
        more = {rank for rank, others in edges.items() if rank not in reached and others & reached}
        reached |= more
        grew = bool(more)
    return {rank for rank in reached if edges.get(rank) or rank not in component} & edges.keys()


def _terminal(edges: dict[int, set[int]], ranks: list[int]) -> list[set[int]]:
    """Return the strongly connected components that no edge leaves."""
    everyone = sorted({*ranks, *edges, *(other for others in edges.values() for other in others)})
    reach = {rank: _reach(rank, edges) for rank in everyone}
    found: list[set[int]] = []
    for rank in everyone:
        component = {other for other in reach[rank] if rank in reach[other]} | {rank}
        if reach[rank] <= component and component not in found:
            found.append(component)
    return found


def _reach(start: int, edges: dict[int, set[int]]) -> set[int]:
    seen, todo = set[int](), [start]
    while todo:
        for other in edges.get(todo.pop(), ()):
            if other not in seen:
                seen.add(other)
                todo.append(other)
    return seen
