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
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from offload.kernels import KernelName, States, Step, make_kernel
from offload.pages import allocate_pages
from offload.schedule import STATE_BYTES, Rates
from offload.tier import Tier
from offload.transfer import TIMEOUT_S, HostMemory

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
    """Return this machine's rates for parameters on `device`; takes about `budget_s` and 92 x `numel` bytes of memory.

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
        gradient = memory.empty(numel, torch.bfloat16, pinned=False)
        out = memory.empty(numel, torch.bfloat16, pinned=False)
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
        return _with_device(device, kernel, numel, each_s, cpu, on_cpu, memory)
    finally:
        host.close()
        memory.close()


def _with_device(
    device: torch.device,
    kernel: KernelName,
    numel: int,
    each_s: float,
    cpu: float,
    on_cpu: Callable[[], None],
    memory: HostMemory,
) -> Rates:
    there = [States.empty(numel, device) for _ in range(2)]
    here = [States(*(memory.empty(numel, torch.float32) for _ in range(3))) for _ in range(4)]
    sources, targets = itertools.cycle(here[:2]), itertools.cycle(here[2:])
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
    up_rate = nbytes / _seconds(move(True, False), each_s / 2)
    down_rate = nbytes / _seconds(move(False, True), each_s / 2)
    both = 2 * nbytes / _seconds(move(True, True), each_s)
    on_device_rate = 8 * numel / _seconds(on_device, each_s / 2)
    cpu_beside, stream_beside = _at_once(on_cpu, move(True, True), numel, each_s)
    return Rates(
        cpu=cpu,
        device=on_device_rate,
        up=up_rate,
        down=down_rate,
        both=both,
        cpu_beside=cpu_beside,
        stream_beside=min(stream_beside, on_device_rate),
    )


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
