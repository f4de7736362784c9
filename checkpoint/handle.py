"""A save under way."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass

from checkpoint.catalog import CheckpointInfo


@dataclass(frozen=True, slots=True)
class SaveStats:
    """Where the time of one rank's save went."""

    blocked_s: float
    """In `save`, including the wait for the save before it."""
    write_s: float
    """Writing and syncing this rank's files."""
    durable_s: float
    """From the call to the commit."""
    nbytes: int
    """Tensor bytes this rank wrote."""


class SaveHandle:
    """Follows one save of one rank. Every method may be called from any thread."""

    def __init__(self, step: int, blocked_s: float) -> None:
        self.step = step
        """The step being saved."""
        self.blocked_s = blocked_s
        """Seconds that `save` kept its caller."""
        self._future: Future[tuple[CheckpointInfo, SaveStats]] = Future()
        self._seen = False

    def done(self) -> bool:
        """Whether the save has been committed or has failed."""
        return self._future.done()

    def staged(self) -> bool:
        """Whether the tensors handed to `save` may be mutated; so once `save` has returned."""
        return True

    def result(self, timeout_s: float | None = None) -> CheckpointInfo:
        """Waits for the commit and returns the checkpoint; raises the save's error, or TimeoutError."""
        return self._outcome(timeout_s)[0]

    def stats(self, timeout_s: float | None = None) -> SaveStats:
        """Waits for the commit and returns where the time went; raises as `result` does."""
        return self._outcome(timeout_s)[1]

    def exception(self, timeout_s: float | None = None) -> BaseException | None:
        """Waits for the end of the save and returns its error, None if it was committed."""
        try:
            error = self._future.exception(timeout_s)
        except TimeoutError as late:
            raise self._late(timeout_s) from late
        self._seen = True
        return error

    def _outcome(self, timeout_s: float | None) -> tuple[CheckpointInfo, SaveStats]:
        try:
            outcome = self._future.result(timeout_s)
        except TimeoutError as late:
            if self._future.done():
                raise
            raise self._late(timeout_s) from late
        finally:
            self._seen = self._seen or self._future.done()
        return outcome

    def _late(self, timeout_s: float | None) -> TimeoutError:
        return TimeoutError(
            f"the save of step {self.step} is not committed after {timeout_s:g} s; it goes on"
        )
