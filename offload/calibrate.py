"""Measures the rates that a plan needs, in a few seconds, with the optimizer's own kernels and copies."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from statistics import median

import torch

from offload.kernels import KernelName, States, Step, make_kernel
from offload.schedule import STATE_BYTES, Rates
from offload.transfer import HostMemory

_STEP = Step(1, 1e-3, (0.9, 0.95), 1e-8, 0.1)


def calibrate(
    device: torch.device,
    *,
    num_threads: int,
    kernel: KernelName = "native",
    numel: int = 1 << 24,
    budget_s: float = 3.0,
) -> Rates:
    """Return this machine's rates for parameters on `device`; takes about `budget_s` and 44 x `numel` bytes of memory.

    On a CPU the copies are those of memory, and nothing is streamed.
    """
    each_s = budget_s / 6
    host = make_kernel(kernel, torch.device("cpu"), num_threads=num_threads)
    memory = HostMemory(pinned=device.type == "cuda")
    try:
        gradient = memory.empty(numel, torch.bfloat16, pinned=False)
        out = memory.empty(numel, torch.bfloat16, pinned=False)
        states = States(*(memory.empty(numel, torch.float32, pinned=False) for _ in range(3)))

        def on_cpu() -> None:
            host.adamw(states, gradient, out, _STEP)

        cpu = numel / _seconds(on_cpu, each_s)
        if device.type != "cuda":
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
    here = [States(*(memory.empty(numel, torch.float32) for _ in range(3))) for _ in range(2)]
    gradient = torch.zeros(numel, dtype=torch.bfloat16, device=device)
    update = make_kernel(kernel, device)
    up, down = (torch.cuda.Stream(device) for _ in range(2))  # type: ignore[no-untyped-call]

    def move(upwards: bool, downwards: bool) -> Callable[[], None]:
        def work() -> None:
            if upwards:
                with torch.cuda.stream(up):
                    there[0].copy_(here[0], non_blocking=True)
            if downwards:
                with torch.cuda.stream(down):
                    here[1].copy_(there[1], non_blocking=True)
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
