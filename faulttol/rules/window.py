"""The last steps of a job, and what was usual before them. Pure."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median, median_low

from faulttol.config import DetectorConfig, HealthConfig
from faulttol.rules.pace import Pace, paces
from faulttol.view import CpuWaits, JobView, match

LONGEST = 4
"""A window has at most this many times `window_steps`."""
TransferKey = tuple[str, str, int, int, int]
"""Group, kind, bits of the size, sender, receiver; the last two -1 for a collective."""


@dataclass(frozen=True, slots=True)
class Baseline:
    """What was usual while nothing was wrong, in seconds a step or an operation."""

    local_s: Mapping[int, float]
    """Each rank's own work."""
    longest_s: float
    """The longest of them in a step."""
    span_s: float
    transfer_s: Mapping[TransferKey, float] = field(default_factory=dict)
    cpu_wait_s: Mapping[int, float] = field(default_factory=dict)
    """For how long each rank's threads waited for a CPU in a step, of ranks of which that is known."""


@dataclass(frozen=True, slots=True)
class Window:
    """The last steps that all ranks have behind them."""

    steps: tuple[int, ...]
    paces: Mapping[int, Mapping[int, Pace]]
    """By rank, then by step."""
    transfers_s: Mapping[TransferKey, tuple[tuple[int, float], ...]]
    """(step, shortest time that a member had it open) of every operation, in order."""
    cpu_waits: Mapping[int, CpuWaits] = field(default_factory=dict)
    """What each rank's threads had waited for a CPU until when."""

    @property
    def spans_s(self) -> list[float]:
        """How long each step took, the median over the ranks."""
        return [median(own[step].span_s for own in self.paces.values()) for step in self.steps]

    @property
    def span_s(self) -> float:
        """How long a step took, the median over the steps."""
        return median(self.spans_s)

    @property
    def duration_s(self) -> float:
        """How long its steps took together."""
        return sum(self.spans_s)

    def locals_s(self) -> dict[int, list[float]]:
        """Each rank's local time in every step."""
        return {rank: [own[step].local_s for step in self.steps] for rank, own in self.paces.items()}

    def last(self, num_steps: int) -> Window:
        """The last steps of the window as one of their own."""
        steps = self.steps[-num_steps:]
        kept = {key: tuple(v for v in values if v[0] >= steps[0]) for key, values in self.transfers_s.items()}
        return replace(self, steps=steps, transfers_s={key: values for key, values in kept.items() if values})

    def num_lasting(self, least_steps: int, least_s: float) -> int:
        """How many of the last steps, at least so many, last so long; all where they do not."""
        spans = self.spans_s
        num, lasted_s = 0, 0.0
        while num < len(spans) and (num < least_steps or lasted_s < least_s):
            num += 1
            lasted_s += spans[-num]
        return num

    def baseline(self) -> Baseline:
        """What is usual, taking this window for a healthy one.

        Of its two halves the lower counts: a fault that begins within it does not become what is usual. For steps
        alike the lower of two medians is a quarter of their deviation below the median, and for all ranks alike.
        """
        half = len(self.steps) // 2
        middle = self.steps[half]
        locals_s = self.locals_s()
        longest_s = [max(row) for row in zip(*locals_s.values(), strict=True)]
        parts = {
            key: [[s for step, s in values if step < middle], [s for step, s in values if step >= middle]]
            for key, values in self.transfers_s.items()
        }
        return Baseline(
            {rank: _lower([values[:half], values[half:]]) for rank, values in locals_s.items()},
            _lower([longest_s[:half], longest_s[half:]]),
            _lower([self.spans_s[:half], self.spans_s[half:]]),
            {key: _lower(part for part in halves if part) for key, halves in parts.items()},
            _least(self.cpu_wait_s(self.steps[:half]), self.cpu_wait_s(self.steps[half:])),
        )

    def cpu_wait_s(self, steps: Sequence[int] = ()) -> dict[int, float]:
        """For how long each rank's threads waited for a CPU in one of these steps (none: all), where that is known.

        Together they count for no longer than the step took. What was waited between two known moments counts evenly;
        between steps it does not count.
        """
        chosen = steps or self.steps
        found = {}
        for rank, own in self.paces.items():
            moments = self.cpu_waits.get(rank, ())
            bounds = [(own[step].begin_ns, own[step].begin_ns + round(own[step].span_s * 1e9)) for step in chosen]
            waits_s = [(_waited_s(moments, begin_ns), _waited_s(moments, end_ns)) for begin_ns, end_ns in bounds]
            known_s = [end_s - begin_s for begin_s, end_s in waits_s if begin_s is not None and end_s is not None]
            if len(known_s) == len(chosen):
                found[rank] = min(sum(known_s), sum(own[step].span_s for step in chosen)) / len(chosen)
        return found

    def parts(self, num_parts: int) -> list[tuple[int, ...]]:
        """Divide its steps into about so many parts of one size; what is over at the end is in none."""
        size = max(1, len(self.steps) // num_parts)
        return [self.steps[i : i + size] for i in range(0, len(self.steps) - size + 1, size)]


def window(view: JobView, first_step: int, config: DetectorConfig, health: HealthConfig) -> Window | None:
    """Return the last steps that can be compared; None while they are fewer than `window_steps` or last too short.

    Left out are the warm-up after `first_step`, and steps in which a rank did something else than train.
    """
    if len(view.records) < 2:
        return None
    begin = first_step + config.warmup_steps
    all_paces = {rank: paces(record, begin) for rank, record in view.records.items()}
    common = set.intersection(*(set(own) for own in all_paces.values()))
    patient = set(health.patient_phases)
    usable = sorted(step for step in common if not any(own[step].phases & patient for own in all_paces.values()))
    if len(usable) < config.window_steps:
        return None
    most = LONGEST * config.window_steps
    steps = tuple(usable[-most:])
    chosen = {rank: {step: own[step] for step in steps} for rank, own in sorted(all_paces.items())}
    found = Window(steps, chosen, _transfers(view, steps), view.cpu_waits)
    return found if len(steps) == most or found.duration_s >= config.window_least_s else None


def usual(healthy: Sequence[Baseline]) -> Baseline | None:
    """Return what most of the windows had, or the quicker half of them; None without any."""
    if not healthy:
        return None
    ranks = set.intersection(*(set(one.local_s) for one in healthy))
    keys = set.intersection(*(set(one.transfer_s) for one in healthy))
    waits_s = {rank: [one.cpu_wait_s[rank] for one in healthy if rank in one.cpu_wait_s] for rank in sorted(ranks)}
    return Baseline(
        {rank: median_low(one.local_s[rank] for one in healthy) for rank in sorted(ranks)},
        median_low(one.longest_s for one in healthy),
        median_low(one.span_s for one in healthy),
        {key: median_low(one.transfer_s[key] for one in healthy) for key in sorted(keys)},
        {rank: median_low(known) for rank, known in waits_s.items() if known},
    )


def _waited_s(moments: CpuWaits, at_ns: int) -> float | None:
    """What had been waited at a moment, between the two that are known on either side of it."""
    place = bisect_left(moments, (at_ns, -math.inf))
    if place == len(moments) or (place == 0 and moments[0][0] > at_ns):
        return None
    after_ns, after_s = moments[place]
    if place == 0:
        return after_s
    before_ns, before_s = moments[place - 1]
    return before_s + (after_s - before_s) * (at_ns - before_ns) / (after_ns - before_ns)


def _least(one: Mapping[int, float], other: Mapping[int, float]) -> dict[int, float]:
    return {rank: min(one[rank], other[rank]) for rank in one.keys() & other.keys()}


def _lower(parts: Iterable[Sequence[float]]) -> float:
    return min(median(part) for part in parts)


def _transfers(view: JobView, steps: tuple[int, ...]) -> dict[TransferKey, tuple[tuple[int, float], ...]]:
    first, last = steps[0], steps[-1]
    chosen = [
        event
        for record in view.records.values()
        for event in record.events
        if event.state == "ended" and first <= event.step <= last
    ]
    found: dict[TransferKey, list[tuple[int, float]]] = {}
    for key, operation in sorted(match(chosen).items()):
        if operation.absent:
            continue
        events = list(operation.events.values())
        shortest_s = min((event.duration_ns or 0) / 1e9 for event in events)
        kind = "message" if operation.is_message else events[0].kind
        name = (key.group, kind, events[0].bytes.bit_length(), key.source, key.target)
        found.setdefault(name, []).append((events[0].step, shortest_s))
    return {name: tuple(values) for name, values in found.items()}
