"""How near a step whose states are all on a local disk comes to what the disk allows: on a CPU.

Claim: a step of `TieredAdamW` with every fp32 master and moment in an `NvmeTier` moves its bytes at 0.9 or more of the
rate at which the plainest program moves as many, both ways at once, between memory and the same disk. Rival: AdamW as
one writes it by hand, states read from a file, updated and written one subgroup after another. DeepSpeed's NVMe
optimizer needs its async_io, which is a case here (`NvmeTier(io="aio")`) where it builds.

A step is timed from its call, with gradients there, until its last write has ended. What it moves (12 bytes a parameter
each way, but for the subgroups that are still in its buffers) is counted at the tier. ratio = bytes of the step a
second / bytes of the bound a second, both of one round: disks of shared machines change their minds within seconds.

The bound is a few threads that take turns at reading and writing blocks of one file until all of it was read once and
written once: no tier, digest, update or order. It is measured in several ways, each once a round, between the steps;
the way with the best median is the bound.

The page cache has no part in that (`O_DIRECT`); the rival's files go through it, are flushed in every step, and dropped
from it. After the last step parameters and states are compared with those of states in memory, to the bit.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import sys
import tempfile
import threading
import time
from argparse import Namespace
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Protocol

import torch
from torch import nn

from offload import movers
from offload.bench import Bound, Gate, Report, arguments
from offload.digest import digest
from offload.movers import IoName, Mover
from offload.nvme import NvmeTier
from offload.optimizer import TieredAdamW, Tiering
from offload.schedule import STATE_BYTES, Budget
from offload.tier import Block, TierSpec
from offload.tracing import Trace
from offload.transfer import HostMemory

_LIMIT = 0.9
_BETAS = (0.9, 0.95)
_MAIN = "tiered"


@dataclass(frozen=True, slots=True)
class _Sample:
    """A step, or what the bound takes in the place of one."""

    taken_s: float
    moved_bytes: int
    cpu_s: float
    """Processor time of the process, of all threads."""
    busy_s: dict[str, float]
    """By lane of the trace."""

    @property
    def rate(self) -> float:
        return self.moved_bytes / self.taken_s


class _Case(Protocol):
    name: str

    def sample(self) -> _Sample: ...

    def close(self) -> None: ...


class _WatchedTier(NvmeTier):
    """A tier that counts what it is asked to move, and can be waited for."""

    def __init__(
        self, spec: TierSpec, folder: Path, *, num_threads: int, io: IoName, digests: bool, direct: bool
    ) -> None:
        self._moves: list[tuple[Future[None], int]] = []
        super().__init__(spec, folder, num_threads=num_threads, io=io, digests=digests, direct=direct)

    def read(self, block: Block, into: torch.Tensor) -> Future[None]:
        return self._seen(super().read(block, into), block)

    def write(self, block: Block, source: torch.Tensor) -> Future[None]:
        return self._seen(super().write(block, source), block)

    def drain(self) -> int:
        """Wait for all transfers; return the bytes of those since the last call."""
        moves, self._moves = self._moves, []
        wait([transfer for transfer, _ in moves])
        return sum(num_bytes for _, num_bytes in moves)

    def _seen(self, transfer: Future[None], block: Block) -> Future[None]:
        self._moves.append((transfer, block.num_bytes))  # from any thread
        return transfer


class _Tiered:
    """Parameters whose states are on the disk; with no `io` in memory, which is what the others are compared with."""

    def __init__(
        self, name: str, options: Namespace, folder: Path, *, io: IoName | None = None, digests: bool = True
    ) -> None:
        self.name = name
        self._trace = Trace()
        self._gradients = _gradients(options)
        self._tier = None
        if io is not None:
            spec = TierSpec(
                name="disk",
                capacity_bytes=_state_bytes(options),
                read_bytes_per_s=1.0,  # nothing here looks at them
                write_bytes_per_s=1.0,
                latency_s=0.0,
            )
            how = {"num_threads": options.slots, "io": io, "digests": digests, "direct": options.direct}
            self._tier = _WatchedTier(spec, folder, **how)
        self.parameters = _parameters(options)
        settings = Tiering(
            accumulation_steps=1,
            subgroup_numel=options.subgroup,
            budget=Budget(device_bytes=0, host_bytes=None if io is None else 0),
            tier=self._tier,
            num_tier_slots=options.slots,
            trace=self._trace,
        )
        self._optimizer = TieredAdamW(self.parameters, betas=_BETAS, mode="sync", tiering=settings)
        assert self._optimizer.machine, "made now, not under the first step"

    def sample(self) -> _Sample:
        """Make a step."""
        torch.autograd.backward(self.parameters, next(self._gradients))
        if self._tier is not None:
            self._tier.drain()
        self._trace.step()
        cpu_s, start_s = time.process_time(), time.perf_counter()
        self._optimizer.step()
        moved_bytes = 0 if self._tier is None else self._tier.drain()
        taken_s, cpu_s = time.perf_counter() - start_s, time.process_time() - cpu_s
        return _Sample(taken_s, moved_bytes, cpu_s, dict(self._trace.step().busy_s))

    def states(self) -> list[torch.Tensor]:
        """Return copies of all states."""
        found = self._optimizer.state_dict()["state"]
        return [value.clone() for _, entry in sorted(found.items()) for _, value in sorted(entry.items())]

    def close(self) -> None:
        self._optimizer.close()
        if self._tier is not None:
            self._tier.close()


class _ByHand:
    """The rival: one subgroup after another is read through the page cache, updated by torch, written and flushed."""

    name = "by hand"

    def __init__(self, options: Namespace, folder: Path) -> None:
        self.parameters = _parameters(options)
        self._gradients = _gradients(options)
        self._num_steps = 0
        self._states = torch.zeros(3, options.subgroup)
        self._master = nn.Parameter(self._states[0])
        self._optimizer = torch.optim.AdamW([self._master], betas=_BETAS, fused=True)
        self._files = []
        for index, parameter in enumerate(self.parameters):
            path = folder / f"by-hand-{index}"
            self._files.append(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            path.unlink()
            self._states.zero_()[0].copy_(parameter.detach())
            self._write(self._files[-1])

    def sample(self) -> _Sample:
        """Make a step."""
        gradients = next(self._gradients)
        cpu_s, start_s = time.process_time(), time.perf_counter()
        for file, parameter, gradient in zip(self._files, self.parameters, gradients, strict=True):
            _whole(os.preadv(file, [self._states.numpy().data.cast("B")], 0), self._states.nbytes)
            step = torch.tensor(float(self._num_steps))
            _, exp_avg, exp_avg_sq = self._states
            self._optimizer.state[self._master] = {"step": step, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
            self._master.grad = gradient.float()
            self._optimizer.step()
            parameter.data.copy_(self._master.detach())
            self._write(file)
        self._num_steps += 1
        taken_s, cpu_s = time.perf_counter() - start_s, time.process_time() - cpu_s
        return _Sample(taken_s, 2 * len(self._files) * self._states.nbytes, cpu_s, {})

    def close(self) -> None:
        for file in self._files:
            os.close(file)

    def _write(self, file: int) -> None:
        _whole(os.pwrite(file, self._states.numpy().data.cast("B"), 0), self._states.nbytes)
        os.fdatasync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)


class _Raw:
    """The bound: threads that read and write blocks of a file in turns, each with a buffer of its own."""

    def __init__(self, options: Namespace, folder: Path, io: IoName, num_threads: int, block_bytes: int) -> None:
        self.name = f"raw, {io}, {num_threads} x {block_bytes / (1 << 20):.3g} MiB"
        self._num_bytes, self._block_bytes = _state_bytes(options), block_bytes
        path = folder / "raw"
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | (os.O_DIRECT if options.direct else 0)
        self._file = os.open(path, flags, 0o600)
        path.unlink()
        memory = HostMemory(pinned=False)  # like the buffers of an optimizer
        self._movers = movers.make_movers(io, num_threads)[1]
        self._buffers = [memory.empty(block_bytes, torch.uint8) for _ in self._movers]
        os.posix_fallocate(self._file, 0, self._num_bytes)
        self._run([(True, start) for start in self._starts()])  # blocks that were never written are slower

    def sample(self) -> _Sample:
        """Read all of the file and write all of it."""
        cpu_s, start_s = time.process_time(), time.perf_counter()
        self._run([(writes, start) for start in self._starts() for writes in (False, True)])
        taken_s, cpu_s = time.perf_counter() - start_s, time.process_time() - cpu_s
        return _Sample(taken_s, 2 * self._num_bytes, cpu_s, {})

    def close(self) -> None:
        for mover in self._movers:
            mover.close()
        os.close(self._file)

    def _starts(self) -> range:
        return range(0, self._num_bytes, self._block_bytes)

    def _run(self, turns: Sequence[tuple[bool, int]]) -> None:
        left, lock = iter(turns), threading.Lock()

        def work(mover: Mover, buffer: torch.Tensor) -> None:
            while True:
                with lock:
                    turn = next(left, None)
                if turn is None:
                    return
                writes, start = turn
                block = buffer[: self._num_bytes - start]
                (mover.write if writes else mover.read)(self._file, block, start)

        with ThreadPoolExecutor(len(self._movers)) as pool:
            for done in [pool.submit(work, *one) for one in zip(self._movers, self._buffers, strict=True)]:
                done.result()


def main() -> int:
    """Run the benchmark; 1 if parameters or states differ."""
    options = _options()
    report = Report("offload.disk", _described(options))
    with tempfile.TemporaryDirectory(dir=options.folder) as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        tiered, raws, cases = _cases(options, folder, stack)
        found: dict[str, list[_Sample]] = {case.name: [] for case in cases}
        for number in range(1 + options.repeats):
            for case in cases[number % len(cases) :] + cases[: number % len(cases)]:  # nobody always follows the rival
                sample = case.sample()
                if number:
                    found[case.name].append(sample)
        best = max((raw.name for raw in raws), key=lambda name: median(sample.rate for sample in found[name]))
        _add(report, found, best)
        _compare(report, options, folder, tiered)
    report.bounds.append(Bound("disk, both ways at once", report.median(best, "rate"), "B/s", best))
    report.bounds.append(Bound("digest", _digest_rate(options), "B/s", "one thread, over a subgroup's states"))
    ratio = report.median(_MAIN, "ratio")
    report.gates.append(Gate("rate of a step over the disk's", ratio, _LIMIT, ok=ratio >= _LIMIT, is_speed=True))
    return report.finish(options)


def _options() -> Namespace:
    parser = arguments(__doc__)
    parser.set_defaults(repeats=12)
    parser.add_argument("--folder", type=Path, default=Path(), help="on the disk to measure (default: here)")
    parser.add_argument("--subgroups", type=int, default=48, help="(default: %(default)s)")
    parser.add_argument("--subgroup", type=int, default=1 << 20, help="parameters of each (default: %(default)s)")
    parser.add_argument(
        "--slots", type=int, default=Tiering().num_tier_slots, help="subgroups in memory, and transfers, at once"
    )
    options = parser.parse_args()
    if options.smoke:
        options.subgroups, options.subgroup, options.repeats = 6, 1024, 1
    options.file_system = _file_system(options.folder)
    options.direct = options.file_system.split()[0] != "tmpfs"
    if not options.direct and not options.smoke:
        parser.error(f"--folder: {options.folder.resolve()} is in memory (tmpfs); give one that is on a disk")
    if options.subgroup < 1024 or options.subgroup % 1024:
        parser.error(f"--subgroup: {options.subgroup}; a multiple of 1024")
    options.wanted_bytes = 10 * _state_bytes(options)  # eight files at most, and room for others
    free = shutil.disk_usage(options.folder).free
    if free < options.wanted_bytes:
        parser.error(f"--folder: {free} bytes are free, {options.wanted_bytes} are needed; or lower --subgroups")
    return options


def _described(options: Namespace) -> dict[str, object]:
    names = ("subgroups", "subgroup", "slots", "repeats", "file_system", "direct")
    unavailable = {io: why for io in ("io_uring", "aio") if (why := movers.refusal(io))}
    described = {name: getattr(options, name) for name in names}
    return described | {"io": movers.chosen("auto"), "state_bytes": _state_bytes(options), "does not run": unavailable}


def _cases(
    options: Namespace, folder: Path, stack: contextlib.ExitStack
) -> tuple[list[_Tiered], list[_Raw], list[_Case]]:
    """Return the cases of ours, the ways of the bound, and all of them with the rival, each way after one of ours."""
    ring = movers.chosen("auto")
    tiered = [_Tiered(_MAIN, options, folder, io="auto")]
    tiered.append(_Tiered(f"{_MAIN}, no digests", options, folder, io="auto", digests=False))
    others: list[IoName] = ["threads"] if ring != "threads" else []
    if options.direct and not movers.refusal("aio"):
        others.append("aio")
    tiered += [_Tiered(f"{_MAIN}, {io}", options, folder, io=io) for io in others]
    block_bytes = STATE_BYTES * options.subgroup
    third_bytes = max(4096, block_bytes // 3)
    ways: list[tuple[IoName, int, int]] = [("threads", 4, block_bytes)]
    ways += [("threads", num, third_bytes) for num in (4, 6)]
    if ring == "io_uring":
        ways += [("io_uring", num, block_bytes) for num in (2, 4, 6)]
    raws = [_Raw(options, folder, *way) for way in ways]
    rest: list[_Case] = [*tiered, _ByHand(options, folder)]
    cases = [case for pair in itertools.zip_longest(raws, rest) for case in pair if case is not None]
    for case in cases:
        stack.callback(case.close)
    return tiered, raws, cases


def _add(report: Report, found: dict[str, list[_Sample]], best: str) -> None:
    for name, samples in found.items():
        report.add(name, "step", "s", *(sample.taken_s for sample in samples))
        report.add(name, "moved", "B", *(float(sample.moved_bytes) for sample in samples))
        report.add(name, "rate", "B/s", *(sample.rate for sample in samples))
        report.add(name, "processor", "s", *(sample.cpu_s for sample in samples))
        for lane in sorted({lane for sample in samples for lane in sample.busy_s}):
            if lane in ("cpu update", "disk read", "disk write"):
                report.add(name, f"{lane} busy", "s", *(sample.busy_s.get(lane, 0.0) for sample in samples))
        if not name.startswith("raw"):
            pairs = zip(samples, found[best], strict=True)
            report.add(name, "ratio", "of the disk's rate", *(sample.rate / raw.rate for sample, raw in pairs))


def _compare(report: Report, options: Namespace, folder: Path, tiered: Sequence[_Tiered]) -> None:
    """Make the same steps with states in memory, and compare to the bit."""
    reference = _Tiered("memory", options, folder)
    with contextlib.closing(reference):
        for _ in range(1 + options.repeats):
            reference.sample()
        wanted = [p.detach().view(torch.uint8) for p in reference.parameters] + reference.states()
        for case in tiered:
            mine = [p.detach().view(torch.uint8) for p in case.parameters] + case.states()
            different = sum(int((a != b).sum()) for a, b in zip(mine, wanted, strict=True))
            report.gates.append(Gate(f"values of {case.name} that differ", different, 0, ok=different == 0))


def _parameters(options: Namespace) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = [options.subgroup] * options.subgroups
    return [nn.Parameter(torch.randn(shape, generator=generator).bfloat16()) for shape in shapes]


def _gradients(options: Namespace) -> itertools.cycle[list[torch.Tensor]]:
    """Return the gradients of one step after another; those of two alternate."""
    generator = torch.Generator().manual_seed(1)
    two = [torch.randn(options.subgroup, generator=generator).bfloat16() for _ in range(2)]
    return itertools.cycle([[one] * options.subgroups for one in two])


def _state_bytes(options: Namespace) -> int:
    return STATE_BYTES * int(options.subgroup) * int(options.subgroups)


def _digest_rate(options: Namespace) -> float:
    data = torch.ones(STATE_BYTES * options.subgroup, dtype=torch.uint8)
    times_s = []
    for _ in range(5):
        start_s = time.perf_counter()
        digest(data)
        times_s.append(time.perf_counter() - start_s)
    return data.numel() / median(times_s)


def _whole(num_moved: int, wanted: int) -> None:
    if num_moved != wanted:
        raise OSError(f"{num_moved} of {wanted} bytes were moved")


def _file_system(folder: Path) -> str:
    """Return the kind and the device of the file system that a folder is on."""
    status = folder.stat()
    place = f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        if fields[2] == place:
            kind, device = fields[fields.index("-") + 1 :][:2]
            return f"{kind} on {device}"
    return "unknown"


if __name__ == "__main__":
    sys.exit(main())
