"""Run one function on several ranks of a real process group, each rank in a process of its own.

Ranks are forked from a server that has already imported torch, so a test pays 0.2 s instead of the
seconds that fresh interpreters take. The server inherits the environment of its start: a variable set
later by `monkeypatch.setenv` does not reach the ranks; pass values as arguments.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing import connection, forkserver, get_context
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

GRACE_S = 3.0
"""Time the others get to fail by themselves after one rank failed."""
_EXIT_S = 20.0
"""Time a rank gets to exit when all is delivered, or to write its stacks and die when it is interrupted."""
_PRELOAD = ["torch", "torch.distributed", "numpy", "pytest", "tests.preload"]


class RankFailed(AssertionError):
    """One or more ranks raised, died or hung.

    `reports[rank]` is what is known of each failed rank: its traceback, or how it died and the stacks it
    stood in, then what it printed. The message has them all, the rank that failed first at the top.
    """

    def __init__(self, reports: dict[int, str]) -> None:
        super().__init__("\n".join(f"--- rank {rank} {report}" for rank, report in reports.items()))
        self.reports = reports


def run_ranks(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 60, backend: str = "gloo"
) -> list[Any]:
    """Return `[fn(rank, world_size, *args) for every rank]`, run at once, with the default group made.

    `fn` is defined at the top of a test module; `args` and results are pickled by value (a tensor is
    copied, never shared). Torch has one thread per rank. No rank outlives the call.

    Raises:
        RankFailed: a rank raised, died, was not done after `timeout_s`, or did not exit when it was done.
            After a first failure the others get `GRACE_S` to fail too, then are ended.
    """
    payload = pickle.dumps((fn, args))
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder, contextlib.ExitStack() as stack:
        ranks = []
        for rank in range(world_size):
            job = _Job(rank, world_size, payload, timeout_s, backend, folder)
            ranks.append(stack.enter_context(_Rank.start(job)))
        reports = _collect(ranks, deadline=time.monotonic() + timeout_s)
        reports.update(_release([rank for rank in ranks if rank.job.rank not in reports]))
        if reports:
            raise RankFailed(reports)
        return [rank.value for rank in ranks]


def warm_up() -> None:
    """Start the fork server, which imports torch in the background; later calls do nothing."""
    server_context()
    forkserver.ensure_running()


@dataclass(frozen=True, slots=True)
class _Job:
    """What a rank's process is told."""

    rank: int
    world_size: int
    payload: bytes
    timeout_s: float
    backend: str
    folder: str

    @property
    def stacks(self) -> Path:
        """File that receives the rank's stacks when it is interrupted."""
        return Path(self.folder, f"rank{self.rank}.stacks")

    @property
    def log(self) -> Path:
        """File that receives what the rank prints."""
        return Path(self.folder, f"rank{self.rank}.log")


@dataclass(slots=True)
class _Rank:
    """A rank as its starter sees it; leaving the `with` block ends its process."""

    job: _Job
    process: ForkServerProcess
    pipe: connection.Connection
    value: Any = field(default=None)

    @classmethod
    def start(cls, job: _Job) -> _Rank:
        """Fork the rank's process."""
        ours, theirs = server_context().Pipe()
        process = server_context().Process(target=_serve, args=(job, theirs), daemon=True)
        process.start()
        theirs.close()
        return cls(job, process, ours)

    def __enter__(self) -> _Rank:
        return self

    def __exit__(self, *_: object) -> None:
        self.pipe.close()
        if self.process.is_alive():
            self.process.kill()
        self.process.join()
        self.process.close()

    def receive(self) -> str | None:
        """Take the result from the pipe; return the report of a rank that raised or died, else None."""
        try:
            succeeded, body = pickle.loads(self.pipe.recv_bytes())
        except (EOFError, ConnectionResetError):
            self.process.join(_EXIT_S)
            return f"died ({self._exit()})\n{self._papers()}"
        if not succeeded:
            return f"raised\n{body}{self._papers()}"
        self.value = body
        return None

    def interrupt(self, why: str) -> str:
        """End the process, which writes its stacks; return the report."""
        if self.process.is_alive():
            assert self.process.pid is not None
            os.kill(self.process.pid, signal.SIGUSR1)
            self.process.join(_EXIT_S)
        return f"{why}\n{self._papers()}"

    def failed_exit(self) -> str | None:
        """Wait for the end of a rank that delivered its result; return the report of one that ended badly."""
        self.process.join(_EXIT_S)
        if self.process.is_alive():
            return self.interrupt("returned, but did not exit: a thread or the group's teardown is stuck")
        if self.process.exitcode != 0:
            return f"returned, then died on exit ({self._exit()})\n{self._papers()}"
        return None

    def _exit(self) -> str:
        code = self.process.exitcode
        return signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"

    def _papers(self) -> str:
        found = [(name, path) for name, path in (("stacks", self.job.stacks), ("printed", self.job.log))]
        texts = [(name, path.read_text(errors="replace")) for name, path in found if path.exists()]
        return "".join(f"{name}:\n{text[-8000:]}\n" for name, text in texts if text.strip())


