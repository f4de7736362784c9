"""The order of a rank's actions for each kind of schedule; `parallel.pipeline.schedule` says what they are. Pure.

Every function returns an iterator over what `rank` of `num_ranks` does with m micro-batches, or all ranks' actions.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from parallel.pipeline.actions import Action, Work, is_ready


def gpipe(rank: int, num_ranks: int, m: int, num_stages: int) -> Iterator[Action]:
    yield from (Action("forward", rank, i) for i in range(m))
    yield from (Action("backward", rank, i) for i in range(m))


def one_f_one_b(rank: int, num_ranks: int, m: int, num_stages: int) -> Iterator[Action]:
    forwards = [Action("forward", rank, i) for i in range(m)]
    backwards = [Action("backward", rank, i) for i in range(m)]
    return _alternate(forwards, backwards, num_ranks - 1 - rank)


def interleaved(rank: int, num_ranks: int, m: int, num_stages: int) -> Iterator[Action]:
    """Groups of `num_ranks` micro-batches go through a stage, then through the rank's next stage, and so on."""
    stages = range(rank, num_stages, num_ranks)
    forwards, backwards = [], []
    for first in range(0, m, num_ranks):
        group = range(first, first + num_ranks)
        forwards += [Action("forward", stage, i) for stage in stages for i in group]
        backwards += [Action("backward", stage, i) for stage in reversed(stages) for i in group]
    return _alternate(forwards, backwards, 2 * (num_ranks - 1 - rank) + num_stages - num_ranks)


def _alternate(forwards: Sequence[Action], backwards: Sequence[Action], num_ahead: int) -> Iterator[Action]:
    """Yield `num_ahead` forwards, then one forward and one backward in turn until all are over."""
    yield from forwards[:num_ahead]
    for forward, backward in itertools.zip_longest(forwards[num_ahead:], backwards):
        if forward is not None:
            yield forward
        yield backward


class _Leg:
    """Counts the micro-batches of one rank's two stages in a V, leg 0 down and leg 1 up again."""

    def __init__(self, stages: tuple[int, int]) -> None:
        self._stages = stages
        self._forwards = [0, 0]
        self._backwards = [0, 0]
        self._owed: list[tuple[int, int]] = []

    def forward(self, leg: int) -> Action:
        self._forwards[leg] += 1
        return Action("forward", self._stages[leg], self._forwards[leg] - 1)

    def backward(self, leg: int) -> Action:
        self._backwards[leg] += 1
        return Action("backward", self._stages[leg], self._backwards[leg] - 1)

    def inputs(self, leg: int) -> Action:
        action = self.backward(leg)._replace(work="backward_input")
        self._owed.append((action.stage, action.micro_batch))
        return action

    def weights(self) -> Action:
        """The oldest weight gradients that are owed."""
        return Action("backward_weight", *self._owed.pop(0))

    def rest(self) -> Iterator[Action]:
        while self._owed:
            yield self.weights()


def zb_h1(rank: int, num_ranks: int, m: int, num_stages: int) -> Iterator[Action]:
    """1f1b whose weight gradients come `rank` micro-batches late: a later rank, which starts late, keeps as many."""
    num_ahead = min(m, num_ranks - 1 - rank)
    weights = [Action("backward_weight", rank, i) for i in range(m)]
    num_inputs = 0
    for action in one_f_one_b(rank, num_ranks, m, num_stages):
        if action.work == "forward":
            yield action
            continue
        yield action._replace(work="backward_input")
        num_inputs += 1
        if num_inputs > min(rank, m - num_ahead):
            yield weights.pop(0)
    yield from weights


