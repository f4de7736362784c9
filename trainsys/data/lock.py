"""One process at a time, on this machine and on any file system that honours flock."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from trainsys.data.errors import BusyError

_POLL_S = 0.1


@contextmanager
def exclusive(path: Path, *, stalled_after_s: float, progress: Callable[[], object]) -> Iterator[None]:
    """Holds the lock file `path`, after waiting for whoever holds it. A dead holder holds nothing.

    `progress()` is asked while waiting; as long as its answer keeps changing, the holder is alive.

    Raises:
        BusyError: the answer stayed the same for `stalled_after_s` seconds.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        seen, since = progress(), time.monotonic()
        while not _try_lock(descriptor):
            now = progress()
            if now != seen:
                seen, since = now, time.monotonic()
            elif time.monotonic() - since > stalled_after_s:
                holder = os.pread(descriptor, 200, 0).decode("utf-8", "replace").strip() or "an unknown process"
                raise BusyError(
                    f"{path}: {holder} prepares the same data, without progress for {stalled_after_s:.0f} s"
                )
            time.sleep(_POLL_S)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {os.uname().nodename}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
