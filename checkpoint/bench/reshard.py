"""Load what one number of ranks saved on another: 1, 4, 3, 2 and 1 again.

Claim: a load costs what reading the bytes that each rank needs costs; it reads a tenth more than these at most, and
there is nothing to convert.

Baseline: `torch.distributed.checkpoint`, the same reshard of the same DTensors (sharded by rows) by the same ranks,
which are processes with a gloo group. The two take turns, after a first turn that is not counted. Every load starts
from a dropped page cache (posix_fadvise), as far as the kernel does so on request, and into fresh tensors.

- `load`: seconds from a barrier to the barrier after it, all ranks loading; `save` likewise.
- `read`: bytes that all ranks together asked the system for meanwhile, slice tables and records included, over the
  bytes they needed. `counted`: the bytes of tensors alone, by this package's own count.
- `in place` stands for destinations that must not be touched before all is verified; the others take each chunk as soon
  as that one is, as a run that resumes has them.
- bound: the files of the checkpoint, read by one rank in 8 MiB pieces, by two threads.

The gates compare with the bound within a turn and take the median of the ratios.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from checkpoint import Checkpointer
from checkpoint.bench import Bound, Gate, Report, arguments

_MIB = 1 << 20
_WORLDS = (1, 4, 3, 2, 1)
_BLOCK = 8 * _MIB
_OURS, _IN_PLACE = "checkpoint", "checkpoint in place"

State = dict[str, Any]
"""DTensors by name."""


class Saver(Protocol):
    """One way to save and load what is spread over the ranks of a group."""

    name: str

    def save(self, folder: Path, state: State, mesh: DeviceMesh) -> None:
        """Save; durable on all ranks when it has returned on all."""

    def load(self, folder: Path, found: State, mesh: DeviceMesh) -> int:
        """Fill the tensors; return the bytes that this rank read, as it counts them itself, or 0."""


class WithCheckpoint:
    """This package."""

    def __init__(self, name: str, *, fresh: bool) -> None:
        self.name = name
        self._fresh = fresh

    def save(self, folder: Path, state: State, mesh: DeviceMesh) -> None:
        with self._open(folder, mesh) as ck:
            ck.save(1, state).result()

    def load(self, folder: Path, found: State, mesh: DeviceMesh) -> int:
        with self._open(folder, mesh) as ck:
            info = ck.latest()
            assert info is not None
            loaded = ck.load(info, found, fresh=self._fresh)
            return loaded.read_bytes + loaded.reread_bytes

    def _open(self, folder: Path, mesh: DeviceMesh) -> Checkpointer:
        return Checkpointer(folder, rank=mesh.get_rank(), world_size=mesh.size(), run_id="bench")


class WithDcp:
    """torch.distributed.checkpoint."""

    name = "dcp"

    def save(self, folder: Path, state: State, mesh: DeviceMesh) -> None:
        from torch.distributed.checkpoint.state_dict_saver import save

        save(dict(state), checkpoint_id=folder, process_group=mesh.get_group())

    def load(self, folder: Path, found: State, mesh: DeviceMesh) -> int:
        from torch.distributed.checkpoint.state_dict_loader import load

        load(dict(found), checkpoint_id=folder, process_group=mesh.get_group())
        return 0


@dataclass(frozen=True, slots=True)
class Sample:
    """What one rank saw of one load."""

    saver: str
    turn: int
    path: str
    """Such as `4 to 3 ranks`."""
    save_s: float
    load_s: float
    bound_s: float
    needed: int
    asked: int
    counted: int
    wrong: int
    """Tensors that are not what was saved."""


def main() -> int:
    """Run the benchmark; return 1 if a load did not bring what had been saved."""
    parser = arguments(__doc__)
    parser.add_argument("--mib", type=int, default=512, help="size of the state (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="on the disk to be measured (default: the temporary folder)")
    options = parser.parse_args()
    mib, repeats = (8, 1) if options.smoke else (options.mib, options.repeats)
    if mib < 1 or repeats < 1:
        parser.error("--mib and --repeats: at least 1")
    report = Report("checkpoint.reshard", {"state_bytes": mib * _MIB, "worlds": list(_WORLDS), "repeats": repeats})
    wrong = run(report, mib, repeats, options)
    report.show()
    if options.json:
        report.write(options.json)
    return int(wrong > 0)


def run(report: Report, mib: int, repeats: int, options: argparse.Namespace) -> int:
    """Fill the report from what the ranks saw; return how many tensors were wrong."""
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="reshard-") as folder:
        num_ranks = max(_WORLDS)
        spawn = multiprocessing.get_context("spawn")
        ranks = [
            spawn.Process(target=rank_main, args=(i, num_ranks, Path(folder), mib, repeats)) for i in range(num_ranks)
        ]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
        if any(rank.exitcode for rank in ranks):
            raise RuntimeError(f"ranks ended with {[rank.exitcode for rank in ranks]}; their errors are above")
        texts = [Path(folder, f"{rank}.json").read_text() for rank in range(num_ranks)]
    samples = [Sample(**sample) for text in texts for sample in json.loads(text)]
    seconds: dict[tuple[str, str, int], tuple[float, float]] = {}
    bytes_of: dict[tuple[str, str, int], tuple[int, int, int]] = {}
    for sample in samples:
        key = (sample.saver, sample.path, sample.turn)
        seconds[key] = (
            max(sample.load_s, seconds.get(key, (0, 0))[0]),
            max(sample.bound_s, seconds.get(key, (0, 0))[1]),
        )
        asked, counted, needed = bytes_of.get(key, (0, 0, 0))
        bytes_of[key] = (asked + sample.asked, counted + sample.counted, needed + sample.needed)
        if sample.save_s and sample.turn:
            report.add(f"{sample.saver}, {sample.path}", "save", "s", sample.save_s)
    for (saver, path, turn), (load_s, _) in seconds.items():
        if turn:
            asked, counted, needed = bytes_of[saver, path, turn]
            report.add(f"{saver}, {path}", "load", "s", load_s)
            report.add(f"{saver}, {path}", "read", "of the needed bytes", asked / needed)
            if counted:
                report.add(f"{saver}, {path}", "counted", "of the needed bytes", counted / needed)
    wrong = sum(sample.wrong for sample in samples)
    judge(report, seconds, {key: asked / needed for key, (asked, _, needed) in bytes_of.items()}, mib, wrong)
    return wrong


def judge(
    report: Report,
    seconds: Mapping[tuple[str, str, int], tuple[float, float]],
    read: Mapping[tuple[str, str, int], float],
    mib: int,
    wrong: int,
) -> None:
    """Add bounds and gates."""
    ours = [key for key in seconds if key[0] == _OURS and key[2]]
    rate = statistics.median(mib * _MIB / seconds[key][1] for key in ours) / 1e9
    report.bounds.append(Bound("load", rate, "GB/s", "the files, read in 8 MiB pieces by 2 threads"))
    over = statistics.median(seconds[key][0] / seconds[key][1] for key in ours)
    rival = statistics.median(seconds[key][0] / seconds[WithDcp.name, key[1], key[2]][0] for key in ours)
    most = max(ratio for key, ratio in read.items() if key[0] in (_OURS, _IN_PLACE) and key[2])
    report.gates.append(Gate("load time over the bound", over, 1.25, over <= 1.25))
    report.gates.append(Gate("load time over that of dcp", rival, 1, rival <= 1))
    report.gates.append(Gate("bytes read over bytes needed, at most", most, 1.1, most <= 1.1))
    report.gates.append(Gate("tensors that differ from what was saved", wrong, 0, wrong == 0))


def rank_main(rank: int, num_ranks: int, folder: Path, mib: int, repeats: int) -> None:
    """Be one rank; leave what it saw in a file."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")  # the rival's own deprecations, in every rank
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", store, rank=rank, world_size=num_ranks, timeout=timedelta(minutes=5))
    meshes = {size: DeviceMesh("cpu", list(range(size))) for size in sorted(set(_WORLDS))}
    samples: list[Sample] = []
    savers: list[Saver] = [WithCheckpoint(_OURS, fresh=True), WithDcp(), WithCheckpoint(_IN_PLACE, fresh=False)]
    for turn in range(repeats + 1):
        for old, new in itertools.pairwise(_WORLDS):
            for saver in savers:
                place = folder / saver.name
                sample = reshard(saver, place, (meshes[old], meshes[new]), rank, mib, turn)
                samples += [sample] if sample else []
                if rank == 0:
                    shutil.rmtree(place)
                dist.barrier()
    (folder / f"{rank}.json").write_text(json.dumps([asdict(sample) for sample in samples]))
    dist.destroy_process_group()


