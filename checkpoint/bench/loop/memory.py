"""The memory of this process and its children, watched."""

from __future__ import annotations

import contextlib
import os
import re
import threading
from pathlib import Path
from types import TracebackType

_PAUSE_S = 0.02


class PeakMemory:
    """Watches the proportional set size (PSS) of this process and its children while its block runs.

    Shared memory counts once, however many of them map it; files in the page cache do not count.
    """

    def __init__(self) -> None:
        self.extra_bytes = 0
        """The peak over what there was when the block began."""
        self._base = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peak-memory", daemon=True)

    def __enter__(self) -> PeakMemory:
        self._base = pss()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._over.wait(_PAUSE_S):
            self._look()

    def _look(self) -> None:
        self.extra_bytes = max(self.extra_bytes, pss() - self._base)


def pss() -> int:
    """Return the PSS of this process and all its children, in bytes."""
    total, pending = 0, [os.getpid()]
    while pending:
        pid = pending.pop()
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a child may end at any time
            total += _pss_of(pid)
            for path in Path(f"/proc/{pid}/task").glob("*/children"):
                pending += map(int, path.read_text().split())
    return total


def _pss_of(pid: int) -> int:
    found = re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0
