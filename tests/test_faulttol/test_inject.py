"""Scheduled faults strike where and when they should, and are on record when they did."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from faulttol.errors import InjectedFault
from faulttol.inject import Fault, Injector, fired

STEPPING_RANK = """
import sys
from pathlib import Path
from faulttol.inject import Fault, Injector
injector = Injector([Fault(kind=sys.argv[2], rank=0, step=2)], rank=0, record=Path(sys.argv[1]))
for step in range(4):
    injector.at(step)
    print(step, flush=True)
"""


def test_a_fault_strikes_its_rank_at_its_step_only(tmp_path: Path) -> None:
    schedule = [Fault(kind="raise", rank=1, step=2), Fault(kind="raise", rank=0, step=3)]
    injector = Injector(schedule, rank=1, record=tmp_path / "record")
    injector.at(0)
    injector.at(1)
    assert fired(tmp_path / "record") == []
    with pytest.raises(InjectedFault, match="step 2 of rank 1"):
        injector.at(2)
    injector.at(3)
    assert fired(tmp_path / "record") == [Fault(kind="raise", rank=1, step=2)]


@pytest.mark.parametrize("kind", ["kill", "freeze", "hang"])
def test_a_rank_goes_no_further_than_its_fault(tmp_path: Path, kind: str) -> None:
    record = tmp_path / "record"
    command = [sys.executable, "-c", STEPPING_RANK, str(record), kind]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as rank:
        assert rank.stdout is not None
        try:
            assert [rank.stdout.readline() for _ in range(2)] == ["0\n", "1\n"]
            if kind == "kill":
                assert rank.wait(20) == -signal.SIGKILL
            elif kind == "freeze":
                state = os.waitid(os.P_PID, rank.pid, os.WSTOPPED)
                assert state is not None
                assert state.si_status == signal.SIGSTOP
            else:
                with pytest.raises(subprocess.TimeoutExpired):
                    rank.wait(0.5)
        finally:
            rank.kill()
        assert rank.stdout.read() == ""
    assert [fault.kind for fault in fired(record)] == [kind]
