"""Something small that goes on beside the loop."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def repeated(act: Callable[[], bool], interval_s: float, *, name: str) -> Iterator[None]:
    """Inside the block, call `act` every `interval_s` seconds from a thread of its own, until it returns False.

    `act` must not raise.
    """
    over = threading.Event()

    def go_on() -> None:
        while not over.wait(interval_s):
            if not act():
                return

    thread = threading.Thread(target=go_on, name=name)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
