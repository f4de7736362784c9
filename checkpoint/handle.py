"""A save under way."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass

from checkpoint.catalog import CheckpointInfo


@dataclass(frozen=True, slots=True)
class SaveStats:
    """Where the time of one rank's save went."""

    blocked_s: float
    """Kept from its caller by `save`: the wait for the save before it, and the copy."""
    write_s: float
    """Writing and syncing this rank's files."""
    durable_s: float
    """From the call of `save` to the commit."""
    nbytes: int
    """Tensor bytes this rank wrote."""


class SaveHandle:
    """Follows one save of one rank. Methods may be called from any thread."""

    def __init__(self, step: int, blocked_s: float, outcome: Future[tuple[CheckpointInfo, SaveStats]]) -> None:
        self.step = step
        """The step being saved."""
        self.blocked_s = blocked_s
        """Seconds that `save` kept from its caller."""
        self.error_seen = False
        """Whether the save's error has been told through this handle."""
        self._outcome = outcome

    def done(self) -> bool:
        """Whether the save has been committed or has failed."""
        return self._outcome.done()

    def staged(self) -> bool:
        """Whether the tensors handed to `save` may be mutated: from the start, since `save` copies them."""
        return True

    def result(self, timeout_s: float | None = None) -> CheckpointInfo:
        """Wait for the commit and return the checkpoint; raise the save's error, or TimeoutError."""
        return self._wait(timeout_s)[0]

    def stats(self, timeout_s: float | None = None) -> SaveStats:
        """Wait for the commit and return where the time went; raise as `result` does."""
        return self._wait(timeout_s)[1]

    def exception(self, timeout_s: float | None = None) -> BaseException | None:
        """Wait for the end of the save and return its error, None if it was committed; raise TimeoutError."""
        try:
            error = self._outcome.exception(timeout_s)
        except TimeoutError as late:
            raise self._late(timeout_s) from late
        self.error_seen = True
        return error

    def _wait(self, timeout_s: float | None) -> tuple[CheckpointInfo, SaveStats]:
        error = self.exception(timeout_s)
        if error is not None:
            raise error
        return self._outcome.result()

    def _late(self, timeout_s: float | None) -> TimeoutError:
        return TimeoutError(f"the save of step {self.step} is not committed after {timeout_s} s; it goes on")