def reshard(
    saver: Saver, folder: Path, meshes: tuple[DeviceMesh, DeviceMesh], rank: int, mib: int, turn: int
) -> Sample | None:
    """Save with the ranks of one mesh, load with those of another; return what this rank saw of the load."""
    old, new = meshes
    save_s = save(saver, folder, old, rank, mib)
    found = make_state(mib, new, filled=False) if rank < new.size() else {}
    bound_s = _read_all(folder) if rank == 0 else 0.0
    with _dropped(folder, rank):
        before = _asked()
        load_s, counted = timed(lambda: saver.load(folder, found, new) if rank < new.size() else None)
        asked = _asked() - before
    if rank >= new.size():
        return None
    expected = make_state(mib, new, filled=True)
    wrong = sum(not torch.equal(found[name].to_local(), expected[name].to_local()) for name in expected)
    needed = sum(tensor.to_local().nbytes for tensor in found.values())
    path = f"{old.size()} to {new.size()} ranks"
    return Sample(
        saver.name, turn, path, save_s if rank == 0 else 0.0, load_s, bound_s, needed, asked, counted or 0, wrong
    )


def save(saver: Saver, folder: Path, mesh: DeviceMesh, rank: int, mib: int) -> float:
    """Save with the ranks of a mesh; return the seconds it took."""
    state = make_state(mib, mesh, filled=True) if rank < mesh.size() else {}
    return timed(lambda: saver.save(folder, state, mesh) if rank < mesh.size() else None)[0]