def zb_v(rank: int, num_ranks: int, m: int, num_stages: int) -> Iterator[Action]:
    """Forwards until p stages' worth of activations are kept twice over, then one forward, inputs, weights in turn.

    Needs m >= 2 p - 1.
    """
    legs, below = _Leg((rank, num_stages - 1 - rank)), num_ranks - 1 - rank
    yield from (legs.forward(0) for _ in range(2 * below + 1))
    for _ in range(rank):
        yield legs.forward(1)
        yield legs.forward(0)
    for _ in range(below + 1):
        yield from (legs.forward(1), legs.inputs(1), legs.weights())
    for _ in range(m - 2 * num_ranks + rank + 1):
        yield from (legs.forward(0), legs.inputs(0), legs.weights(), legs.forward(1), legs.inputs(1), legs.weights())
    for _ in range(below):
        yield from (legs.inputs(0), legs.weights(), legs.forward(1), legs.inputs(1), legs.weights())
    for _ in range(rank):
        yield from (legs.inputs(0), legs.inputs(1))
    for _ in range(below + 1):
        yield from (legs.inputs(0), legs.weights())
    yield from legs.rest()


def dual_pipe_v(rank: int, num_ranks: int, m: int, num_stages: int) -> Iterator[Action]:
    """Micro-batches go down the V while others come up: in the middle each forward of one has a backward of another.

    Needs m >= 2 p.
    """
    legs, below = _Leg((rank, num_stages - 1 - rank)), num_ranks - 1 - rank
    yield from (legs.forward(0) for _ in range(2 * below))
    for _ in range(rank + 1):
        yield from (legs.forward(0), legs.forward(1))
    for _ in range(below):
        yield from (legs.inputs(1), legs.weights(), legs.forward(1))
    for _ in range(m - 2 * num_ranks + rank + 1):
        yield from (legs.forward(0), legs.backward(1), legs.forward(1), legs.backward(0))
    for _ in range(below):
        yield from (legs.backward(1), legs.forward(1), legs.backward(0))
    for i in range(2 * (rank + 1)):
        yield legs.backward(1 - i % 2) if i <= rank else legs.inputs(1 - i % 2)
    for _ in range(below):
        yield from (legs.weights(), legs.inputs(0))
    yield from legs.rest()


def list_schedule(rank_of: tuple[int, ...], m: int, limit: int | None) -> tuple[tuple[Action, ...], ...]:
    """Return the actions that ranks take who always do the most urgent of what they can do, all works one unit long.

    Gradients of inputs are the most urgent, since other ranks wait for them, then forwards, of the latest stage first;
    weights fill the gaps. A rank keeps the activations of at most `limit` forwards; None only evaluates.
    """
    num_ranks = max(rank_of) + 1
    stages = [[s for s, owner in enumerate(rank_of) if owner == rank] for rank in range(num_ranks)]
    finished: dict[Action, int] = {}
    lists: list[list[Action]] = [[] for _ in stages]
    works: Sequence[Work] = ("forward",) if limit is None else ("backward_input", "forward", "backward_weight")
    next_of: dict[tuple[Work, int], int] = {(work, s): 0 for work in works for s in range(len(rank_of))}
    kept = [0] * num_ranks
    total, now = len(works) * len(rank_of) * m, 0
    while len(finished) < total:
        before = {action for action, end in finished.items() if end <= now}
        for rank, own in enumerate(stages):
            candidates = [Action(w, s, next_of[w, s]) for w in works for s in reversed(own) if next_of[w, s] < m]
            for action in candidates:
                full = limit is not None and action.work == "forward" and not _has_room(action, kept[rank], limit, own)
                if not full and is_ready(action, len(rank_of), before):
                    finished[action] = now + 1
                    lists[rank].append(action)
                    next_of[action.work, action.stage] += 1
                    kept[rank] += {"forward": 1, "backward_weight": -1}.get(action.work, 0)
                    break
        now += 1
    return tuple(map(tuple, lists))


def _has_room(action: Action, kept: int, limit: int, own: Sequence[int]) -> bool:
    """Whether a forward may start: a rank's earlier stages leave room for the later ones, or nothing would end."""
    return kept < limit - (own[-1] != action.stage)