def server_context() -> ForkServerContext:
    """Return what forks processes of tests, with what `tests.preload` imports."""
    context = get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    return context


def _collect(ranks: list[_Rank], deadline: float) -> dict[int, str]:
    """Receive every rank's result; return the reports of those that failed, in the order they did."""
    reports: dict[int, str] = {}
    waiting = {rank.pipe: rank for rank in ranks}
    while waiting:
        ready = connection.wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            why = "was still running when another rank had failed" if reports else "did not finish in time"
            stuck = {rank.job.rank: rank.interrupt(why) for rank in waiting.values()}
            return reports | stuck
        for pipe in ready:
            assert isinstance(pipe, connection.Connection)
            rank = waiting.pop(pipe)
            report = rank.receive()
            if report is not None:
                if not reports:
                    deadline = min(deadline, time.monotonic() + GRACE_S)
                reports[rank.job.rank] = report
    return reports


def _release(ranks: list[_Rank]) -> dict[int, str]:
    """Let ranks that delivered leave the group and exit; return the reports of those that could not."""
    for rank in ranks:
        with contextlib.suppress(BrokenPipeError):  # it died in between: its exit code tells
            rank.pipe.send_bytes(b"leave")
    reports = {rank.job.rank: rank.failed_exit() for rank in ranks}
    return {rank: report for rank, report in reports.items() if report is not None}


def _serve(job: _Job, pipe: connection.Connection) -> None:
    """Be one rank: run the function, deliver its value or traceback, leave when all have delivered."""
    # Both files stay open until the process is gone: a thread that hangs after the end is shown as well.
    stacks = os.open(job.stacks, os.O_WRONLY | os.O_CREAT)
    faulthandler.register(signal.SIGUSR1, file=stacks, chain=True)  # writes the stacks, then ends us
    faulthandler.dump_traceback_later(job.timeout_s + 60, exit=True, file=stacks)  # if our starter is gone
    _print_into(job.log)
    try:
        delivery = pickle.dumps((True, _call(job)))
    except BaseException:  # noqa: BLE001 - carried to run_ranks, which raises it there
        pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))
        return  # leaving at once breaks the connections that other ranks wait on
    pipe.send_bytes(delivery)
    with contextlib.suppress(EOFError, ConnectionResetError):  # the starter is gone: leave too
        pipe.recv_bytes()
    _leave_group()


def _print_into(log: Path) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(file, number)
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(os.fdopen(number, "wb", closefd=False), line_buffering=True) for number in (1, 2)
    )


def _call(job: _Job) -> Any:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)  # ranks share the machine's few cores
    os.environ.update(
        RANK=str(job.rank),
        WORLD_SIZE=str(job.world_size),
        LOCAL_RANK=str(job.rank),
        LOCAL_WORLD_SIZE=str(job.world_size),
    )
    dist.init_process_group(
        job.backend,
        init_method=f"file://{job.folder}/store",
        rank=job.rank,
        world_size=job.world_size,
        timeout=timedelta(seconds=job.timeout_s + GRACE_S),  # longer than ours: a hang shows its stacks
    )
    fn, args = pickle.loads(job.payload)
    return fn(job.rank, job.world_size, *args)


def _leave_group() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
