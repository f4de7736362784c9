"""Acting on a wish to stop at once, in the middle of a step."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator

from checkpoint import CheckpointError
from trainsys.background import repeated

_POLL_S = 0.05

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def watched(stop_requested: Callable[[], bool], act: Callable[[], None]) -> Iterator[None]:
    """Inside the block, call `act` once, from a thread of its own, as soon as `stop_requested` is true.

    The loop itself looks at the wish between two steps only, and a step may be longer than the notice a preempted
    machine gets. A CheckpointError of `act` is logged: the loop still stops, and saves, at its next step.
    """

    def look() -> bool:
        if not stop_requested():
            return True
        try:
            act()
        except CheckpointError:
            _log.warning("asked to stop: the save in the middle of the step did not start", exc_info=True)
        return False

    with repeated(look, _POLL_S, name="preemption"):
        yield
