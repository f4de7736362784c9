"""What the recorder costs: per collective, and per step of DistributedDataParallel.

Claim: at most 20 us a collective, and at most 1 % of a step's time.

Baseline and candidate alternate in one process: a block with the recorder installed, a block with it taken out. Per
collective: `all_reduce` of 64 bytes in a group of one rank, where nothing is waited for, so that the calling is all
there is; the cost is the difference of two neighbouring blocks. Of a device nothing is waited for inside a block. Per
step: a model of linear layers under DDP, the slowest rank's time of a block; the cost is the ratio of neighbouring
blocks less 1. CPU time is that of all threads, the recorder's too: it sees less of what else the machine does.

A step's cost is smaller than what steps differ by, so that it takes many short pairs: blocks of a few steps, either
first as often as the other, so that what drifts cancels. The estimate is the mean without the lowest and the highest
fifth of the pairs, its interval the middle 95 % of that of 2000 samples drawn from them (bootstrap). A gate is held
when the whole interval is below the limit: a noisy machine shows nothing, and holds nothing. `expected` is the
arithmetic beside it: collectives a step x cost a collective / step.

On the CPU the step is small for a step of training (`--rows` makes it longer), and what it costs is taken from all that
it has: two ranks on few cores leave none for the recorder's thread. A step that computes for milliseconds also drives
Python's code out of the caches, so that the few collectives in it cost more each than many in a row do.
"""

from __future__ import annotations

import contextlib
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, cast

import torch
import torch.distributed as dist
from torch import nn

import faulttol
from faulttol import compiled
from faulttol.bench import Bound, Gate, Report, arguments
from faulttol.bench.parts.ranks import Device, Rank, join, store_folder, together

COLLECTIVE_LIMIT_US = 20.0
STEP_LIMIT = 0.01
_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is run."""

    calls: int
    """Collectives a block."""
    blocks: int
    """Pairs of blocks of collectives."""
    pairs: int
    """Pairs of blocks of steps."""
    steps: int
    """Steps a block."""
    width: int
    rows: int
    bucket_mb: float
    """Of DDP; eight layers make this many megabytes of gradients and a few buckets."""


class How(NamedTuple):
    """How is recorded."""

    poll_s: float
    is_native: bool


FULL = {
    # `blocks` is --repeats, `pairs` is --pairs.
    "cpu": Sizes(calls=1000, blocks=0, pairs=0, steps=3, width=512, rows=192, bucket_mb=2),
    "cuda": Sizes(calls=1000, blocks=0, pairs=0, steps=20, width=4096, rows=16384, bucket_mb=64),
}
SMOKE = Sizes(calls=50, blocks=2, pairs=2, steps=2, width=64, rows=16, bucket_mb=0.03)
_TRIMMED = 0.2
_NUM_RESAMPLES = 2000
_WARM_UP_PAIRS = 3
_FIRST_CALLS = 20
"""Of a block, and a step before those that are timed: a ring's first pages, a thread's first turn and the first of a
kind, which comes through Python, are no cost of a step."""
_NUM_LAYERS = 8
Time = tuple[float, float]
"""Of a block: seconds by the clock, and seconds of CPU time of all the process's threads."""
Pairs = list[tuple[Time, Time]]
"""Neighbouring blocks: without the recorder, and with it."""


def main() -> int:
    """Measure and report."""
    parser = arguments(__doc__)
    parser.set_defaults(repeats=21)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--ranks", type=int, default=2, help="of the step (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=400, help="of blocks of steps (default: %(default)s)")
    parser.add_argument("--rows", type=int, help="of the step's input: its length (default: 192 on a CPU, 16384 else)")
    parser.add_argument("--poll-ms", type=float, default=20.0, help="how often ends are looked for")
    parser.add_argument(
        "--python", action="store_true", help="record from Python, as where the part in C++ is not built"
    )
    options = parser.parse_args()
    device = cast(Device, options.device)
    sizes = SMOKE if options.smoke else replace(FULL[device], blocks=options.repeats, pairs=options.pairs)
    sizes = replace(sizes, rows=options.rows or sizes.rows)
    parameters = {"device": device, "ranks": options.ranks, "poll_ms": options.poll_ms, "calls": sizes.calls}
    parameters |= {"rows": sizes.rows, "width": sizes.width, "recorder": "Python" if options.python else "C++"}
    report = Report("faulttol.overhead", parameters)
    if not options.python:
        compiled.build()
    how = How(options.poll_ms / 1e3, not options.python)
    with contextlib.ExitStack() as stack:
        num = min(options.ranks, torch.cuda.device_count()) if device == "cuda" else options.ranks
        ranks = [stack.enter_context(Rank(device, index)) for index in range(num)]
        one, all_of_them = stack.enter_context(store_folder()), stack.enter_context(store_folder())
        single = together(ranks[:1], _collectives, one, device, sizes, how, timeout_s=_TIMEOUT_S)[0]
        steps = together(ranks, _steps, all_of_them, device, sizes, how, timeout_s=_TIMEOUT_S)
    _report(report, single, steps, sizes)
    return report.finish(options)


