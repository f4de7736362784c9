"""A rank that no launcher of ours started: under torchrun, or a plain process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from faulttol import read_heartbeat
from launch import RankContext
from tests.sources import ROOT

REDUCES = """
import os, sys
from pathlib import Path
import torch, torch.distributed as dist
from launch import RankContext
torch.set_num_threads(1)
with RankContext.open(os.environ) as context:
    for _ in range(2):
        context.init_process_group("gloo", timeout_s=60)
        value = torch.tensor(float(context.env.rank + 1))
        dist.all_reduce(value)
        context.close()
    Path(sys.argv[1], str(context.env.rank)).write_text(str(value.item()))
"""
STOPPED = """
import os, sys, time
from launch import RankContext
with RankContext.open(os.environ) as context:
    print("ready", flush=True)
    while not context.stop_requested():
        time.sleep(0.01)
    print("saved", flush=True)
"""
FORKS = """
import os, signal, sys, time
from launch import RankContext
with RankContext.open(os.environ) as context:
    pid = os.fork()
    if pid == 0:
        print("ready", flush=True)
        while True:
            time.sleep(1)
    os.kill(pid, signal.SIGTERM) if sys.stdin.readline() else None
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM
    assert not context.stop_requested()
"""


def test_a_plain_process_is_a_single_rank_that_can_use_collectives() -> None:
    with RankContext.open({}) as context:
        assert context.env.world_size == 1
        context.init_process_group("gloo", timeout_s=20)
        value = torch.tensor([3.0])
        dist.all_reduce(value)
        assert value.item() == 3.0
    assert not dist.is_initialized()


def test_the_heartbeat_is_written_while_the_context_is_open() -> None:
    with RankContext.open({}) as context:
        context.heartbeat.beat(step=2, phase="forward")
        path = context.heartbeat.path
        assert read_heartbeat(path).step == 2
    assert not path.exists()


def test_an_entry_may_leave_its_group_by_itself() -> None:
    with RankContext.open({}) as context:
        context.init_process_group("gloo", timeout_s=20)
        dist.destroy_process_group()


def test_no_stop_is_requested_unasked_and_handlers_are_restored() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with RankContext.open({}) as context:
        assert not context.stop_requested()
        assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] != before
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_becomes_a_request_to_stop(number: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", STOPPED], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.stdout.readline() == "saved\n"
    assert process.returncode == 0


def test_a_forked_child_ends_at_a_signal_as_if_there_were_no_handler() -> None:
    process = subprocess.Popen([sys.executable, "-c", FORKS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.stdin.write("kill\n")
        process.stdin.close()
    assert process.returncode == 0


def test_half_of_the_variables_is_an_error() -> None:
    with pytest.raises(ValueError, match="MASTER_ADDR"), RankContext.open({"RANK": "0", "WORLD_SIZE": "2"}):
        pass


@pytest.mark.slow
def test_ranks_of_torchrun_find_each_other_twice(tmp_path: Path) -> None:
    script = tmp_path / "main.py"
    script.write_text(REDUCES)
    done = subprocess.run(
        [
            sys.executable,
            *("-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"),
            *("--rdzv-endpoint=127.0.0.1:0", str(script), str(tmp_path)),
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=120,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["3.0", "3.0"]
