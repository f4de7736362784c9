"""A save under way."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace

from checkpoint.catalog import CheckpointInfo
from checkpoint.errors import SaveSkipped
from checkpoint.spans import Trace
from checkpoint.staging import Snapshot
from checkpoint.writer import Flow

_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class SaveStats:
    """Where the time of one rank's save went. Times are seconds, those from the call of `save` include each other."""

    call_s: float
    """Kept from its caller by `save`."""
    fence_s: float
    """Kept from its callers by `fence`, for this save's copies."""
    staged_s: float
    """From the call until the last byte was copied."""
    written_s: float
    """From the call until this rank's files were durable."""
    durable_s: float
    """From the call until the commit."""
    pressure_s: float
    """In which copies stood still because the staging memory was full."""
    nbytes: int
    """Tensor bytes that this rank answers for."""
    written_bytes: int
    """Bytes of its shard: less where the checkpoint before already has them."""

    @property
    def blocked_s(self) -> float:
        """What the save cost its callers."""
        return self.call_s + self.fence_s

    @property
    def staged_gib_per_s(self) -> float:
        """Rate from the call until all was copied."""
        return self.written_bytes / _GIB / self.staged_s if self.staged_s else 0.0

    @property
    def written_gib_per_s(self) -> float:
        """Rate from the call until this rank's files were durable."""
        return self.written_bytes / _GIB / self.written_s if self.written_s else 0.0


@dataclass(frozen=True, slots=True)
class Progress:
    """How far one rank's save has come."""

    total_bytes: int
    """To be copied and written; 0 until that is worked out."""
    staged_bytes: int
    written_bytes: int


class Outcome:
    """The end of a save in one tier. Methods may be called from any thread."""

    def __init__(self, step: int, tier: str) -> None:
        self.tier = tier
        self.error_seen = False
        """Whether the error has been told through this object."""
        self._step = step
        self._future: Future[CheckpointInfo] = Future()
        self._lock = threading.Lock()

    def done(self) -> bool:
        """Whether the checkpoint is committed in this tier, or never will be."""
        return self._future.done()

    def result(self, timeout_s: float | None = None) -> CheckpointInfo:
        """Wait for the commit and return the checkpoint; raise the save's error, or TimeoutError."""
        error = self.exception(timeout_s)
        if error is not None:
            raise error
        return self._future.result()

    def exception(self, timeout_s: float | None = None) -> BaseException | None:
        """Wait for the end and return the error, None if there is a commit; raise TimeoutError."""
        try:
            error = self._future.exception(timeout_s)
        except TimeoutError as late:
            raise TimeoutError(
                f"the save of step {self._step} is not committed in {self.tier} after {timeout_s} s; it goes on"
            ) from late
        self.error_seen = True
        return error

    def settle(self, outcome: CheckpointInfo | BaseException) -> bool:
        """End it, unless it has ended; return whether this was its end."""
        with self._lock:
            if self._future.done():
                return False
            if isinstance(outcome, BaseException):
                self._future.set_exception(outcome)
            else:
                self._future.set_result(outcome)
            return True


class SaveHandle:
    """Follows one save of one rank. Methods may be called from any thread."""

    def __init__(self, step: int, tiers: Sequence[str], snapshot: Snapshot | None, trace: Trace) -> None:
        """`snapshot` is None for a save that was skipped."""
        self.step = step
        """The step being saved."""
        self.call_s = 0.0
        """Seconds that `save` kept from its caller."""
        self.is_wished = False
        """Whether `preempt` started it, and the loop does not know it: `poll` then warns of its errors only."""
        self._outcomes = {tier: Outcome(step, tier) for tier in tiers}
        self._brought: dict[str, Outcome] = {}
        self._first = "local" if "local" in self._outcomes else tiers[0]
        self._snapshot = snapshot
        self._trace = trace
        self._flow: Flow | None = None
        self._total_bytes = 0
        self._stats: dict[str, SaveStats] = {}

    @property
    def blocked_s(self) -> float:
        """Seconds that `save`, and so far `fence`, kept from their callers."""
        return self.call_s + (self._snapshot.fence_s if self._snapshot else 0.0)

    @property
    def skipped(self) -> bool:
        """Whether this step is not saved because saves before it were still under way."""
        return any(o.done() and isinstance(o._future.exception(), SaveSkipped) for o in self._outcomes.values())

    @property
    def failed(self) -> bool:
        """Whether it ended without a commit in the local tier, or the first there is; asking does not see the error."""
        first = self._outcomes[self._first]
        return first.done() and first._future.exception() is not None

    @property
    def outcomes(self) -> tuple[Outcome, ...]:
        """Return the ends in the tiers that the save writes to itself."""
        return tuple(self._outcomes.values())

    def done(self) -> bool:
        """Whether the save has ended, with or without a commit, in every tier that it writes to itself."""
        return all(outcome.done() for outcome in self._outcomes.values())

    def staged(self) -> bool:
        """Whether the tensors handed to `save` may be mutated without a fence: nothing is read from them any more."""
        return self._snapshot is None or self._snapshot.is_over

    def wait_staged(self, timeout_s: float | None = None) -> None:
        """Return when `staged()`; raise TimeoutError."""
        if self._snapshot is not None and not self._snapshot.wait(timeout_s):
            raise TimeoutError(f"the state of step {self.step} is not copied after {timeout_s} s; it goes on")

    def at(self, tier: str) -> Outcome:
        """Return the end of the save in a tier. Raises KeyError if this save does not go there."""
        return self._brought[tier] if tier in self._brought else self._outcomes[tier]

    def result(self, timeout_s: float | None = None) -> CheckpointInfo:
        """Wait for the commit in the local tier, or the first there is, as `at(tier).result` does."""
        return self._outcomes[self._first].result(timeout_s)

    def exception(self, timeout_s: float | None = None) -> BaseException | None:
        """Wait for the end in the local tier, or the first there is, as `at(tier).exception` does."""
        return self._outcomes[self._first].exception(timeout_s)

    def stats(self, timeout_s: float | None = None) -> SaveStats:
        """Wait for the commit as `result` does and return where the time went."""
        self.result(timeout_s)
        fence_s = self._snapshot.fence_s if self._snapshot else 0.0
        return replace(self._stats[self._first], call_s=self.call_s, fence_s=fence_s)

    def progress(self) -> Progress:
        """Return how far this rank's part has come."""
        staged = self._snapshot.staged_bytes if self._snapshot else 0
        return Progress(self._total_bytes, staged, self._flow.written_bytes if self._flow else 0)

    def trace(self, path: str | os.PathLike[str]) -> None:
        """Write what happened so far, and when, as a Chrome trace."""
        self._trace.write(path)

    # What the save itself tells

    def follow(self, flow: Flow, total_bytes: int) -> None:
        """Take a flow and what goes through it for `progress`."""
        self._flow = flow
        self._total_bytes = total_bytes

    def add(self, outcome: Outcome) -> None:
        """Take one more tier, that others bring the checkpoint to."""
        self._brought[outcome.tier] = outcome

    def commit(self, tier: str, info: CheckpointInfo, stats: SaveStats) -> None:
        """Tell that the save ended well in a tier."""
        self._stats[tier] = stats
        self._outcomes[tier].settle(info)

    def fail(self, error: BaseException, tier: str | None = None) -> None:
        """Tell that the save failed in a tier, or in all where it has not ended: then nothing more is written."""
        if tier is None and self._flow is not None:
            self._flow.cancel(error)
        for outcome in (*self._outcomes.values(), *self._brought.values()):
            if tier in (None, outcome.tier):
                outcome.settle(error)
