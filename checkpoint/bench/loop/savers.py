"""Ways to save a state from a training loop, behind one protocol: this package, its rivals, and the disk itself."""

from __future__ import annotations

import contextlib
import importlib.util
import mmap
import os
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

import torch

import checkpoint
from checkpoint import CheckpointConfig, Checkpointer

State = dict[str, torch.Tensor]

Durable = Callable[[], float | None]
"""Waits until a save is synced to disk and returns when it was, by `perf_counter`; None if nothing syncs it."""

_BLOCK_BYTES = 8 << 20


class Saver(Protocol):
    """One way to save."""

    def save(self, state: State) -> Durable:
        """Start a save of the tensors as they are now."""

    def fence(self) -> None:
        """Return when the tensors may be changed."""

    def close(self) -> None:
        """End what runs in the background; nothing is pending."""


class Raw:
    """The bound: as many bytes, written by a thread past the page cache where that is possible, and one fsync."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "raw"
        self._block = mmap.mmap(-1, _BLOCK_BYTES)  # page-aligned
        self._block.write(os.urandom(_BLOCK_BYTES))

    def save(self, state: State) -> Durable:
        nbytes = sum(tensor.nbytes for tensor in state.values())
        done: Future[float] = Future()
        threading.Thread(target=self._write, args=(nbytes, done), name="raw-writer", daemon=True).start()
        return done.result

    def fence(self) -> None:
        pass

    def close(self) -> None:
        self._path.unlink(missing_ok=True)

    def _write(self, nbytes: int, done: Future[float]) -> None:
        try:
            self._path.unlink(missing_ok=True)
            descriptor = self._open()
            for start in range(0, nbytes, _BLOCK_BYTES):
                size = min(_BLOCK_BYTES, nbytes - start)
                os.write(descriptor, memoryview(self._block)[: -(-size // 4096) * 4096])
            os.fsync(descriptor)
            os.close(descriptor)
        except BaseException as error:  # noqa: BLE001  carried to whoever waits
            done.set_exception(error)
        else:
            done.set_result(time.perf_counter())

    def _open(self) -> int:
        flags = os.O_WRONLY | os.O_CREAT
        try:
            return os.open(self._path, flags | os.O_DIRECT, 0o644)
        except OSError:  # a file system that has no direct I/O
            return os.open(self._path, flags, 0o644)


class WithCheckpoint:
    """This package; its retention keeps one checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.root = folder
        self._checkpointer = Checkpointer(folder, config=CheckpointConfig(keep_last=1))
        self._num_saves = 0

    def prepare(self, state: State) -> None:
        """Get the memory that saves of this state need, and pin it."""
        self._checkpointer.prepare(state)

    def save(self, state: State) -> Durable:
        called_s = time.perf_counter()
        self._num_saves += 1
        handle = self._checkpointer.save(self._num_saves, state)
        return lambda: called_s + handle.stats().durable_s

    def fence(self) -> None:
        self._checkpointer.fence()

    def close(self) -> None:
        self._checkpointer.close()

    def read(self, names: list[str]) -> Mapping[str, torch.Tensor]:
        """Return tensors of the newest checkpoint."""
        return checkpoint.read(self.root, names)


class WithTorch:
    """torch.save."""

    syncs = False

    def __init__(self, folder: Path) -> None:
        self._path = folder / "state.pt"

    def save(self, state: State) -> Durable:
        self._path.unlink(missing_ok=True)
        self._write(state)
        if not self.syncs:
            return lambda: None
        with open(self._path, "rb") as file:
            os.fsync(file.fileno())
        now_s = time.perf_counter()
        return lambda: now_s

    def _write(self, state: State) -> None:
        torch.save(state, self._path)

    def fence(self) -> None:
        pass

    def close(self) -> None:
        self._path.unlink(missing_ok=True)


class WithTorchSynced(WithTorch):
    """torch.save, then fsync."""

    syncs = True


class WithSafetensors(WithTorch):
    """safetensors.torch.save_file, which does not sync."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        if importlib.util.find_spec("safetensors") is None:
            raise ModuleNotFoundError("safetensors is not installed")

    def _write(self, state: State) -> None:
        from safetensors.torch import save_file

        save_file(state, self._path)


class WithDcp:
    """torch.distributed.checkpoint.save, which syncs its files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._num_saves = 0

    def save(self, state: State) -> Durable:
        from torch.distributed.checkpoint.state_dict_saver import save

        with quiet():
            save(dict(state), checkpoint_id=self._next())
        now_s = time.perf_counter()
        return lambda: now_s

    def fence(self) -> None:
        pass

    def close(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def _next(self) -> Path:
        """Return the place of the next save; keep one before it, as long as this one is not done."""
        self._num_saves += 1
        shutil.rmtree(self._folder / str(self._num_saves - 2), ignore_errors=True)
        return self._folder / str(self._num_saves)


class WithDcpThread(WithDcp):
    """torch.distributed.checkpoint.async_save, by thread; fence: what it says of its staging."""

    by_process = False
    pinned = False

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._resources = contextlib.ExitStack()
        if not torch.distributed.is_initialized():
            self._resources.enter_context(_process_group(folder / "store"))
        self._staged: Any = None
        self._last: Any = None
        self._stager = self._make_stager()

    def save(self, state: State) -> Durable:
        from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, async_save

        if self._last is not None:
            self._last.result()  # it sets no limit itself; two at a time need twice the memory
        kind = AsyncCheckpointerType.PROCESS if self.by_process else AsyncCheckpointerType.THREAD
        options = {"async_stager": self._stager} if self._stager else {}
        with quiet():
            found: Any = async_save(dict(state), checkpoint_id=self._next(), async_checkpointer_type=kind, **options)
        self._staged = getattr(found, "staging_completion", None)
        self._last = getattr(found, "upload_completion", found)
        done: Future[float] = Future()
        self._last.add_done_callback(lambda last: _pass_on(last, done))
        return done.result

    def fence(self) -> None:
        if self._staged is not None:
            self._staged.result()
            self._staged = None

    def close(self) -> None:
        if self._stager:
            self._stager.close()
        self._resources.close()
        super().close()

    def _make_stager(self) -> Any:
        if not self.pinned:
            return None
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        return DefaultStager(StagingOptions())  # pinned, shared, asynchronous


class WithDcpProcess(WithDcpThread):
    """torch.distributed.checkpoint.async_save, by process."""

    by_process = True


class WithDcpPinned(WithDcpThread):
    """torch.distributed.checkpoint.async_save, by process, staged asynchronously in pinned shared memory."""

    by_process = True
    pinned = True


SAVERS: Mapping[str, Callable[[Path], Saver]] = {
    "raw": Raw,
    "checkpoint": WithCheckpoint,
    "torch": WithTorch,
    "torch+fsync": WithTorchSynced,
    "safetensors": WithSafetensors,
    "dcp": WithDcp,
    "dcp-thread": WithDcpThread,
    "dcp-process": WithDcpProcess,
    "dcp-pinned": WithDcpPinned,
}


@contextlib.contextmanager
def _process_group(store: Path) -> Iterator[None]:
    """Have a group of one process, without which dcp does nothing in the background."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep a rival's warnings about its own choices off the output."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _pass_on(last: Any, done: Future[float]) -> None:
    error = last.exception()
    if error is None:
        done.set_result(time.perf_counter())
    else:
        done.set_exception(error)
