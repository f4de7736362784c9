"""One save as it is asked for, and as it is under way."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from checkpoint.commit import Attempt
from checkpoint.comparison import Delta
from checkpoint.delta import Narrowed
from checkpoint.handle import Outcome, SaveHandle
from checkpoint.planning import Draft
from checkpoint.shard import ShardPlan
from checkpoint.spans import Trace
from checkpoint.staging import Snapshot
from checkpoint.storage import Storage


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """What is to be saved, and where."""

    step: int
    draft: Draft
    moments: Sequence[Any]
    """Events of the state's devices, after all that the state is the result of."""
    objects: bytes
    shared: Any
    """As JSON."""
    tiers: Sequence[tuple[str, Storage]]
    deadline_s: float | None = None
    """Seconds within which an urgent save must be committed."""
    promoted: bool = False
    """Whether the local checkpoint is to be copied to the remote tier."""
    delta: Delta | None = None
    """Finds what the local checkpoint before has already; other tiers get all of a save that goes to them as well."""


@dataclass(frozen=True, slots=True, eq=False)
class Save:
    """One save under way."""

    request: Request
    handle: SaveHandle
    ordinal: int
    """Its place among the saves of this launch, from 1."""
    snapshot: Snapshot
    trace: Trace
    called_s: float
    attempts: dict[str, Attempt]
    after: dict[str, threading.Event]
    """For each tier, set when the save before this one has ended there."""
    ended: dict[str, threading.Event]
    plan: Future[tuple[ShardPlan, Narrowed | None]] = field(default_factory=Future)

    def plan_fails(self, error: BaseException) -> None:
        """Let nobody wait for a plan that will never be made. No effect once there is one."""
        if not self.plan.done():
            self.plan.set_exception(error)


def new_handle(request: Request, snapshot: Snapshot | None, trace: Trace) -> SaveHandle:
    """Return what follows a save; `snapshot` is None for one that is skipped."""
    handle = SaveHandle(request.step, [tier for tier, _ in request.tiers], snapshot, trace)
    if request.promoted:
        handle.add(Outcome(request.step, "remote"))
    return handle
