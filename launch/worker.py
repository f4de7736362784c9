"""One local rank: `python -m launch.worker DESCRIPTION CONTROL_FD`, started by `launch.local` alone.

DESCRIPTION is a JSON file. Over the control pipe come `stop` and `stacks`, a line each, and the orders of a job that
outlives its ranks as JSON; its end of file means that the launcher is gone, and this rank with all it started goes too.
"""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from faulttol import agent
from faulttol.recovery import Member
from launch import entry, orders, signals

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_AGAIN_S = 1.0


def main(description_path: str, control_fd: str) -> int:
    """Run the described entry and write its outcome; 0 if it returned, 1 if it raised."""
    faulthandler.enable()
    description = json.loads(Path(description_path).read_text())
    stop = threading.Event()
    member = _member(description)
    threading.Thread(target=_obey, args=(int(control_fd), stop, member), name="launch-control", daemon=True).start()
    entry.extend_path(description["sys_path"])
    leaving = contextlib.ExitStack()

    def joined() -> None:
        if member is not None:
            leaving.enter_context(agent.answering(Path(description["answers_path"])))

    with leaving, signals.caught(lambda number: stop.set()):
        outcome = entry.execute(
            description["entry"],
            description["payload"],
            heartbeat_path=Path(description["heartbeat_path"]),
            heartbeat_interval_s=description["heartbeat_interval_s"],
            stop=stop,
            joined=joined,
            member=member,
        )
    _publish(Path(description["outcome_path"]), entry.to_json(outcome))
    if isinstance(outcome, entry.Raised):
        sys.stderr.write(outcome.traceback)
        return 1
    return 0


def _member(description: dict[str, Any]) -> Member | None:
    """This process's side of recovery, where the job has it."""
    if "standing_path" not in description:
        return None
    path = Path(description["standing_path"])
    return Member(lambda standing: _publish(path, standing.to_json()), entry.described)


def _obey(control_fd: int, stop: threading.Event, member: Member | None) -> None:
    with open(control_fd, "rb") as control:
        for line in control:
            if line == b"stop\n":
                stop.set()
            elif line == b"stacks\n":
                faulthandler.dump_traceback(all_threads=True)
            elif member is not None:
                orders.obey(member, json.loads(line))
    # The launcher made this rank the leader of a group of its own.
    os.killpg(os.getpid(), signal.SIGKILL)


def _publish(path: Path, fields: dict[str, Any]) -> None:
    """Write a file that appears complete or not at all; on a full disk, once there is room."""
    unfinished = path.with_name(path.name + ".new")
    has_told = False
    while True:
        try:
            unfinished.write_text(json.dumps(fields))
            unfinished.rename(path)
            return
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            if not has_told:
                with contextlib.suppress(OSError):  # its log may be on that disk
                    sys.stderr.write(f"{path}: {error}; this rank goes on when there is room\n")
            has_told = True
            time.sleep(_AGAIN_S)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2]))
