"""Ranks of a benchmark as processes that are told what to do, and can be told to let go while they are stuck."""

from __future__ import annotations

import os
import pickle
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing import connection, get_context
from pathlib import Path
from typing import Any, Literal, Self

import torch
import torch.distributed as dist
from torch.distributed import FileStore, PrefixStore  # type: ignore[attr-defined]

from faulttol.abort import Connections, abort_devices, quiesce

Device = Literal["cpu", "cuda"]
CONNECTIONS = Connections()
"""Of this process's groups; empty in the benchmark's own."""


class RankError(RuntimeError):
    """A rank raised, died, or was not done in time."""


class Rank:
    """A process that runs functions one after the other; the `with` block ends it, however it is."""

    def __init__(self, device: Device, index: int) -> None:
        context = get_context("forkserver")  # the server imports torch once, for all ranks
        context.set_forkserver_preload(["torch", "torch.distributed"])
        self._pipe, theirs = context.Pipe()
        self._line, their_line = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, their_line, device, index), daemon=True)
        self.process.start()
        theirs.close()
        their_line.close()

    def tell(self, fn: Callable[..., Any], *args: Any) -> None:
        """Let it call `fn(*args)`; `fn` is at the top of a module."""
        self._pipe.send_bytes(pickle.dumps((fn, args)))

    def answer(self, timeout_s: float) -> Any:
        """Return what the last call returned.

        Raises: RankError with the traceback of what it raised, or when it died or was not done in time.
        """
        if not self._pipe.poll(timeout_s):
            raise RankError(f"process {self.process.pid}: not done after {timeout_s:g} s")
        try:
            done, value = pickle.loads(self._pipe.recv_bytes())
        except (EOFError, ConnectionResetError) as error:
            raise RankError(f"process {self.process.pid}: died") from error
        if not done:
            raise RankError(str(value))
        return value

    def let_go(self, timeout_s: float) -> float:
        """Break its collectives from a thread of its own; return the seconds that took."""
        self._line.send_bytes(b"let go")
        if not self._line.poll(timeout_s):
            raise RankError(f"process {self.process.pid}: did not let go in {timeout_s:g} s")
        return float(self._line.recv_bytes().decode())

    def signal(self, number: int) -> None:
        """Send it a signal, if it is still there."""
        assert self.process.pid is not None
        if self.process.is_alive():  # which collects it when it is not: the number is nobody else's yet
            os.kill(self.process.pid, number)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.join()
        self._pipe.close()
        self._line.close()


def together(ranks: Sequence[Rank], fn: Callable[..., Any], *args: Any, timeout_s: float) -> list[Any]:
    """Return `[fn(place, number of ranks, *args) for every rank]`, run at once."""
    deadline = time.monotonic() + timeout_s
    for place, rank in enumerate(ranks):
        rank.tell(fn, place, len(ranks), *args)
    pipes = {rank._pipe: rank for rank in ranks}
    answers: dict[int, Any] = {}
    while pipes:  # whoever fails is heard first, not the lowest that waits for him
        ready = connection.wait(list(pipes), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankError(f"{len(pipes)} of {len(ranks)} ranks were not done after {timeout_s:g} s")
        for pipe in ready:
            rank = pipes.pop(pipe)  # type: ignore[call-overload]
            answers[ranks.index(rank)] = rank.answer(1.0)
    return [answers[place] for place in range(len(ranks))]


def join(rank: int, world_size: int, store: str, device: Device, generation: int = 0, timeout_s: float = 120.0) -> None:
    """Make the default group."""
    kind = {"cpu": "gloo", "cuda": "nccl"}[device]
    with CONNECTIONS.recording():
        dist.init_process_group(
            kind,
            store=PrefixStore(f"generation{generation}", FileStore(f"{store}/store", -1)),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_s),
            device_id=torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else None,
        )


def leave() -> None:
    """Leave all groups after an error that broke them."""
    quiesce(None)
    CONNECTIONS.forget()


def store_folder() -> tempfile.TemporaryDirectory[str]:
    """Return a folder for a store and for rings, in memory where there is such a place."""
    shared = Path("/dev/shm")
    return tempfile.TemporaryDirectory(prefix="faulttol-", dir=shared if shared.is_dir() else None)


def _serve(pipe: connection.Connection, line: connection.Connection, device: Device, index: int) -> None:
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(index)
        torch.ones(1, device="cuda")  # makes the context
    threading.Thread(target=_listen, args=(line, device), daemon=True).start()
    while True:
        try:
            fn, args = pickle.loads(pipe.recv_bytes())
        except (EOFError, ConnectionResetError):
            return
        try:
            delivery = pickle.dumps((True, fn(*args)))
        except BaseException:  # noqa: BLE001 - carried to the caller, which raises it there
            delivery = pickle.dumps((False, traceback.format_exc()))
        pipe.send_bytes(delivery)


def _listen(line: connection.Connection, device: Device) -> None:
    """Break this process's collectives whenever that is asked for."""
    while True:
        try:
            line.recv_bytes()
        except (EOFError, ConnectionResetError, OSError):
            return
        begin = time.monotonic()
        if device == "cuda":
            abort_devices()
        else:
            CONNECTIONS.shut()
        line.send_bytes(str(time.monotonic() - begin).encode())