def timed(run: Callable[[], int | None]) -> tuple[float, int | None]:
    """Return the seconds until `run` has returned on all ranks, and what it returned here."""
    dist.barrier()
    begun_s = time.perf_counter()
    result = run()
    dist.barrier()
    return time.perf_counter() - begun_s, result


def make_state(mib: int, mesh: DeviceMesh, *, filled: bool) -> State:
    """Return parameters and two moments as DTensors sharded by rows: matrices of up to 16 MiB."""
    from torch.distributed.tensor import DTensor, Shard

    rows = 1021  # divides by none of the worlds
    columns = max(1, min(16, mib // 3) * _MIB // 4 // rows)
    state: State = {}
    for layer in range(max(1, mib // 48)):
        for index, kind in enumerate(("parameter", "exp_avg", "exp_avg_sq")):
            per_rank = -(-rows // mesh.size())
            start, stop = (min(rows, per_rank * (mesh.get_rank() + i)) for i in (0, 1))
            local = torch.full((stop - start, columns), -1, dtype=torch.int32)
            if filled:
                torch.arange(start * columns + index, stop * columns + index, out=local.view(-1))
            state[f"{kind}.{layer}"] = DTensor.from_local(
                local, mesh, [Shard(0)], run_check=False, shape=torch.Size((rows, columns)), stride=(columns, 1)
            )
    return state


@contextlib.contextmanager
def _dropped(folder: Path, rank: int) -> Iterator[None]:
    """Drop the pages of the folder's files from the cache, once for all ranks."""
    if rank == 0:
        for path in _files(folder):
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
    dist.barrier()
    yield


def _read_all(folder: Path) -> float:
    """Return the seconds that reading all files takes, from a dropped cache."""
    files = _files(folder)
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    buffers = [memoryview(bytearray(_BLOCK)) for _ in range(2)]
    begun_s = time.perf_counter()

    def work(index: int) -> None:
        for path in files:
            descriptor = os.open(path, os.O_RDONLY)
            for start in range(index * _BLOCK, os.fstat(descriptor).st_size, 2 * _BLOCK):
                os.preadv(descriptor, [buffers[index]], start)
            os.close(descriptor)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, range(2)))
    return time.perf_counter() - begun_s


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _asked() -> int:
    """Return the bytes that this process has asked the system for so far (Linux: rchar)."""
    (line,) = (line for line in Path("/proc/self/io").read_text().splitlines() if line.startswith("rchar"))
    return int(line.split()[1])


if __name__ == "__main__":
    sys.exit(main())
