"""This process's recorder: it hooks torch for the whole process, so there is one at most."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from faulttol.errors import RecorderError

if TYPE_CHECKING:
    from faulttol.recorder import Recorder

_LOG = logging.getLogger(__name__)


class _Process:
    recorder: Recorder | None = None
    lock = threading.Lock()


def _unlock_in_child() -> None:
    """Let a forked child install and uninstall: the thread that may have been at it is not there."""
    _Process.lock = threading.Lock()


os.register_at_fork(after_in_child=_unlock_in_child)


def install(
    directory: str | Path,
    *,
    rank: int | None = None,
    world_size: int | None = None,
    generation: int = 0,
    capacity: int = 8192,
    poll_s: float = 0.02,
    native: bool | None = None,
) -> Recorder:
    """Record every collective and message of this process into `directory`, one ring a rank; return the recorder.

    Before or after the process group is made, while no other thread is in a collective: torch puts kernels in under
    callers, whose call may raise. Nothing in the user's code changes. Put the directory in memory or on a
    local disk, and let all ranks of a machine share it. `rank` and `world_size` are the process group's, or those of
    torchrun, unless given. A job that formed its groups anew installs anew, with the next `generation`. A forked
    child records nothing unless it installs by itself. `capacity` records are kept (72 bytes each); ends that nobody
    waits for in Python are noticed when this process next begins something or sets a mark, or after `poll_s`.

    `native`: whether collectives on the CPU are recorded in C++, at a tenth of the price (`faulttol.compiled`). None:
    where `python -m faulttol build` was run for this torch; True builds it if need be, which takes half a minute.

    Raises: RecorderError when one is installed already, when the rank is not known, or when this torch lacks what is
    needed or, with `native`, a compiler; OSError when the ring cannot be made; ValueError for a number that cannot be.
    """
    from faulttol import compiled
    from faulttol.recorder import Recorder
    from faulttol.ring import Ring, ring_path

    if not poll_s > 0:
        raise ValueError(f"poll_s: {poll_s} is not above 0")
    with _Process.lock:
        if _Process.recorder is not None and _Process.recorder.is_inherited:
            _Process.recorder.close()
            _Process.recorder = None
        if _Process.recorder is not None:
            raise RecorderError(f"{_Process.recorder.ring.path}: is being recorded by this process; uninstall it first")
        rank, world_size = _place(rank, world_size)
        if native:
            compiled.build()
        library = None if native is False else compiled.load()
        if library is None and native is None:
            _LOG.info("collectives on the CPU are recorded from Python; python -m faulttol build makes that cheaper")
        path = ring_path(Path(directory), rank, generation)
        with contextlib.ExitStack() as undo:
            ring = Ring(path, rank=rank, world_size=world_size, generation=generation, capacity=capacity)
            undo.callback(ring.close)
            in_cpp = None if library is None else compiled.Compiled(library, ring)
            if in_cpp is not None:
                undo.callback(in_cpp.close)
            _Process.recorder = Recorder(ring, rank, poll_s, in_cpp)
            undo.pop_all()
        return _Process.recorder


def uninstall() -> None:
    """Take the recorder out of torch; its ring stays on disk. Does nothing where none is installed.

    No other thread may be in a collective meanwhile: torch takes its kernels out under callers, whose call may raise.
    """
    with _Process.lock:
        recorder, _Process.recorder = _Process.recorder, None
        if recorder is not None:
            recorder.close()


def mark_step(step: int, *, phase: str = "train", tokens: int | None = None) -> None:
    """Say that `step` begins, and with it ends the one before; `tokens`: this rank's share of its work.

    This and the other marks do nothing where no recorder is installed: a loop may always call them.
    """
    recorder = _Process.recorder
    if recorder is not None:
        recorder.mark_step(step, phase=phase, tokens=tokens)


def mark_step_end(*, loss: float | None = None, grad_norm: float | None = None, tokens: int | None = None) -> None:
    """Say that the step is over, and what came of it: numbers of the host, not tensors of a device."""
    recorder = _Process.recorder
    if recorder is not None:
        recorder.mark_step_end(loss=loss, grad_norm=grad_norm, tokens=tokens)


def mark_phase(phase: str) -> None:
    """Say that a phase of the step begins: `eval`, `checkpoint`, …; `mark_step` begins the next."""
    recorder = _Process.recorder
    if recorder is not None:
        recorder.mark_phase(phase)


def _place(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Return the rank and the world size as given, as the process group says, or as torchrun does."""
    if rank is None or world_size is None:
        import torch.distributed as dist

        if dist.is_available() and dist.is_initialized():
            rank = dist.get_rank() if rank is None else rank
            world_size = dist.get_world_size() if world_size is None else world_size
        elif "RANK" in os.environ and "WORLD_SIZE" in os.environ:
            rank = int(os.environ["RANK"]) if rank is None else rank
            world_size = int(os.environ["WORLD_SIZE"]) if world_size is None else world_size
        else:
            raise RecorderError("rank, world_size: neither given nor to be had: no process group, no RANK in sight")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank: {rank} is none of {world_size} ranks")
    return rank, world_size
