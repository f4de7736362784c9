"""Ranks as processes of this machine."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_launch.client import Driver, noted_pids, runs, wait_for
from tests.test_launch.contract import GONE_S, LauncherContract, Request


@pytest.fixture(scope="module")
def driver() -> Iterator[Driver]:
    with Driver("local", {}) as driver:
        yield driver


class TestLocal(LauncherContract):
    """The contract, and what only local processes promise."""

    kind = "local"

    def test_signal_and_exit_code_are_in_the_error(self, driver: Driver, request_for: Request) -> None:
        fault = {"kind": "kill", "rank": 0, "step": 1}
        killed = driver.run(request_for("steps", {"num_steps": 3, "faults": [fault]}))
        assert (killed["signal"], killed["exit_code"]) == (signal.SIGKILL, None)
        assert "died: killed by SIGKILL (signal 9), at step 1 (forward)" in killed["text"]
        left = driver.run(request_for("leave", {"code": 5}))
        assert (left["signal"], left["exit_code"]) == (None, 5)

    def test_a_rank_that_never_joins_is_named(self, driver: Driver, request_for: Request) -> None:
        request = request_for("echo", {"word": ""}, start_timeout_s=0.001)
        end = driver.run(request)
        assert (end["event"], end["reason"]) == ("failed", "never joined"), end

    def test_a_process_that_does_not_end_after_its_entry_is_hung(self, driver: Driver, request_for: Request) -> None:
        end = driver.run(request_for("thread_left_behind", stop_grace_s=0.5))
        assert (end["event"], end["reason"]) == ("failed", "hung"), end
        assert "its entry returned, but its process has not ended" in end["text"]

    def test_nothing_but_the_driver_is_left_after_a_run(self, driver: Driver, request_for: Request) -> None:
        driver.run(request_for("echo", {"word": "hello"}))
        assert driver.children() == []

    @pytest.mark.parametrize("stopped", [False, True])
    def test_no_rank_outlives_a_launcher_that_is_killed(
        self, request_for: Request, tmp_path: Path, stopped: bool
    ) -> None:
        scratch = tmp_path / "scratch"
        scratch.mkdir()
        with Driver("local", {"TMPDIR": str(scratch)}) as driver:
            driver.submit(request_for("until_stopped", {"child": True, "deaf": True}))
            driver.until_output("ready")
            wait_for(lambda: len(noted_pids(tmp_path)) == 3, "ranks and child to be noted")
            if stopped:  # such a rank cannot notice anything itself
                os.kill(int((tmp_path / "rank0.pid").read_text()), signal.SIGSTOP)
            below = driver.kill()
            wait_for(lambda: not any(runs(process.pid) for process in below), "all to end", GONE_S)
            assert len(below) >= 4  # two ranks, a child, the guardian
        assert list(scratch.iterdir()) == []
