"""Layers -> stages. Pure."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from parallel.errors import PipelineError


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """What one layer, the embedding or the head costs."""

    time: float
    """Of a micro-batch, forward and backward, in any unit."""
    state_bytes: float = 0.0
    """Weights, gradients and optimizer state on a rank."""
    kept_bytes: float = 0.0
    """Activations from forward to backward of a micro-batch."""


_NOTHING = Layer(time=0.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """What a stage may hold."""

    limit_bytes: float
    in_flight: Sequence[float]
    """Micro-batches whose activations each stage keeps at its peak (`Prediction.peak_kept`)."""


def split(
    layers: Sequence[Layer],
    num_stages: int,
    *,
    embedding: Layer = _NOTHING,
    head: Layer = _NOTHING,
    memory: Memory | None = None,
) -> list[int]:
    """Return how many layers each stage gets so that the slowest stage is as fast as can be; at least one each.

    The first stage has the embedding too, the last one the head. Of equally good cuts it is the one whose stages are
    the most alike (least sum of squares).

    Raises: PipelineError if there are fewer layers than stages, or no cut fits the memory.
    """
    n = len(layers)
    if not 1 <= num_stages <= n:
        raise PipelineError(
            f"parallel.pipeline: {num_stages} stages for {n} layers; each stage needs a layer: 1 to {n} stages"
        )
    sums = _Sums(layers, embedding, head, num_stages, memory)
    slowest = _best(n, num_stages, lambda stage, first, end, so_far: max(so_far, sums.time(stage, first, end)), 0.0)
    if math.isinf(slowest[0]):
        assert memory is not None
        raise PipelineError(
            f"parallel.stages.layers: no cut of {n} layers into {num_stages} stages fits {memory.limit_bytes:g} bytes "
            "on every stage; more stages, smaller micro-batches or activation checkpointing"
        )
    limit = slowest[0] * (1 + 1e-12)

    def squares(stage: int, first: int, end: int, so_far: float) -> float:
        time = sums.time(stage, first, end)
        return so_far + time * time if time <= limit else math.inf

    cuts = _best(n, num_stages, squares, 0.0)[1]
    return [end - first for first, end in itertools.pairwise(cuts)]


def check_layers(sizes: Sequence[int], num_stages: int, num_layers: int) -> None:
    """Check the layers of each stage that a recipe names.

    Raises: PipelineError with everything that is wrong.
    """
    problems = []
    if len(sizes) != num_stages:
        problems.append(f"{len(sizes)} numbers for {num_stages} stages; one each")
    if any(size < 1 for size in sizes):
        problems.append(f"{list(sizes)} has a stage without a layer; at least 1 each")
    if sum(sizes) != num_layers:
        problems.append(f"{list(sizes)} adds to {sum(sizes)}; the model has {num_layers} layers")
    if problems:
        raise PipelineError("\n".join(f"parallel.stages.layers: {problem}" for problem in problems))


class _Sums:
    """Costs of runs of layers, in constant time."""

    def __init__(
        self, layers: Sequence[Layer], embedding: Layer, head: Layer, num_stages: int, memory: Memory | None
    ) -> None:
        self._last, self._memory = num_stages - 1, memory
        self._ends = (embedding, head)
        self._time, self._state, self._kept = (
            list(itertools.accumulate(values, initial=0.0))
            for values in (
                (layer.time for layer in layers),
                (layer.state_bytes for layer in layers),
                (layer.kept_bytes for layer in layers),
            )
        )

    def time(self, stage: int, first: int, end: int) -> float:
        """Return the time of layers [first, end) as a stage; infinite if they do not fit it."""
        extra = [part for part, at in zip(self._ends, (0, self._last), strict=True) if at == stage]
        if self._memory is not None:
            state = self._state[end] - self._state[first] + sum(part.state_bytes for part in extra)
            kept = self._kept[end] - self._kept[first] + sum(part.kept_bytes for part in extra)
            if state + self._memory.in_flight[stage] * kept > self._memory.limit_bytes:
                return math.inf
        return self._time[end] - self._time[first] + sum(part.time for part in extra)


def _best(
    n: int, num_stages: int, extend: Callable[[int, int, int, float], float], start: float
) -> tuple[float, list[int]]:
    """Return the least value of all cuts of n layers, and where it cuts; `extend(stage, first, end, value before)`."""
    values: list[float] = [start] + [math.inf] * n
    origins: list[list[int]] = []
    for stage in range(num_stages):
        now, origin = [math.inf] * (n + 1), [-1] * (n + 1)
        for end in range(stage + 1, n - (num_stages - stage - 1) + 1):
            for first in range(stage, end):
                if not math.isinf(values[first]) and (value := extend(stage, first, end, values[first])) < now[end]:
                    now[end], origin[end] = value, first
        values = now
        origins.append(origin)
    cuts = [n]
    for origin in reversed(origins):
        cuts.insert(0, origin[cuts[0]])
    return values[n], cuts
