"""What a schedule costs, by replaying it: time, bubbles and activations. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from parallel.errors import PipelineError
from parallel.pipeline.actions import Action, dependencies
from parallel.pipeline.schedule import Schedule, order


@dataclass(frozen=True, kw_only=True, slots=True)
class Costs:
    """Seconds (or any one unit) of a micro-batch, by stage."""

    forward: Sequence[float]
    backward_input: Sequence[float]
    backward_weight: Sequence[float]
    """A whole backward costs both together."""
    latency: float = 0.0
    """From the end of an action on one rank to the earliest start of what needs it on another."""
    kept: Sequence[float] = ()
    """Activations that a forward of the stage keeps until its backward is over, in any unit; empty: 1 each."""

    @classmethod
    def even(cls, num_stages: int, forward: float = 1.0, inputs: float = 1.0, weights: float = 1.0) -> Costs:
        """Return the costs of equal stages."""
        return cls(
            forward=(forward,) * num_stages,
            backward_input=(inputs,) * num_stages,
            backward_weight=(weights,) * num_stages,
        )


@dataclass(frozen=True, slots=True)
class Prediction:
    """One step of a schedule under given costs."""

    makespan: float
    """From the start of the first action to the end of the last."""
    busy: tuple[float, ...]
    """Time that each rank computes."""
    peak_kept: tuple[float, ...]
    """The most that each rank keeps at once, in the unit of `Costs.kept`."""
    spans: tuple[tuple[tuple[Action, float, float], ...], ...]
    """By rank: each action, its start and its end."""

    @property
    def bubble(self) -> tuple[float, ...]:
        """Fraction of the step that each rank does not compute."""
        return tuple(1 - busy / self.makespan if self.makespan else 0.0 for busy in self.busy)

    @property
    def idle(self) -> tuple[float, ...]:
        """Time that each rank waits between its first action's start and its last one's end."""
        pairs = zip(self.spans, self.busy, strict=True)
        return tuple(spans[-1][2] - spans[0][1] - busy if spans else 0.0 for spans, busy in pairs)


def predict(schedule: Schedule, costs: Costs) -> Prediction:
    """Replay a schedule: every rank does its actions in order, each as soon as what it needs has arrived.

    Raises: PipelineError if the costs are not those of its stages, or its ranks wait for each other.
    """
    _check(schedule, costs)
    ends: dict[Action, float] = {}
    free = [0.0] * schedule.num_ranks
    spans: list[list[tuple[Action, float, float]]] = [[] for _ in schedule.actions]
    for rank, action in order(schedule):
        start = free[rank]
        for providers in dependencies(action, schedule.num_stages):
            (provider,) = (one for one in providers if one in ends)
            away = schedule.rank_of[provider.stage] != rank
            start = max(start, ends[provider] + (costs.latency if away else 0.0))
        free[rank] = ends[action] = start + duration(action, costs)
        spans[rank].append((action, start, ends[action]))
    return Prediction(
        makespan=max(free),
        busy=tuple(sum(duration(action, costs) for action in actions) for actions in schedule.actions),
        peak_kept=tuple(_peak(actions, costs) for actions in schedule.actions),
        spans=tuple(map(tuple, spans)),
    )


def duration(action: Action, costs: Costs) -> float:
    """Return what one action costs."""
    inputs, weights = costs.backward_input[action.stage], costs.backward_weight[action.stage]
    return {
        "forward": costs.forward[action.stage],
        "backward": inputs + weights,
        "backward_input": inputs,
        "backward_weight": weights,
    }[action.work]


def _peak(actions: Sequence[Action], costs: Costs) -> float:
    kept = peak = 0.0
    for action in actions:
        size = costs.kept[action.stage] if costs.kept else 1.0
        kept += {"forward": size, "backward": -size, "backward_weight": -size, "backward_input": 0.0}[action.work]
        peak = max(peak, kept)
    return peak


def _check(schedule: Schedule, costs: Costs) -> None:
    lists = {"forward": costs.forward, "backward_input": costs.backward_input, "backward_weight": costs.backward_weight}
    if costs.kept:
        lists["kept"] = costs.kept
    wrong = [
        f"costs: {name}: {len(values)} numbers for {schedule.num_stages} stages; one each"
        for name, values in sorted(lists.items())
        if len(values) != schedule.num_stages
    ]
    if wrong:
        raise PipelineError("\n".join(wrong))
