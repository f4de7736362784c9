"""A disk that fails, falls short or is the last thing its process saw, at any single operation of a save."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import pytest
import torch
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

import checkpoint
from checkpoint import CheckpointConfig, Checkpointer, local

Strike = Callable[[str, Callable[..., Any], tuple[Any, ...], Mapping[str, Any]], Any]
"""Takes the place of one operation: its name, itself, and its arguments."""


def fail(number: int) -> Strike:
    """The operation fails."""

    def strike(name: str, call: Callable[..., Any], args: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
        raise OSError(number, os.strerror(number))

    return strike


def fail_when_done(name: str, call: Callable[..., Any], args: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
    """The operation is done, but its answer is lost."""
    call(*args, **options)
    raise TimeoutError("no answer")


def fall_short(name: str, call: Callable[..., Any], args: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
    """A write takes less than it was given."""
    descriptor, data, *rest = args
    return call(descriptor, data[: max(1, len(data) // 2)], *rest)


def kill_before(name: str, call: Callable[..., Any], args: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
    """The process is gone before the operation."""
    os.kill(os.getpid(), signal.SIGKILL)


def kill_after(name: str, call: Callable[..., Any], args: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
    """The process is gone after the operation."""
    call(*args, **options)
    os.kill(os.getpid(), signal.SIGKILL)


class Disk:
    """Counts what is done to the disk, and strikes at the n-th operation. Leaving the block mends it."""

    operations: Sequence[tuple[Any, str]] = (
        *((os, name) for name in ("open", "write", "pwrite", "fsync", "rename", "link", "mkdir", "unlink", "rmdir")),
        (local, "_set_aside"),
    )

    def __init__(self, at: int = -1, strike: Strike = kill_before) -> None:
        self.names: list[str] = []
        """What was done so far."""
        self._at, self._strike = at, strike
        self._patch = pytest.MonkeyPatch()

    @property
    def has_struck(self) -> bool:
        return 0 <= self._at < len(self.names)

    def __enter__(self) -> Self:
        for place, name in self.operations:
            self._patch.setattr(place, name, self._counted(name, getattr(place, name)))
        return self

    def __exit__(self, *error: object) -> None:
        self._patch.undo()

    def _counted(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **options: Any) -> Any:
            index = len(self.names)
            self.names.append(name)
            if index == self._at:
                return self._strike(name, call, args, options)
            return call(*args, **options)

        return counted


class MemoryStore(Disk):
    """The same for fsspec's memory:// file system."""

    operations = (
        (MemoryFileSystem, "pipe_file"),
        (MemoryFileSystem, "_open"),
        (MemoryFileSystem, "rm"),
        (MemoryFile, "write"),
    )


@contextlib.contextmanager
def memory_folder() -> Iterator[Path]:
    """Yield a folder whose operations cost next to nothing, if there is such a place; nothing survives it."""
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=place) as folder:
        yield Path(folder)


def weights(step: int) -> dict[str, torch.Tensor]:
    """Return a state that tells its step everywhere, but for what never changes."""
    frozen = {"frozen": torch.arange(50_000.0)}
    return {f"w{i}": torch.full((20_000 + i,), float(step)) for i in range(4)} | frozen


def save_on(root: str | Path, step: int, **settings: Any) -> None:
    """Save one step and keep no other."""
    with Checkpointer(root, config=CheckpointConfig(keep_last=1, **settings)) as ck:
        ck.save(step, weights(step), shared={"step": step}).result(20)


def assert_whole(root: str | Path, steps: set[int] | None = None) -> int:
    """Assert that the newest checkpoint is bit for bit one save, of one of `steps`; return its step."""
    with Checkpointer(root) as ck:
        info = ck.latest("deep")
    assert info is not None
    found = checkpoint.read(info)
    expected = weights(info.step)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert info.shared == {"step": info.step}
    assert steps is None or info.step in steps
    return info.step


def operations(folder: Path, **settings: Any) -> list[str]:
    """Return what a second save, and the removal of the first, do to the disk; leaves step 1 in `folder`/one."""
    save_on(folder / "one", 1, **settings)
    again = copied(folder, "again")
    with Disk() as disk:
        save_on(again, 2, **settings)
    return disk.names


def copied(folder: Path, name: str) -> Path:
    """Return a copy of `folder`/one."""
    return Path(shutil.copytree(folder / "one", folder / name))


def grow_old(root: Path) -> None:
    """Let all that lies there be of another day: what is abandoned is known by its age."""
    for path in [root, *root.rglob("*")]:
        then_s = path.stat().st_mtime - 86_400
        os.utime(path, (then_s, then_s))