def _report(
    report: Report,
    single: Pairs,
    steps: list[tuple[Pairs, float]],
    sizes: Sizes,
) -> None:
    for without, with_it in single:
        one, other = (block[0] / sizes.calls * 1e6 for block in (without, with_it))
        report.add("one collective, without", "call", "us", one)
        report.add("one collective, recorded", "call", "us", other)
        report.add("one collective", "cost", "us", other - one)
        report.add("one collective", "cost in CPU time", "us", (with_it[1] - without[1]) / sizes.calls * 1e6)
    for pairs in zip(*(blocks for blocks, _ in steps), strict=True):
        one, other = (max(pair[place][0] for pair in pairs) / sizes.steps * 1e3 for place in range(2))
        report.add("step, without", "step", "ms", one)
        report.add("step, recorded", "step", "ms", other)
        report.add("step", "cost", "%", (other / one - 1) * 100)
        one, other = (sum(pair[place][1] for pair in pairs) for place in range(2))
        report.add("step", "cost in CPU time", "%", (other / one - 1) * 100)
    calls_us = report.samples["one collective", "cost", "us"]
    in_us = interval(calls_us)
    a_step = steps[0][1]
    expected = a_step * in_us[1] / 1e3 / report.median("step, without", "step")
    report.add("step", "collectives", "1", a_step)
    report.bounds.append(
        Bound("expected cost of a step", expected * 100, "%", "collectives a step x cost a collective / step")
    )
    spread = statistics.pstdev(report.samples["step, without", "step", "ms"]) / report.median("step, without", "step")
    report.bounds.append(Bound("spread of steps without", spread * 100, "%", "standard deviation / median of blocks"))
    for what in ("cost", "cost in CPU time"):
        low, middle, high = interval(report.samples["step", what, "%"])
        report.add("step", f"{what}: interval of 95 %", "%", low, middle, high)
        limit = STEP_LIMIT * 100
        report.gates.append(Gate(f"% of a step, {what}, upper end", high, limit, high <= limit, is_speed=True))
    report.add("one collective", "cost: interval of 95 %", "us", *in_us)
    limit = COLLECTIVE_LIMIT_US
    report.gates.append(Gate("us a collective, upper end", in_us[2], limit, in_us[2] <= limit, is_speed=True))


def interval(samples: Sequence[float]) -> tuple[float, float, float]:
    """Return the trimmed mean of samples in the middle, and where it is with a probability of 95 %."""

    def trimmed(values: Sequence[float]) -> float:
        cut = int(_TRIMMED * len(values))
        return statistics.fmean(sorted(values)[cut : len(values) - cut])

    chance = random.Random(0)
    means = sorted(trimmed(chance.choices(samples, k=len(samples))) for _ in range(_NUM_RESAMPLES))
    return means[_NUM_RESAMPLES // 40], trimmed(samples), means[-1 - _NUM_RESAMPLES // 40]


def _collectives(rank: int, world_size: int, folder: str, device: Device, sizes: Sizes, how: How) -> Pairs:
    """By pair of blocks: seconds a call without the recorder, and with it."""
    join(rank, world_size, folder, device)
    x = torch.ones(16, device=device)

    def block() -> Time:
        for _ in range(_FIRST_CALLS):
            dist.all_reduce(x)
        _settle(device)
        begin = _now()
        for _ in range(sizes.calls):
            dist.all_reduce(x)
        return _since(begin)

    pairs = _alternate(block, folder, sizes.blocks, how)
    dist.destroy_process_group()
    return pairs


def _steps(rank: int, world_size: int, folder: str, device: Device, sizes: Sizes, how: How) -> tuple[Pairs, float]:
    """By pair of blocks: seconds without the recorder, and with it; and how many collectives a step has."""
    join(rank, world_size, folder, device)
    try:
        return _ddp_steps(rank, folder, device, sizes, how)
    finally:  # after its reducer: one that ends last waits with Python's lock for threads that need it
        dist.destroy_process_group()


def _ddp_steps(rank: int, folder: str, device: Device, sizes: Sizes, how: How) -> tuple[Pairs, float]:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    layers = (nn.Linear(sizes.width, sizes.width, device=device, dtype=dtype) for _ in range(_NUM_LAYERS))
    model = nn.parallel.DistributedDataParallel(nn.Sequential(*layers), bucket_cap_mb=sizes.bucket_mb)
    x = torch.ones(sizes.rows, sizes.width, device=device, dtype=dtype)

    def block() -> Time:
        model(x).sum().backward()
        dist.barrier()
        _settle(device)
        begin = _now()
        for step in range(sizes.steps):
            faulttol.mark_step(step)
            model(x).sum().backward()
        _settle(device)
        return _since(begin)

    pairs = _alternate(block, folder, sizes.pairs, how)
    faulttol.install(folder, generation=1, native=how.is_native)
    block()
    faulttol.uninstall()
    record = faulttol.read_ring(faulttol.ring_path(folder, rank, 1))
    return pairs, sum(event.step >= 0 for event in record.events) / sizes.steps


def _alternate(block: Callable[[], Time], folder: str, num_pairs: int, how: How) -> Pairs:
    """Return what blocks took, in pairs: without the recorder, and with it; each order as often as the other."""
    pairs = []
    for index in range(_WARM_UP_PAIRS + num_pairs):
        taken = {}
        for is_recorded in (False, True) if index % 2 else (True, False):
            if is_recorded:
                faulttol.install(folder, poll_s=how.poll_s, native=how.is_native)
            taken[is_recorded] = block()
            faulttol.uninstall()
        pairs.append((taken[False], taken[True]))
    return pairs[_WARM_UP_PAIRS:]


def _now() -> Time:
    return time.perf_counter(), time.process_time()


def _since(begin: Time) -> Time:
    return time.perf_counter() - begin[0], time.process_time() - begin[1]


def _settle(device: Device) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    raise SystemExit(main())
