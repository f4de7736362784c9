"""Acting on a wish to stop at once, in the middle of a step."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator

from checkpoint import CheckpointError

_POLL_S = 0.05

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def watched(stop_requested: Callable[[], bool], act: Callable[[], None]) -> Iterator[None]:
    """Inside the block, call `act` once, from a thread of its own, as soon as `stop_requested` is true.

    The loop itself looks at the wish between two steps only, and a step may be longer than the notice a preempted
    machine gets. A CheckpointError of `act` is logged: the loop still stops, and saves, at its next step.
    """
    over = threading.Event()

    def watch() -> None:
        while not over.wait(_POLL_S):
            if stop_requested():
                try:
                    act()
                except CheckpointError:
                    _log.warning("asked to stop: the save in the middle of the step did not start", exc_info=True)
                return

    thread = threading.Thread(target=watch, name="preemption")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
