"""Who strikes the ranks of a measured job stops with it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

from trainsys.bench.recovery import _Striker


def test_a_job_that_is_given_up_is_struck_no_more(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as victim:
        notes = [("warm", -1), ("begun", 0), ("stepped", 0), ("stepped", 0)]
        lines = [{"what": what, "generation": generation, "rank": 0, "pid": victim.pid} for what, generation in notes]
        (tmp_path / "notes").write_text("".join(json.dumps(line) + "\n" for line in lines))
        striker = _Striker(tmp_path, 1, [(0, "SIGKILL"), (0, "SIGKILL")], lambda index: 1)
        assert victim.wait(60) == -signal.SIGKILL
        striker.end()
    striker.check()
    assert striker.victims == [victim.pid]
    assert (tmp_path / "over").exists()


def test_a_job_that_never_begins_is_not_struck(tmp_path: Path) -> None:
    striker = _Striker(tmp_path, 1, [(0, "SIGSTOP")], lambda index: 1)
    striker.end()
    striker.check()
    assert (striker.victims, striker.struck_s) == ([], [])
