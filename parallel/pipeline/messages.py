"""What ranks of a pipeline send each other, and when what is posted, as a schedule implies it. Pure.

A pair of ranks has one channel in each direction, in which messages arrive in the order they were sent. The order of
sending is the order of the sender's actions, which the receiver knows too: no message carries a header.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from parallel.pipeline.actions import Action
from parallel.pipeline.schedule import Schedule


class Message(NamedTuple):
    """What stage `stage` needs of its neighbour for a micro-batch: its input, or the gradient of its output."""

    content: Literal["input", "gradient"]
    stage: int
    micro_batch: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What one rank posts and waits for around each of its actions."""

    receives: tuple[tuple[tuple[int, Message], ...], ...]
    """By action: (peer, message) to be posted before it, what later actions need among them."""
    settled: Mapping[Message, tuple[Message, ...]]
    """By received message: those sent to the same peer that it must have received to have sent this one."""


def needs(action: Action, rank_of: Sequence[int]) -> Message | None:
    """Return what must have arrived from another rank for an action."""
    work, stage, micro_batch = action
    if work == "forward" and stage and rank_of[stage - 1] != rank_of[stage]:
        return Message("input", stage, micro_batch)
    last = stage + 1 == len(rank_of)
    if work in ("backward", "backward_input") and not last and rank_of[stage + 1] != rank_of[stage]:
        return Message("gradient", stage, micro_batch)
    return None


def gives(action: Action, rank_of: Sequence[int]) -> Message | None:
    """Return what an action makes for another rank."""
    work, stage, micro_batch = action
    if work == "forward" and stage + 1 < len(rank_of) and rank_of[stage + 1] != rank_of[stage]:
        return Message("input", stage + 1, micro_batch)
    if work in ("backward", "backward_input") and stage and rank_of[stage - 1] != rank_of[stage]:
        return Message("gradient", stage - 1, micro_batch)
    return None


def sender(message: Message, rank_of: Sequence[int]) -> int:
    """Return the rank that sends a message; the rank of `message.stage` receives it."""
    return rank_of[message.stage + (-1 if message.content == "input" else 1)]


def neighbours(rank_of: Sequence[int]) -> list[tuple[int, int]]:
    """Return the pairs of ranks that hold consecutive stages, the lower rank first, sorted."""
    pairs = itertools.pairwise(rank_of)
    return sorted({(min(pair), max(pair)) for pair in pairs if pair[0] != pair[1]})


def plan(schedule: Schedule, rank: int, ahead: int) -> Plan:
    """Return what a rank posts; receives are posted `ahead` actions before the one that needs them."""
    rank_of, own = schedule.rank_of, schedule.actions[rank]
    wanted = [needs(action, rank_of) for action in own]
    peers = {sender(message, rank_of) for message in wanted if message is not None}
    channels = {peer: _channel(schedule, peer, rank) for peer in sorted(peers)}
    posted = dict.fromkeys(channels, 0)
    receives = []
    for index in range(len(own)):
        now: list[tuple[int, Message]] = []
        for message in wanted[: index + 1 + ahead] if not index else wanted[index + ahead : index + 1 + ahead]:
            if message is None:
                continue
            peer = sender(message, rank_of)
            until = channels[peer].index(message) + 1  # what the peer sends before it arrives before it
            now += [(peer, earlier) for earlier in channels[peer][posted[peer] : until]]
            posted[peer] = max(posted[peer], until)
        receives.append(tuple(now))
    return Plan(tuple(receives), _settled(schedule, rank, channels))


def _channel(schedule: Schedule, source: int, target: int) -> list[Message]:
    """Return all messages between two ranks in the order of sending."""
    made = (gives(action, schedule.rank_of) for action in schedule.actions[source])
    return [message for message in made if message is not None and schedule.rank_of[message.stage] == target]


def _settled(schedule: Schedule, rank: int, peers: Iterable[int]) -> dict[Message, tuple[Message, ...]]:
    found = {}
    for peer in peers:
        ours: list[Message] = []
        for action in schedule.actions[peer]:
            needed, made = needs(action, schedule.rank_of), gives(action, schedule.rank_of)
            if needed is not None and sender(needed, schedule.rank_of) == rank:
                ours.append(needed)
            if made is not None and schedule.rank_of[made.stage] == rank:
                found[made] = tuple(ours)
                ours = []
    return found
