"""Save and load at the disk's own rate, digests included.

Claim: from the call of `save` to the commit a save takes hardly longer than writing the same bytes to the disk in
the best way there is, and a load hardly longer than reading them so.

Baselines: `torch.save` followed by fsync, and `torch.load`; safetensors, with an fsync added, and its load;
`torch.distributed.checkpoint` in one process (its writer syncs its files by default). One process, one state. The
savers take turns in every repeat, after a first turn that is not counted; each keeps one checkpoint and removes the
one before when the time has been taken, so that all of them find the page cache and the disk alike.

- `save`: seconds from the call until the bytes are on disk; for this package also `blocked`, the part of it that
  is kept from the caller.
- `load`: seconds to fill existing tensors. The files' pages are dropped from the cache before (posix_fadvise), as
  far as the kernel does so on request: the bounds tell.
  This package's are of fresh tensors, as a run that resumes has them; `in place` stands for destinations that must
  not be touched before all is verified, for which everything is held in memory until then.
- bounds, from the same turns: one file of as many bytes, written in 8 MiB pieces and synced once, read back in
  16 MiB pieces (`raw`); the same past the page cache, by as many threads as this package has (`raw direct`).

rate = state bytes / seconds. The gates compare with the faster of the two bounds within each turn, and take the
median of the ratios.
"""

from __future__ import annotations

import argparse
import contextlib
import mmap
import os
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, Protocol

import torch

from checkpoint import CheckpointConfig, Checkpointer
from checkpoint.bench import Bound, Gate, Report, arguments

_MIB = 1 << 20
_BLOCK = 8 * _MIB

State = dict[str, torch.Tensor]


class Saver(Protocol):
    """One way to save and load a state."""

    name: str
    folder: Path
    """Its own."""

    def save(self, state: State, turn: int) -> float:
        """Save, durable when this returns; return the seconds that a training loop would have waited."""

    def load(self, found: State, turn: int) -> None:
        """Fill the tensors with what was saved in this turn."""

    def tidy(self, turn: int) -> None:
        """Remove what was saved in the turn before; nothing in the folder changes once this has returned."""

    def close(self) -> None:
        """End what runs in the background."""


def main() -> int:
    """Run the benchmark; return 1 if a saver did not give back what it was given."""
    parser = arguments(__doc__)
    parser.add_argument("--mib", type=int, default=1024, help="size of the state (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="on the disk to be measured (default: the temporary folder)")
    options = parser.parse_args()
    mib, repeats = (8, 1) if options.smoke else (options.mib, options.repeats)
    if mib < 1 or repeats < 1:
        parser.error("--mib and --repeats: at least 1")
    report, wrong = run(mib, repeats, options)
    report.show()
    if options.json:
        report.write(options.json)
    return int(wrong > 0)


def run(mib: int, repeats: int, options: argparse.Namespace) -> tuple[Report, int]:
    """Return the results, and how many loads were not what had been saved."""
    state = make_state(mib * _MIB)
    nbytes = sum(tensor.nbytes for tensor in state.values())
    report = Report(
        "checkpoint.bandwidth",
        {"state_bytes": nbytes, "tensors": len(state), "repeats": repeats, "threads": torch.get_num_threads()},
    )
    with (
        tempfile.TemporaryDirectory(dir=options.folder, prefix="bandwidth-") as folder,
        contextlib.ExitStack() as stack,
    ):
        savers: list[Saver] = [
            Raw(folder),
            RawDirect(folder),
            WithTorch(folder),
            WithSafetensors(folder),
            WithDcp(folder),
            WithCheckpoint(folder, "checkpoint"),
            WithCheckpoint(folder, "checkpoint process", writer="process"),
            WithCheckpoint(folder, "checkpoint in place", fresh=False),
        ]
        for saver in savers:
            stack.callback(saver.close)
        wrong = measure(report, savers, state, repeats)
    judge(report, nbytes, wrong)
    return report, wrong


def make_state(nbytes: int) -> State:
    """Return parameters and two moments of random values, in matrices of up to 16 MiB and small vectors."""
    generator = torch.Generator().manual_seed(0)
    state: State = {}
    left = nbytes // 4
    layer = 0
    while left > 0:
        for kind in ("parameter", "exp_avg", "exp_avg_sq"):
            numel = min(max(left, 1), 4 * _MIB - layer % 7)
            state[f"{kind}.{layer}.weight"] = torch.randn(numel, generator=generator)
            state[f"{kind}.{layer}.bias"] = torch.randn(1024, generator=generator)
            left -= numel + 1024
        layer += 1
    return state


def measure(report: Report, savers: Sequence[Saver], state: State, repeats: int) -> int:
    """Let the savers take turns; return how many loads were not what had been saved."""
    found = {name: torch.empty_like(tensor) for name, tensor in state.items()}
    wrong = 0
    for turn in range(repeats + 1):
        for saver in savers:
            seconds = {}
            begun_s = time.perf_counter()
            seconds["blocked"] = saver.save(state, turn)
            seconds["save"] = time.perf_counter() - begun_s
            saver.tidy(turn)
            for tensor in found.values():
                tensor.zero_()
            _drop_pages(saver.folder)
            begun_s = time.perf_counter()
            saver.load(found, turn)
            seconds["load"] = time.perf_counter() - begun_s
            if not isinstance(saver, Raw | RawDirect):
                wrong += not all(torch.equal(found[name], tensor) for name, tensor in state.items())
            if turn:
                for metric, value in seconds.items():
                    report.add(saver.name, metric, "s", value)
    return wrong


class _InFolder:
    """A saver with files of its own and nothing in the background."""

    name: str

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder, self.name)
        self.folder.mkdir()

    def tidy(self, turn: int) -> None:
        path = self.folder / str(turn - 1)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def close(self) -> None:
        pass


