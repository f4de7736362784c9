"""One optimizer step in flight: what is to be done for every subgroup, in which order, and what the norm decided."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field

import torch

from offload.errors import OptimizerError
from offload.kernels import States, Step
from offload.schedule import Path, Subgroup
from offload.transfer import TIMEOUT_S, Ticket


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the norm decided."""

    scale: float
    """Multiplies every gradient."""
    skip: bool = False
    """Whether the step is not made: something was not finite."""


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring elements of a subgroup that make the same step."""

    offset: int
    count: int
    step: Step


@dataclass(slots=True)
class Prefetched:
    """States of a subgroup in memory of the device that is lent to them for one step."""

    states: States
    last: Ticket
    """Done when they are there, and later when they are back."""
    is_over: bool = False
    """Whether nothing more is enqueued for them."""


@dataclass(slots=True)
class Task:
    """The update of one subgroup."""

    subgroup: Subgroup
    path: Path
    gradients: dict[int, torch.Tensor] = field(default_factory=dict)
    """On the device, flat, by the number of the parameter; for a path on the device."""
    host_gradient: torch.Tensor | None = None
    """Flat, of the whole subgroup; for a path on the host."""
    present: set[int] = field(default_factory=set)
    """Parameters that have a gradient."""
    tickets: list[Ticket] = field(default_factory=list)
    """Done when the gradients are where the update reads them."""
    updated: Future[Ticket] = field(default_factory=Future)
    """Has the ticket after which the parameters may be read."""
    prefetched: Prefetched | None = None
    """The states, if they are on the device already."""
    speculated: Ticket | None = None
    """The ticket of an update that waits for the verdict."""
    submitted: bool = False
    """Whether a worker has got it."""
    wrote: bool = False
    """Whether a speculative update has changed the parameters."""
    arrived: bool = False
    """Whether the gradients were found to be there."""

    def has_arrived(self) -> bool:
        """Whether an update would not have to wait for its gradients."""
        self.arrived = self.arrived or all(ticket.done() for ticket in self.tickets)
        return self.arrived

    @property
    def index(self) -> int:
        return self.subgroup.index


@dataclass(slots=True)
class Round:
    """One step of the optimizer."""

    tasks: list[Task]
    speculates: bool
    is_early: bool = False
    """Whether updates begin in backward."""
    may_write: Ticket | None = None
    """Done when nothing on the device reads the parameters' old values any more; None: the gradients' tickets say."""
    verdict: Future[Verdict] = field(default_factory=Future)
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Over the verdict and what tasks make of it."""
    has_stepped: bool = False
    keep: frozenset[int] = frozenset()
    """Subgroups of the tier that stay in their buffers."""

    def wait(self) -> Verdict:
        """Return the verdict."""
        try:
            return self.verdict.result(TIMEOUT_S)
        except FutureTimeout as error:
            raise OptimizerError(f"step() did not follow within {TIMEOUT_S} s after the gradients") from error


class Backlog:
    """Tasks that wait for a worker."""

    def __init__(self) -> None:
        self._tasks: list[tuple[Round, Task, int]] = []
        self._changed = threading.Condition()
        self._closed = False

    def put(self, round_: Round, task: Task, order: int | None = None) -> None:
        """Add a task; of what can begin, lower orders (default: the subgroup's index) are first."""
        with self._changed:
            self._tasks.append((round_, task, task.index if order is None else order))
            self._changed.notify()

    def take(self, *, wait: bool) -> tuple[Round, Task] | None:
        """Return the next task; None: it was closed, or there is none and nobody is to wait."""
        with self._changed:
            while wait and not self._tasks and not self._closed:
                self._changed.wait()
            if not self._tasks:
                return None
            entry = self._ordered()[0]
            self._tasks.remove(entry)
            return entry[0], entry[1]

    def upcoming(self) -> list[Task]:
        """Return what waits, in the order in which it would be taken."""
        with self._changed:
            return [task for _, task, _ in self._ordered()]

    def close(self) -> None:
        """Let nobody wait any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _ordered(self) -> list[tuple[Round, Task, int]]:
        """Return what waits, in the order in which to do it; all of it is of one round."""
        waiting = sorted(self._tasks, key=lambda entry: entry[2])
        if not waiting or not waiting[0][0].is_early:
            return waiting
        is_judged = waiting[0][0].verdict.done()
        coming = [entry for entry in waiting if is_judged or entry[1].path in ("cpu", "stream")]
        later = [] if is_judged else [entry for entry in waiting if entry[1].path not in ("cpu", "stream")]
        there = []
        while coming and coming[-1][1].has_arrived():  # the highest come first: nothing below is asked in vain
            there.append(coming.pop())
        return [*reversed(there), *reversed(coming), *later]
