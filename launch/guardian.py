"""Ends process groups when their launcher is gone, however it went: `python -m launch.guardian`.

The launcher holds the other end of standard input and names groups on it, a line each: `+PGID` to guard,
`-PGID` to forget. At end of file whatever is still guarded is killed: also ranks that are stopped or stuck
with the GIL held, and processes that they started.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys


def main() -> None:
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


if __name__ == "__main__":
    main()
