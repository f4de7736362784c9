"""Measures the rates that a plan needs, in a few seconds, with the optimizer's own kernels and copies.

What is measured goes through several times the memory that a processor's cache holds, as a step does.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from offload.kernels import KernelName, States, Step, make_kernel
from offload.pages import allocate_pages
from offload.schedule import STATE_BYTES, Rates
from offload.tier import Tier
from offload.transfer import TIMEOUT_S, HostMemory, Ticket, make_lanes

KEPT = Path.home() / ".cache" / "trainsys" / "probe.json"
"""Where the figures of the last probe are kept, for plans."""
_METRICS = {
    "cpu": "cpu.tiered_adamw",
    "device": "cuda.tiered_adamw",
    "up": "cuda.host_to_device",
    "down": "cuda.device_to_host",
    "both": "cuda.both",
    "cpu_beside": "cuda.cpu_beside",
    "stream_beside": "cuda.stream_beside",
}
_DISK = {"tier_read": "nvme.read", "tier_write": "nvme.write"}
_TIER_BLOCKS = 2
_PAGE_BYTES = 4096
_STEP = Step(1, 1e-3, (0.9, 0.95), 1e-8, 0.1)


def calibrate(
    device: torch.device,
    *,
    num_threads: int,
    kernel: KernelName = "native",
    numel: int = 1 << 24,
    budget_s: float = 3.0,
    tier: Tier | None = None,
) -> Rates:
    """Return this machine's rates for parameters on `device`; takes about `budget_s` and 140 x `numel` bytes of memory.

    On a CPU the copies are those of memory, and nothing is streamed. With a `tier` its rates are measured too.
    """
    rates = _rates(device, num_threads, kernel, numel, budget_s)
    if tier is None:
        return rates
    read, write = tier_rates(tier, num_bytes=STATE_BYTES * numel)
    return dataclasses.replace(rates, tier_read=read, tier_write=write)


def kept(path: Path = KEPT) -> Rates | None:
    """Return the rates that a probe on this machine, with this GPU and as many CPUs, has kept; None: there are none.

    They are those of one process that has the machine to itself.
    """
    try:
        report = json.loads(path.read_text())
        figures = {row["metric"]: row["value"] for row in report["measurements"]}
        machine = report["machine"]
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
        if (machine["gpu"], machine["cpus"]) != (gpu, len(os.sched_getaffinity(0))):
            return None
        found = {name: float(figures[metric]) for name, metric in _METRICS.items()}
    except (OSError, ValueError, KeyError, TypeError):  # none, another kind of file, or a figure that was not measured
        return None
    disk = {name: figures.get(metric) or math.inf for name, metric in _DISK.items()}
    return Rates(**found, **disk)


def tier_rates(tier: Tier, *, num_bytes: int) -> tuple[float, float]:
    """Return bytes a second read from a tier and written to it, in pieces of so many, or of what there is room for."""
    room = tier.spec.capacity_bytes - tier.used_bytes
    num_bytes = min(num_bytes, room // 2 // _TIER_BLOCKS) // _PAGE_BYTES * _PAGE_BYTES
    if num_bytes <= 0:
        return tier.spec.read_bytes_per_s, tier.spec.write_bytes_per_s
    data = [allocate_pages(num_bytes).fill_(1) for _ in range(_TIER_BLOCKS)]
    blocks = [tier.allocate(num_bytes, "calibration") for _ in data]
    try:
        seconds = []
        for move in (tier.write, tier.write, tier.read):  # the first write makes the file
            start_s = time.perf_counter()
            for transfer in [move(block, part) for block, part in zip(blocks, data, strict=True)]:
                transfer.result(TIMEOUT_S)
            seconds.append(time.perf_counter() - start_s)
    finally:
        for block in blocks:
            tier.free(block)
    total = num_bytes * _TIER_BLOCKS
    return total / seconds[2], total / seconds[1]


def _rates(device: torch.device, num_threads: int, kernel: KernelName, numel: int, budget_s: float) -> Rates:
    each_s = budget_s / 6
    host = make_kernel(kernel, torch.device("cpu"), num_threads=num_threads)
    memory = HostMemory(pinned=device.type == "cuda")
    try:
        gradient, out = (memory.empty(numel, torch.bfloat16) for _ in range(2))
        rounds = itertools.cycle(
            [States(*(memory.empty(numel, torch.float32, pinned=False) for _ in range(3))) for _ in range(3)]
        )

        def on_cpu() -> None:
            host.adamw(next(rounds), gradient, out, _STEP)

        cpu = numel / _seconds(on_cpu, each_s)
        if device.type != "cuda":
            states = next(rounds)
            copied = states.master.nbytes / _seconds(lambda: states.exp_avg.copy_(states.master), each_s)
            return Rates(cpu=cpu, device=cpu, up=copied, down=copied, both=copied)
        found = _of_device(device, kernel, numel, each_s, cpu, memory)
        return _with_both_at_once(found, on_cpu, (gradient, out), device, memory, budget_s=each_s)
    finally:
        host.close()
        memory.close()


def _of_device(
    device: torch.device, kernel: KernelName, numel: int, each_s: float, cpu: float, memory: HostMemory
) -> Rates:
    """Return the rates of a device and its link, each alone."""
    there = [States.empty(numel, device) for _ in range(2)]
    sources, targets = (itertools.cycle(_homes(memory, numel)) for _ in range(2))
    gradient = torch.zeros(numel, dtype=torch.bfloat16, device=device)
    update = make_kernel(kernel, device)
    up, down = (torch.cuda.Stream(device) for _ in range(2))  # type: ignore[no-untyped-call]

    def move(upwards: bool, downwards: bool) -> Callable[[], None]:
        def work() -> None:
            if upwards:
                with torch.cuda.stream(up):
                    there[0].copy_(next(sources), non_blocking=True)
            if downwards:
                with torch.cuda.stream(down):
                    next(targets).copy_(there[1], non_blocking=True)
            torch.cuda.synchronize(device)

        return work

    def on_device() -> None:
        for _ in range(8):  # many, so that the launch and the wait weigh little
            update.adamw(there[0], gradient, gradient, _STEP)
        torch.cuda.synchronize(device)

    nbytes = STATE_BYTES * numel
    return Rates(
        cpu=cpu,
        device=8 * numel / _seconds(on_device, each_s / 2),
        up=nbytes / _seconds(move(True, False), each_s / 2),
        down=nbytes / _seconds(move(False, True), each_s / 2),
        both=2 * nbytes / _seconds(move(True, True), each_s),
    )


def _with_both_at_once(
    rates: Rates,
    on_cpu: Callable[[], None],
    moved: tuple[torch.Tensor, torch.Tensor],
    device: torch.device,
    memory: HostMemory,
    *,
    budget_s: float,
) -> Rates:
    """Add what the CPU and the stream do while the other does, by the lanes of the optimizer.

    `moved` are the host's gradient and result of an update on the CPU, which cross the link too.
    """
    gradient, out = moved
    numel = out.numel()
    slots = [States.empty(numel, device) for _ in range(3)]
    sources, targets = (itertools.cycle(_homes(memory, numel)) for _ in range(2))
    there = torch.zeros_like(out, device=device)
    lanes = make_lanes(device)
    left: deque[Ticket] = deque(maxlen=len(slots))
    arrived: deque[Ticket] = deque(maxlen=len(slots))

    def update() -> None:
        on_cpu()
        lanes.lane("gradients down").run(lambda: _copy(gradient, there))
        arrived.append(lanes.lane("parameters up").run(lambda: _copy(there, out)))
        if len(arrived) == arrived.maxlen:
            arrived[0].wait()

    def stream() -> None:
        slot, source, target = slots[0], next(sources), next(targets)
        slots.append(slots.pop(0))
        before = []
        if len(left) == left.maxlen:  # of this slot
            left[0].wait()
            before = [left[0]]
        up = lanes.lane("states up").run(lambda: slot.copy_(source, non_blocking=True), after=before)
        left.append(lanes.lane("states down").run(lambda: target.copy_(slot, non_blocking=True), after=[up]))

    try:
        cpu_beside, stream_beside = _at_once(update, stream, numel, budget_s)
    finally:
        lanes.close()
    return dataclasses.replace(rates, cpu_beside=cpu_beside, stream_beside=min(stream_beside, rates.device))


def _homes(memory: HostMemory, numel: int) -> list[States]:
    """Return states in host memory, of two subgroups."""
    return [States(*(memory.empty(numel, torch.float32) for _ in range(3))) for _ in range(2)]


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    target.copy_(source, non_blocking=True)


def _at_once(first: Callable[[], None], second: Callable[[], None], numel: int, budget_s: float) -> tuple[float, float]:
    """Return the rates of both while both run."""
    stop = threading.Event()
    rates: list[float] = []

    def repeat() -> None:
        start_s, count = time.perf_counter(), 0
        while not stop.is_set() or not count:
            second()
            count += 1
        rates.append(count * numel / (time.perf_counter() - start_s))

    thread = threading.Thread(target=repeat, name="offload-calibrate")
    thread.start()
    try:
        rate = numel / _seconds(first, budget_s)
    finally:
        stop.set()
        thread.join()
    return rate, rates[0]


def _seconds(work: Callable[[], object], budget_s: float) -> float:
    """Return the median time of a piece of work, after one that does not count; three at least."""
    work()
    samples: list[float] = []
    end_s = time.perf_counter() + budget_s
    while len(samples) < 3 or time.perf_counter() < end_s:
        start_s = time.perf_counter()
        work()
        samples.append(time.perf_counter() - start_s)
    return median(samples)
