"""How fast the memory, the disk and the processors of this machine are, measured.

Every figure is the median of several repeats after a first one that does not count, on memory that was
touched before. The figures of tiers go through `CpuTier` and `NvmeTier` themselves, so what those cost is in.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from offload import movers
from offload.cpu import CpuTier
from offload.cxl import CxlTier
from offload.errors import OffloadError, TierError
from offload.movers import IoName
from offload.numa import NumaNode, memory_only, numa_nodes
from offload.nvme import NvmeTier
from offload.tier import Tier, TierSpec

_NUM_BLOCKS = 4
_SMALL_BYTES = 4096
_PARAMETER_BYTES = 16
"""An fp32 parameter with its gradient and two moments."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """One figure, or the reason why there is none."""

    metric: str
    unit: str
    samples: list[float]
    how: str
    """How it was measured; without samples, why it was not."""

    @property
    def value(self) -> float | None:
        """The median, or None where nothing was measured."""
        return median(self.samples) if self.samples else None


@dataclass(frozen=True, slots=True)
class Report:
    """What `probe` found."""

    machine: dict[str, str | int]
    versions: dict[str, str]
    parameters: dict[str, str | int]
    measurements: list[Measurement]
    tiers: list[TierSpec]
    """The tiers that can be made here, with the measured rates and the room that was free."""
    numa_nodes: list[NumaNode]


def probe(folder: Path, *, size_bytes: int, repeats: int, cxl: TierSpec | None = None, io: IoName = "auto") -> Report:
    """Measure this machine, and its disk in `folder`; needs 2 x `size_bytes` of memory and one of disk.

    `io` is what moves the bytes of the disk; the report's machine says what `auto` became, and why.
    CXL memory is every NUMA node that has memory and no CPU, or without any the emulated tier that `cxl` describes.
    """
    clock = Clock(repeats)
    memory_bytes = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    cpu, cpu_rows = _tier(clock, _blank("cpu", memory_bytes), CpuTier, size_bytes)
    nvme, nvme_rows = _tier(
        clock, _blank("nvme", shutil.disk_usage(folder).free), lambda spec: NvmeTier(spec, folder, io=io), size_bytes
    )
    cards = [_tier(clock, spec, make, size_bytes) for spec, make in _cards(cxl)]
    return Report(
        machine=_machine() | _nvme_io(io),
        versions={"python": platform.python_version(), "torch": torch.__version__},
        parameters={"path": str(folder), "size_bytes": size_bytes, "repeats": repeats},
        measurements=[
            *_copies(clock, size_bytes),
            _adamw(clock, "cpu", size_bytes),
            _own_adamw(clock, size_bytes),
            _matmul(clock, "cpu", torch.float32, 1024),
            *cpu_rows,
            *(row for _, rows in cards for row in rows),
            _write_and_fsync(clock, folder, size_bytes),
            *nvme_rows,
            *_cuda(clock, size_bytes),
        ],
        tiers=[spec for spec in (cpu, *(spec for spec, _ in cards), nvme) if spec is not None],
        numa_nodes=numa_nodes(),
    )


@dataclass(frozen=True, slots=True)
class Clock:
    """Times repeats of a piece of work."""

    repeats: int
    now_s: Callable[[], float] = time.perf_counter

    def times_s(self, work: Callable[[], object]) -> list[float]:
        """Return how long each repeat took, after one that does not count."""
        samples = []
        for _ in range(1 + self.repeats):
            start_s = self.now_s()
            work()
            samples.append(self.now_s() - start_s)
        return samples[1:]

    def rate(self, metric: str, unit: str, amount: float, work: Callable[[], object], how: str) -> Measurement:
        """Measure how much of `amount` a second does."""
        return Measurement(metric, unit, [amount / sample for sample in self.times_s(work)], how)


def _copies(clock: Clock, size_bytes: int) -> list[Measurement]:
    """Memory to memory; a byte that is read and written counts once."""
    source, target = (torch.ones(size_bytes, dtype=torch.uint8) for _ in range(2))
    rows = []
    for num_threads in sorted({1, torch.get_num_threads()}):
        with _torch_threads(num_threads):
            threads = "1 thread" if num_threads == 1 else f"{num_threads} threads"
            how = f"Tensor.copy_ of {_mib(size_bytes)}, {threads}"
            metric = f"memory.copy_{num_threads}"
            rows.append(clock.rate(metric, "B/s", size_bytes, lambda: target.copy_(source), how))
    return rows


def _adamw(clock: Clock, device: str, size_bytes: int) -> Measurement:
    """An optimizer step over fp32 parameters, all threads."""
    count = max(1, size_bytes // _PARAMETER_BYTES)
    parameter = torch.ones(count, device=device, requires_grad=True)
    parameter.grad = torch.ones(count, device=device)
    optimizer = torch.optim.AdamW([parameter], fused=True)

    def step() -> None:
        optimizer.step()
        if device != "cpu":
            torch.cuda.synchronize()

    how = f"torch.optim.AdamW(fused=True), {count / 1e6:.3g}M fp32 parameters"
    if device == "cpu":
        how += f", {torch.get_num_threads()} threads"
    return clock.rate(f"{device}.adamw", "parameters/s", count, step, how)


def _own_adamw(clock: Clock, size_bytes: int) -> Measurement:
    """The tiered optimizer's kernel: bf16 gradients in, fp32 states, bf16 parameters out, all threads."""
    from offload.kernels import States, Step, make_kernel

    metric, count = "cpu.tiered_adamw", max(1024, size_bytes // _PARAMETER_BYTES)
    threads = torch.get_num_threads()
    try:
        kernel = make_kernel("native", torch.device("cpu"), num_threads=threads)
    except OffloadError as error:
        return Measurement(metric, "parameters/s", [], str(error))
    states = States(*(torch.zeros(count) for _ in range(3)))
    gradient, out = torch.ones(count, dtype=torch.bfloat16), torch.empty(count, dtype=torch.bfloat16)
    step = Step(1, 1e-3, (0.9, 0.95), 1e-8, 0.1)
    how = f"one fused pass of C over {count / 1e6:.3g}M parameters, bf16 in and out, {threads} threads"
    try:
        return clock.rate(metric, "parameters/s", count, lambda: kernel.adamw(states, gradient, out, step), how)
    finally:
        kernel.close()


def _blank(name: str, capacity_bytes: int) -> TierSpec:
    """Return a spec whose rates are still to be learnt; nothing that runs here looks at them."""
    return TierSpec(
        name=name, capacity_bytes=capacity_bytes, read_bytes_per_s=1.0, write_bytes_per_s=1.0, latency_s=0.0
    )


def _cards(emulated: TierSpec | None) -> list[tuple[TierSpec, Callable[[TierSpec], Tier]]]:
    """Return the CXL tiers that can be made here."""
    nodes = memory_only(numa_nodes())
    if not nodes:
        return [(emulated, CxlTier)] if emulated is not None else []
    return [
        (_blank(f"cxl{node.index}", node.memory_bytes), functools.partial(CxlTier, node=node.index)) for node in nodes
    ]


def _tier(
    clock: Clock, blank: TierSpec, make: Callable[[TierSpec], Tier], size_bytes: int
) -> tuple[TierSpec | None, list[Measurement]]:
    """Measure writes, reads, both at once and the latency of a tier; return its spec, or None where it cannot be made.

    An emulated tier is measured like any other, which shows that it keeps to its figures; its rows say so.
    """
    name = blank.name
    part_bytes = max(_SMALL_BYTES, size_bytes // _NUM_BLOCKS // _SMALL_BYTES * _SMALL_BYTES)
    try:
        tier = make(blank)
    except TierError as error:
        units = {"write": "B/s", "read": "B/s", "both": "B/s", "latency": "s"}
        return None, [Measurement(f"{name}.{what}", unit, [], str(error)) for what, unit in units.items()]
    with tier:
        data = torch.ones(part_bytes, dtype=torch.uint8)
        targets = [torch.ones(part_bytes, dtype=torch.uint8) for _ in range(_NUM_BLOCKS)]
        blocks = [tier.allocate(part_bytes) for _ in range(_NUM_BLOCKS)]

        def write() -> None:
            for future in [tier.write(block, data) for block in blocks]:
                future.result()

        def read() -> None:
            pairs = zip(blocks, targets, strict=True)
            for future in [tier.read(block, target) for block, target in pairs]:
                future.result()

        def both() -> None:
            half = _NUM_BLOCKS // 2
            moves = [tier.write(block, data) for block in blocks[:half]]
            moves += [tier.read(block, target) for block, target in zip(blocks[half:], targets, strict=False)]
            for future in moves:
                future.result()

        what = type(tier).__name__
        what += f" by {tier.io}, past the page cache" if isinstance(tier, NvmeTier) else ""
        what += ", emulated" if tier.spec.emulated else ""
        how = f"{what}, {_NUM_BLOCKS} blocks of {_mib(part_bytes)} at once"
        total = _NUM_BLOCKS * part_bytes
        writes = clock.rate(f"{name}.write", "B/s", total, write, how)
        reads = clock.rate(f"{name}.read", "B/s", total, read, how)
        at_once = clock.rate(f"{name}.both", "B/s", total, both, f"{how}, half of them each way, sum")
        small = tier.allocate(_SMALL_BYTES)
        tier.write(small, data[:_SMALL_BYTES]).result()
        times_s = clock.times_s(lambda: tier.read(small, targets[0][:_SMALL_BYTES]).result())
        latency = Measurement(f"{name}.latency", "s", times_s, f"{what}, one read of 4 KiB")
    spec = dataclasses.replace(
        blank,
        read_bytes_per_s=median(reads.samples),
        write_bytes_per_s=median(writes.samples),
        latency_s=median(times_s),
    )
    return spec, [writes, reads, at_once, latency]


def _write_and_fsync(clock: Clock, folder: Path, size_bytes: int) -> Measurement:
    """What a checkpoint writer meets: through the page cache, over when the disk has it."""
    data = memoryview(bytes(min(size_bytes, 8 << 20)))
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:

        def write() -> None:
            file.seek(0)
            file.truncate()
            left = size_bytes
            while left:
                left -= file.write(data[:left])
            os.fsync(file.fileno())

        how = f"write of {_mib(size_bytes)} through the page cache, then fsync, 1 thread"
        return clock.rate("disk.write_fsync", "B/s", size_bytes, write, how)


def _cuda(clock: Clock, size_bytes: int) -> list[Measurement]:
    """Copies between pinned memory and the current CUDA device, and its optimizer step."""
    if not torch.cuda.is_available():
        return []
    host_out, host_in = (torch.ones(size_bytes, dtype=torch.uint8).pin_memory() for _ in range(2))
    device_out, device_in = (torch.ones(size_bytes, dtype=torch.uint8, device="cuda") for _ in range(2))
    up, down = (torch.cuda.Stream() for _ in range(2))  # type: ignore[no-untyped-call]

    def move(upwards: bool, downwards: bool) -> None:
        if upwards:
            with torch.cuda.stream(up):
                device_in.copy_(host_out, non_blocking=True)
        if downwards:
            with torch.cuda.stream(down):
                host_in.copy_(device_out, non_blocking=True)
        torch.cuda.synchronize()

    name = torch.cuda.get_device_name()
    rows = []
    for metric, ways in (
        ("host_to_device", (True, False)),
        ("device_to_host", (False, True)),
        ("both", (True, True)),
    ):
        how = f"pinned, {_mib(size_bytes)} {'each way at once, sum' if all(ways) else 'one way'}, {name}"
        amount = size_bytes * sum(ways)
        rows.append(clock.rate(f"cuda.{metric}", "B/s", amount, functools.partial(move, *ways), how))
    rows += _beside_one_another()
    return [*rows, _adamw(clock, "cuda", size_bytes), _matmul(clock, "cuda", torch.bfloat16, 8192)]


def _beside_one_another() -> list[Measurement]:
    """Return what the tiered optimizer's kernels and copies do, also of both at once."""
    from offload import calibrate
    from offload.machine import default_threads

    names = ("cpu_beside", "stream_beside", "device")
    metrics = ("cuda.cpu_beside", "cuda.stream_beside", "cuda.tiered_adamw")
    threads = default_threads()
    try:
        rates = calibrate.calibrate(torch.device("cuda", torch.cuda.current_device()), num_threads=threads)
    except OffloadError as error:
        return [Measurement(metric, "parameters/s", [], str(error)) for metric in metrics]
    how = f"the tiered optimizer's calibration, {threads} threads"
    return [
        Measurement(metric, "parameters/s", [getattr(rates, name)], how)
        for metric, name in zip(metrics, names, strict=True)
    ]


def _matmul(clock: Clock, device: str, dtype: torch.dtype, side: int) -> Measurement:
    """A product of two square matrices: what forward and backward are made of."""
    one, other = (torch.ones(side, side, dtype=dtype, device=device) for _ in range(2))

    def product() -> None:
        one @ other
        if device != "cpu":
            torch.cuda.synchronize()

    how = f"product of two {side} x {side} matrices, {str(dtype).removeprefix('torch.')}"
    return clock.rate(f"{device}.matmul", "FLOP/s", 2 * side**3, product, how)


@contextlib.contextmanager
def _torch_threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _machine() -> dict[str, str | int]:
    cpus = len(os.sched_getaffinity(0))
    memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    found: dict[str, str | int] = {
        "system": platform.platform(),
        "cpus": cpus,
        "memory_bytes": memory_bytes,
        "gpu": gpu,
    }
    if torch.cuda.is_available():
        found["gpu_bytes"] = torch.cuda.mem_get_info()[1]
    return found


def _nvme_io(io: IoName) -> dict[str, str | int]:
    """Return what moves the bytes of a disk here, and whether the kernel allows what is best."""
    return {"nvme_io": movers.chosen(io), "io_uring": movers.refusal("io_uring") or "runs here"}


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 20):.4g} MiB"
