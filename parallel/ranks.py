"""Run one function on several ranks: of processes started here, or of the torchrun job that this process is part of.

For benchmarks and the command line. A training job is started by its launcher, not by this.
"""

from __future__ import annotations

import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection, get_context
from multiprocessing.context import ForkServerProcess
from typing import Any, Literal

import torch
import torch.distributed as dist

Backend = Literal["gloo", "nccl"]
_GRACE_S = 3.0
"""Time that the others get to report an error of their own after a first rank failed."""


class RankError(RuntimeError):
    """A rank raised or died; the one that failed first, with its traceback."""


def spawn(
    fn: Callable[..., Any], num_ranks: int, backend: Backend, *args: Any, timeout_s: float = 600.0
) -> list[Any] | None:
    """Return `[fn(rank, world_size, *args) for every rank]`, run at once, each with the default group made.

    Where the variables of torchrun are set, this process is one rank of that job: `fn` runs here, `num_ranks` must be
    the job's, only rank 0 gets the list (the others get None), and the default group stays. Else `num_ranks` processes
    are started on this machine and ended before the call returns. `fn` is defined at the top of a module; `args` and
    results are pickled. With `nccl`, rank i of a host computes on its GPU i. CPU threads are shared evenly.

    Raises:
        RankError: a rank raised, died, or was not done after `timeout_s`.
        ValueError: the torchrun job has another number of ranks, or there are fewer GPUs than ranks.
    """
    if is_joined():
        return _join(fn, num_ranks, backend, args, timeout_s)
    if backend == "nccl" and torch.cuda.device_count() < num_ranks:
        raise ValueError(f"parallel: {num_ranks} ranks need a GPU each; there are {torch.cuda.device_count()}")
    context = get_context("forkserver")  # the server imports torch once, for all ranks
    context.set_forkserver_preload(["torch", "torch.distributed"])
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        processes: dict[connection.Connection, tuple[int, ForkServerProcess]] = {}
        try:
            for rank in range(num_ranks):
                ours, theirs = context.Pipe(duplex=False)
                job = _Job(rank, num_ranks, backend, f"file://{folder}/store", timeout_s)
                process = context.Process(target=_serve, args=(job, theirs, fn, args), daemon=True)
                process.start()
                theirs.close()
                processes[ours] = rank, process
            return _collect(processes, time.monotonic() + timeout_s)
        finally:
            for pipe, (_, process) in processes.items():
                pipe.close()
                process.kill()
                process.join()


def is_joined() -> bool:
    """Return whether this process is a rank of a torchrun job."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def device_of(backend: Backend) -> torch.device:
    """Return the device that this rank's tensors belong on."""
    return torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else torch.device("cpu")


@dataclass(frozen=True, slots=True)
class _Job:
    rank: int
    world_size: int
    backend: Backend
    store: str
    timeout_s: float


def _serve(job: _Job, pipe: connection.Connection, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Be one rank; deliver its value or its traceback."""
    try:
        os.environ.update(RANK=str(job.rank), WORLD_SIZE=str(job.world_size))
        os.environ.update(LOCAL_RANK=str(job.rank), LOCAL_WORLD_SIZE=str(job.world_size))
        _enter(job.backend, job.rank, job.world_size)
        dist.init_process_group(
            job.backend,
            init_method=job.store,
            rank=job.rank,
            world_size=job.world_size,
            timeout=timedelta(seconds=job.timeout_s),
            device_id=device_of(job.backend) if job.backend == "nccl" else None,
        )
        delivery = pickle.dumps((True, fn(job.rank, job.world_size, *args)))
        dist.barrier()  # nobody leaves while others still need it
    except BaseException:  # noqa: BLE001 - carried to spawn, which raises it there
        delivery = pickle.dumps((False, traceback.format_exc()))
        pipe.send_bytes(delivery)
        return
    pipe.send_bytes(delivery)
    dist.destroy_process_group()


def _join(
    fn: Callable[..., Any], num_ranks: int, backend: Backend, args: tuple[Any, ...], timeout_s: float
) -> list[Any] | None:
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if num_ranks != world_size:
        raise ValueError(f"parallel: this job has {world_size} ranks, asked for are {num_ranks}; ask for {world_size}")
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    _enter(backend, local_rank, int(os.environ.get("LOCAL_WORLD_SIZE", world_size)))
    if not dist.is_initialized():
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    found: list[Any] = [None] * world_size
    dist.all_gather_object(found, fn(rank, world_size, *args))
    return found if rank == 0 else None


def _enter(backend: Backend, local_rank: int, num_local_ranks: int) -> None:
    """Take this rank's share of the host."""
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // num_local_ranks))
    if backend == "nccl":
        torch.cuda.set_device(local_rank)


def _collect(processes: dict[connection.Connection, tuple[int, ForkServerProcess]], deadline_s: float) -> list[Any]:
    values: dict[int, Any] = {}
    failed: list[str] = []
    waiting = dict(processes)
    while waiting:
        ready = connection.wait(list(waiting), timeout=max(0.0, deadline_s - time.monotonic()))
        if not ready:
            ranks = ", ".join(str(rank) for rank, _ in waiting.values())
            failed.append(f"ranks {ranks} were not done in time")
            break
        for pipe in ready:
            assert isinstance(pipe, connection.Connection)
            rank, process = waiting.pop(pipe)
            try:
                succeeded, body = pickle.loads(pipe.recv_bytes())
            except EOFError:
                process.join()
                succeeded, body = False, f"died with exit code {process.exitcode}"
            if succeeded:
                values[rank] = body
                continue
            failed.append(f"rank {rank}: {body}")
            deadline_s = min(deadline_s, time.monotonic() + _GRACE_S)
    if failed:
        raise RankError("\n".join(failed))
    return [values[rank] for rank in sorted(values)]