class Raw(_InFolder):
    """A bound: the bytes in one file, without structure or digest."""

    name = "raw"

    def __init__(self, folder: str) -> None:
        super().__init__(folder)
        self._buffer = memoryview(bytearray(16 * _MIB))

    def save(self, state: State, turn: int) -> float:
        begun_s = time.perf_counter()
        descriptor = os.open(self.folder / str(turn), os.O_WRONLY | os.O_CREAT, 0o644)
        for tensor in state.values():
            data = memoryview(tensor.numpy().data).cast("B")
            for start in range(0, data.nbytes, _BLOCK):
                os.write(descriptor, data[start : start + _BLOCK])
        os.fsync(descriptor)
        os.close(descriptor)
        return time.perf_counter() - begun_s

    def load(self, found: State, turn: int) -> None:
        descriptor = os.open(self.folder / str(turn), os.O_RDONLY)
        while os.readv(descriptor, [self._buffer]):
            pass
        os.close(descriptor)


class RawDirect(_InFolder):
    """A bound: as many bytes past the page cache where the file system can, by several threads."""

    name = "raw direct"

    def __init__(self, folder: str) -> None:
        super().__init__(folder)
        self._blocks = [memoryview(mmap.mmap(-1, _BLOCK)) for _ in range(4)]  # page-aligned
        for block in self._blocks:
            block[:] = os.urandom(_BLOCK)

    def save(self, state: State, turn: int) -> float:
        begun_s = time.perf_counter()
        nbytes = sum(tensor.nbytes for tensor in state.values()) // _BLOCK * _BLOCK or _BLOCK
        descriptor = _open_direct(self.folder / str(turn), os.O_WRONLY | os.O_CREAT)
        os.posix_fallocate(descriptor, 0, nbytes)
        self._each(self._blocks[:2], nbytes, lambda block, start: os.pwrite(descriptor, block, start))
        os.fsync(descriptor)
        os.close(descriptor)
        return time.perf_counter() - begun_s

    def load(self, found: State, turn: int) -> None:
        descriptor = _open_direct(self.folder / str(turn), os.O_RDONLY)
        nbytes = os.fstat(descriptor).st_size
        self._each(self._blocks, nbytes, lambda block, start: os.preadv(descriptor, [block], start))
        os.close(descriptor)

    @staticmethod
    def _each(blocks: Sequence[memoryview], nbytes: int, move: Callable[[memoryview, int], int]) -> None:
        """Move the file block by block, in one thread for each memory."""

        def work(index: int) -> None:
            for start in range(index * _BLOCK, nbytes, len(blocks) * _BLOCK):
                if move(blocks[index], start) != _BLOCK:
                    raise OSError("a raw block was moved in part only")

        with ThreadPoolExecutor(len(blocks)) as pool:
            list(pool.map(work, range(len(blocks))))


