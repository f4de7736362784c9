"""Copies that do not get on until a test lets them: what makes a fence wait, and a missing one seen, every time."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

import torch

from checkpoint import Checkpointer


@contextlib.contextmanager
def stalled(ck: Checkpointer) -> Iterator[Callable[[], None]]:
    """Hold all staging memory of a Checkpointer that has saved before; yields what gives it back, done at the end."""
    arena = ck._saver._arena
    assert arena is not None
    held = []
    while (slot := arena.try_take()) is not None:
        held.append(slot)
    lock = threading.Lock()

    def release() -> None:
        with lock:
            while held:
                arena.give_back(held.pop())

    try:
        yield release
    finally:
        release()


def warm(ck: Checkpointer, tensors: dict[str, object]) -> None:
    """Let the Checkpointer get its staging memory for such tensors."""
    ck.prepare(tensors)  # type: ignore[arg-type]


def poke(tensor: torch.Tensor) -> None:
    """Write over a host tensor behind torch's back, as fused optimizers do."""
    tensor.detach().numpy()[...] = 77
