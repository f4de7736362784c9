"""Ends process groups when their launcher is gone, however it went: `python -m launch.guardian FOLDER`.

The launcher holds the other end of standard input and names groups on it, a line each: `+PGID` to guard,
`-PGID` to forget. At end of file whatever is still guarded is killed: also ranks that are stopped or stuck
with the GIL held, and processes that they started. Then FOLDER, where the launcher kept its notes, is removed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys


def main(folder: str) -> None:
    """Read names until the launcher closes the pipe or dies, then kill what is left."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    guarded: set[int] = set()
    for line in sys.stdin:
        group = int(line[1:])
        if line[0] == "+":
            guarded.add(group)
        else:
            guarded.discard(group)
    for group in guarded:
        with contextlib.suppress(ProcessLookupError):  # ended meanwhile
            os.killpg(group, signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)  # the launcher, if it is there, removes it too


if __name__ == "__main__":
    main(sys.argv[1])