class WithTorch(_InFolder):
    """torch.save, then fsync; torch.load, then copies into the destinations."""

    name = "torch"

    def save(self, state: State, turn: int) -> float:
        begun_s = time.perf_counter()
        with open(self.folder / str(turn), "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        return time.perf_counter() - begun_s

    def load(self, found: State, turn: int) -> None:
        for name, tensor in torch.load(self.folder / str(turn), weights_only=True).items():
            found[name].copy_(tensor)


class WithSafetensors(_InFolder):
    """safetensors' save_file, then fsync; load_file, then copies into the destinations."""

    name = "safetensors"

    def save(self, state: State, turn: int) -> float:
        from safetensors.torch import save_file

        begun_s = time.perf_counter()
        save_file(state, self.folder / str(turn))
        with open(self.folder / str(turn), "rb") as file:
            os.fsync(file.fileno())
        return time.perf_counter() - begun_s

    def load(self, found: State, turn: int) -> None:
        from safetensors.torch import load_file

        for name, tensor in load_file(self.folder / str(turn)).items():
            found[name].copy_(tensor)


class WithDcp(_InFolder):
    """torch.distributed.checkpoint."""

    name = "dcp"

    def save(self, state: State, turn: int) -> float:
        from torch.distributed.checkpoint.state_dict_saver import save

        begun_s = time.perf_counter()
        with _one_process():
            save(dict(state), checkpoint_id=self.folder / str(turn), no_dist=True)
        return time.perf_counter() - begun_s

    def load(self, found: State, turn: int) -> None:
        from torch.distributed.checkpoint.state_dict_loader import load

        with _one_process():
            load(dict(found), checkpoint_id=self.folder / str(turn), no_dist=True)


class WithCheckpoint:
    """This package; its retention removes the checkpoint before."""

    def __init__(
        self, folder: str, name: str, *, writer: Literal["thread", "process"] = "thread", fresh: bool = True
    ) -> None:
        self.name = name
        self._fresh = fresh
        self.folder = Path(folder, self.name)
        self._checkpointer = Checkpointer(self.folder, config=CheckpointConfig(keep_last=1, writer=writer))

    def save(self, state: State, turn: int) -> float:
        handle = self._checkpointer.save(turn, state)
        handle.result()
        return handle.stats().blocked_s

    def load(self, found: State, turn: int) -> None:
        info = self._checkpointer.latest()
        assert info is not None
        self._checkpointer.load(info, found, fresh=self._fresh)

    def tidy(self, turn: int) -> None:
        while len(list(self.folder.iterdir())) > 1:
            time.sleep(0.001)

    def close(self) -> None:
        self._checkpointer.close()


def judge(report: Report, nbytes: int, wrong: int) -> None:
    """Add rates, bounds and gates."""
    samples = {(case, metric): values for (case, metric, _), values in report.samples.items()}
    for raw in ("raw", "raw direct"):
        del report.samples[raw, "blocked", "s"]
    for (case, metric), values in samples.items():
        for seconds in values:
            if metric != "blocked":
                report.add(case, f"{metric} rate", "GB/s", nbytes / seconds / 1e9)
    hows = {
        ("raw", "save"): "written in 8 MiB pieces, one fsync",
        ("raw direct", "save"): "written past the page cache by 2 threads, one fsync",
        ("raw", "load"): "read in 16 MiB pieces",
        ("raw direct", "load"): "read past the page cache by 4 threads",
    }
    for (case, metric), how in hows.items():
        rate = nbytes / statistics.median(samples[case, metric]) / 1e9
        report.bounds.append(Bound(metric, rate, "GB/s", how))
    for case in ("checkpoint", "checkpoint process", "checkpoint in place"):
        for metric, limit in (("save", 1.15), ("load", 1.25)):
            turns = zip(samples[case, metric], samples["raw", metric], samples["raw direct", metric], strict=True)
            ratio = statistics.median(ours / min(bounds) for ours, *bounds in turns)
            report.gates.append(Gate(f"{case}: {metric} time over the faster bound", ratio, limit, ratio <= limit))
    report.gates.append(Gate("loads that differ from what was saved", wrong, 0, wrong == 0))


def _open_direct(path: Path, flags: int) -> int:
    try:
        return os.open(path, flags | os.O_DIRECT, 0o644)
    except OSError:  # a file system that has no direct I/O
        return os.open(path, flags, 0o644)


@contextlib.contextmanager
def _one_process() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # on purpose
        yield


def _drop_pages(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


if __name__ == "__main__":
    sys.exit(main())
