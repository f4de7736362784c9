"""Ranks that benchmarks start for themselves, or join."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from parallel.bench import Gate, Report, arguments
from parallel.ranks import RankError, device_of, spawn


def _sum(rank: int, world_size: int, factor: int) -> tuple[int, int, float]:
    x = torch.tensor(float(rank * factor), device=device_of("gloo"))
    dist.all_reduce(x)
    return rank, world_size, x.item()


def _fail(rank: int, world_size: int) -> None:
    if rank == 1:
        raise KeyError("at fault")
    dist.all_reduce(torch.zeros(1))


def _die(rank: int, world_size: int) -> None:
    if rank == 1:
        os._exit(7)
    dist.all_reduce(torch.zeros(1))


def test_ranks_are_started_and_their_results_returned_in_order() -> None:
    assert spawn(_sum, 3, "gloo", 10) == [(0, 3, 30.0), (1, 3, 30.0), (2, 3, 30.0)]


def test_the_rank_that_fails_first_is_told_first() -> None:
    with pytest.raises(RankError, match=r"^rank 1: Traceback(.*\n)*KeyError: 'at fault'"):
        spawn(_fail, 2, "gloo")
    with pytest.raises(RankError, match=r"rank 1: died with exit code 7"):
        spawn(_die, 2, "gloo")


_SCRIPT = """
from parallel.ranks import spawn
from tests.test_parallel.test_local_ranks import _sum
print(spawn(_sum, {asked}, "gloo", 10))
"""


def _torchrun(asked: int) -> tuple[int, str, str]:
    """Run one rank of a job of one, as torchrun starts it; torchrun itself would start a TCP store for the same."""
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT.format(asked=asked)],
        env=os.environ | {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stdout, done.stderr


def test_a_rank_of_a_torchrun_job_joins_it() -> None:
    assert _torchrun(1)[:2] == (0, "[(0, 1, 0.0)]\n")
    code, _, stderr = _torchrun(2)
    assert code == 1
    assert "this job has 1 ranks, asked for are 2; ask for 1" in stderr


def test_a_missed_gate_fails_a_benchmark_unless_it_is_a_speed(capsys: pytest.CaptureFixture[str]) -> None:
    options = arguments(None).parse_args([])
    report = Report("name", {})
    report.add("case", "time", "s", 1.0, 3.0, 2.0)
    report.gates.append(Gate("slow", 2.0, 1.0, ok=False, is_speed=True))
    assert report.median("case", "time") == 2.0
    assert report.finish(options) == 0
    report.gates.append(Gate("wrong", 1, 0, ok=False))
    assert report.finish(options) == 1
    printed = capsys.readouterr().out
    assert "case  time    2       1    3    s" in printed
    assert "MISSED wrong: 1, limit 0" in printed
