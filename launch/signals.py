"""SIGTERM and SIGINT as a wish instead of an end."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

_NUMBERS = (signal.SIGTERM, signal.SIGINT)


@contextlib.contextmanager
def caught(note: Callable[[int], None]) -> Iterator[None]:
    """Call `note(number)` at a signal inside the block, then restore the handlers.

    Only the main thread can: elsewhere the block changes nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()

    def handle(number: int, frame: FrameType | None) -> None:
        if os.getpid() == owner:
            note(number)
        else:  # a forked child inherits the handler, and must still end when it is told to
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    before: dict[signal.Signals, Any] = {number: signal.signal(number, handle) for number in _NUMBERS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
