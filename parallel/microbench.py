"""How fast ranks talk: every collective over sizes and groups, in the terms of nccl-tests.

The size of a case is what one rank holds of the whole: the buffer of all-reduce, broadcast and send/recv, the input of
reduce-scatter and all-to-all, the output of all-gather. Algorithm bandwidth is size / time. Bus bandwidth is what the
slowest link must have carried, and comparable between collectives and group sizes; for n ranks it is algorithm
bandwidth times

    all-reduce                                  2 (n - 1) / n    each byte is summed over n, then spread to n - 1
    reduce-scatter, all-gather, all-to-all        (n - 1) / n    a rank's own part does not travel
    broadcast, send/recv                                    1    (send/recv: to the next rank, from the one before)

All groups of a layout work at once, as they do in training; the time of a call is that of the slowest rank, averaged
over back-to-back calls. Every result is compared with its exact value before it is timed. `first call` is the making of
the groups and a first all-reduce in them, connecting included; `latency` a call of the smallest size.
"""

from __future__ import annotations

import functools
import math
import socket
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from parallel.bench import Bound, Gate, Report, table
from parallel.collectives import all_gather_single, reduce_scatter_single
from parallel.config import ParallelConfig
from parallel.groups import MeshGroups
from parallel.mesh import Along, Mesh
from parallel.ranks import Backend, device_of

Kind = Literal["all-reduce", "reduce-scatter", "all-gather", "broadcast", "all-to-all", "send-recv"]
KINDS: tuple[Kind, ...] = get_args(Kind)
DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
_WARM_UP_CALLS = 3


@dataclass(frozen=True, slots=True)
class Layout:
    """Groups to measure: those of a mesh over an axis."""

    name: str
    degrees: ParallelConfig
    axis: Along


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure."""

    layouts: tuple[Layout, ...]
    kinds: tuple[Kind, ...]
    sizes: tuple[int, ...]
    """In bytes; each is rounded down to what all ranks can share, at least one element a rank."""
    dtype: str
    backend: Backend
    repeats: int


@dataclass(frozen=True, slots=True)
class Measurement:
    """One collective of one size in the groups of one layout."""

    group: str
    kind: Kind
    num_ranks: int
    num_hosts: int
    """Most hosts that one group lies on."""
    num_bytes: int
    dtype: str
    backend: str
    times_s: tuple[float, ...]
    """Of one call, a value a repeat."""
    num_calls: int
    """Calls that one value is averaged over."""
    first_call_s: float | None
    """Of making these groups and a first all-reduce in them; None where the group of all ranks was there before."""
    num_wrong: int
    """Elements on all ranks that are not what they must be."""

    @property
    def bandwidths(self) -> tuple[float, float]:
        """Median algorithm and bus bandwidth, in bytes per second."""
        return bandwidths(self.kind, self.num_ranks, self.num_bytes, statistics.median(self.times_s))


def bus_factor(kind: Kind, num_ranks: int) -> float:
    """Return bus bandwidth over algorithm bandwidth."""
    n = num_ranks
    match kind:
        case "all-reduce":
            return 2 * (n - 1) / n
        case "reduce-scatter" | "all-gather" | "all-to-all":
            return (n - 1) / n
        case "broadcast" | "send-recv":
            return 1.0


def bandwidths(kind: Kind, num_ranks: int, num_bytes: int, time_s: float) -> tuple[float, float]:
    """Return (algorithm bandwidth, bus bandwidth) in bytes per second."""
    algorithm = num_bytes / time_s
    return algorithm, algorithm * bus_factor(kind, num_ranks)


def layouts_of(degrees: ParallelConfig, group_sizes: Sequence[int], num_ranks: int) -> tuple[Layout, ...]:
    """Return a layout for each axis of the mesh with several ranks, and for each size groups of neighbours.

    Raises:
        MeshError: the degrees do not fit the ranks, or a size does not divide them.
    """
    found = []
    for size in group_sizes:
        neighbours = ParallelConfig(replicate=num_ranks // size, tensor=size)
        Mesh(neighbours, num_ranks)
        found.append(Layout(f"{size} neighbours", neighbours, "tensor"))
    if degrees != ParallelConfig():
        mesh = Mesh(degrees, num_ranks)
        axes: tuple[Along, ...] = get_args(Along)
        found += [Layout(axis, degrees, axis) for axis in axes if mesh.size(axis) > 1]
    return tuple(found)


def measure(rank: int, world_size: int, plan: Plan) -> list[Measurement]:
    """Run the plan; every rank must call, and all return the same."""
    hosts: list[str] = [""] * world_size
    dist.all_gather_object(hosts, socket.gethostname())
    found = []
    for layout in plan.layouts:
        mesh = Mesh(layout.degrees, world_size)
        with MeshGroups(mesh) as groups:
            device = device_of(plan.backend)
            is_whole = mesh.size(layout.axis) == world_size
            first_call_s = _slowest(functools.partial(_first_call, groups, layout.axis, device), 1, device)
            group = groups.get(layout.axis)
            num_hosts = max(len({hosts[member] for member in members}) for members in mesh.groups(layout.axis))
            for kind in plan.kinds:
                for num_bytes in plan.sizes:
                    times_s, num_calls, wrong, exact_bytes = _measure_case(plan, kind, num_bytes, group, device)
                    found.append(
                        Measurement(
                            group=layout.name,
                            kind=kind,
                            num_ranks=group.size(),
                            num_hosts=num_hosts,
                            num_bytes=exact_bytes,
                            dtype=plan.dtype,
                            backend=plan.backend,
                            times_s=times_s,
                            num_calls=num_calls,
                            first_call_s=None if is_whole else first_call_s,
                            num_wrong=wrong,
                        )
                    )
    return found


def copy_rate(num_bytes: int, device: torch.device, repeats: int = 5) -> float:
    """Return bytes per second at which one tensor is copied into another: half the traffic of the memory."""
    source, target = (torch.ones(max(1, num_bytes), dtype=torch.uint8, device=device) for _ in range(2))
    target.copy_(source)
    times_s = [_time(lambda: target.copy_(source), 3, device) for _ in range(repeats)]
    return source.numel() / statistics.median(times_s)


def report_of(plan: Plan, measurements: Sequence[Measurement], copy_bytes_per_s: float) -> Report:
    """Return the measurements as a benchmark's report."""
    parameters = {
        "ranks": max(math.prod(_sizes(layout.degrees)) for layout in plan.layouts),
        "groups": [layout.name for layout in plan.layouts],
        "kinds": list(plan.kinds),
        "sizes": list(plan.sizes),
        "dtype": plan.dtype,
        "backend": plan.backend,
    }
    report = Report("parallel.collectives", parameters)
    smallest = min(m.num_bytes for m in measurements)
    for m in measurements:
        case = f"{m.group}: {m.kind} {m.num_bytes} B"
        report.add(case, "time", "s", *m.times_s)
        rates = [bandwidths(m.kind, m.num_ranks, m.num_bytes, time_s) for time_s in m.times_s]
        report.add(case, "algorithm bandwidth", "B/s", *(algorithm for algorithm, _ in rates))
        report.add(case, "bus bandwidth", "B/s", *(bus for _, bus in rates))
        if m.num_bytes == smallest:
            report.add(f"{m.group}: {m.kind}", "latency", "s", *m.times_s)
    for group, first_call_s in {m.group: m.first_call_s for m in measurements}.items():
        if first_call_s is not None:
            report.add(group, "first call", "s", first_call_s)
    how = f"copying {max(plan.sizes)} B from one tensor to another, on rank 0 alone"
    report.bounds.append(Bound("memory copy", copy_bytes_per_s, "B/s", how))
    wrong = sum(m.num_wrong for m in measurements)
    report.gates.append(Gate("wrong elements", wrong, 0, ok=wrong == 0))
    return report


def text_of(measurements: Sequence[Measurement]) -> str:
    """Return the measurements as a table to read."""
    head = ("GROUP", "RANKS", "COLLECTIVE", "BYTES", "TIME us", "MIN", "MAX", "ALGBW GB/s", "BUSBW GB/s", "WRONG")
    rows: list[Sequence[str]] = [head]
    for m in measurements:
        times_us = [f"{f(m.times_s) * 1e6:.1f}" for f in (statistics.median, min, max)]
        rates = [f"{rate / 1e9:.3f}" for rate in m.bandwidths]
        rows.append((m.group, str(m.num_ranks), m.kind, str(m.num_bytes), *times_us, *rates, str(m.num_wrong)))
    return table(rows)


def write_parquet(measurements: Sequence[Measurement], path: Path) -> None:
    """Write a row a measurement, for the planner: median, min and max time, both bandwidths, what was measured."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {
        "group": pa.array([m.group for m in measurements], pa.string()),
        "collective": pa.array([m.kind for m in measurements], pa.string()),
        "num_ranks": pa.array([m.num_ranks for m in measurements], pa.int32()),
        "num_hosts": pa.array([m.num_hosts for m in measurements], pa.int32()),
        "num_bytes": pa.array([m.num_bytes for m in measurements], pa.int64()),
        "dtype": pa.array([m.dtype for m in measurements], pa.string()),
        "backend": pa.array([m.backend for m in measurements], pa.string()),
        "median_s": pa.array([statistics.median(m.times_s) for m in measurements], pa.float64()),
        "min_s": pa.array([min(m.times_s) for m in measurements], pa.float64()),
        "max_s": pa.array([max(m.times_s) for m in measurements], pa.float64()),
        "algorithm_bytes_per_s": pa.array([m.bandwidths[0] for m in measurements], pa.float64()),
        "bus_bytes_per_s": pa.array([m.bandwidths[1] for m in measurements], pa.float64()),
        "first_call_s": pa.array([m.first_call_s for m in measurements], pa.float64()),
        "num_wrong": pa.array([m.num_wrong for m in measurements], pa.int64()),
    }
    pq.write_table(pa.table(columns), path)


def _first_call(groups: MeshGroups, axis: Along, device: torch.device) -> None:
    dist.all_reduce(torch.ones(1, device=device), group=groups.get(axis))


def _measure_case(
    plan: Plan, kind: Kind, num_bytes: int, group: ProcessGroup, device: torch.device
) -> tuple[tuple[float, ...], int, int, int]:
    """Return (times of a call, calls a time is averaged over, wrong elements, bytes) of one case."""
    dtype, n = DTYPES[plan.dtype], group.size()
    length = max(1, num_bytes // (dtype.itemsize * n)) * n
    operation, wrong = OPERATIONS[kind](group, length, dtype, device)
    operation()
    num_wrong = wrong().to(device)
    dist.all_reduce(num_wrong)
    num_calls = max(2, min(50, 2**22 // (length * dtype.itemsize)))
    for _ in range(_WARM_UP_CALLS):
        operation()
    times_s = tuple(_slowest(operation, num_calls, device) for _ in range(plan.repeats))
    return times_s, num_calls, int(num_wrong), length * dtype.itemsize


def _slowest(operation: Callable[[], object], num_calls: int, device: torch.device) -> float:
    """Return seconds of one of `num_calls` calls on the slowest of all ranks, which begin together."""
    dist.barrier()
    time_s = torch.tensor(_time(operation, num_calls, device), dtype=torch.float64, device=device)
    dist.all_reduce(time_s, op=dist.ReduceOp.MAX)
    return time_s.item()


def _time(operation: Callable[[], object], num_calls: int, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    begun_s = time.perf_counter()
    for _ in range(num_calls):
        operation()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - begun_s) / num_calls


Operation = tuple[Callable[[], None], Callable[[], Tensor]]
"""Do it; count the wrong elements of the result of the first time."""


def _pattern(length: int, offset: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return whole numbers that every dtype holds exactly, others for every offset."""
    return ((torch.arange(length, device=device) + 13 * offset) % 251).to(dtype)


def _addend(length: int, group: ProcessGroup, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return what this rank adds to `_pattern(length, 0)`: every n-th element, so that a missing rank shows."""
    mine = torch.arange(length, device=device) % group.size() == group.rank()
    return _pattern(length, 0, dtype, device) * mine


def _all_reduce(group: ProcessGroup, length: int, dtype: torch.dtype, device: torch.device) -> Operation:
    x = _addend(length, group, dtype, device)
    return lambda: _done(dist.all_reduce(x, group=group)), lambda: (x != _pattern(length, 0, dtype, device)).sum()


def _reduce_scatter(group: ProcessGroup, length: int, dtype: torch.dtype, device: torch.device) -> Operation:
    x = _addend(length, group, dtype, device)
    out = x.new_zeros(length // group.size())
    expected = _pattern(length, 0, dtype, device).chunk(group.size())[group.rank()]
    return lambda: _done(reduce_scatter_single(out, x, group=group)), lambda: (out != expected).sum()


def _all_gather(group: ProcessGroup, length: int, dtype: torch.dtype, device: torch.device) -> Operation:
    share = length // group.size()
    x = _pattern(share, group.rank(), dtype, device)
    out = x.new_zeros(length)
    expected = torch.cat([_pattern(share, rank, dtype, device) for rank in range(group.size())])
    return lambda: _done(all_gather_single(out, x, group=group)), lambda: (out != expected).sum()


def _broadcast(group: ProcessGroup, length: int, dtype: torch.dtype, device: torch.device) -> Operation:
    x = _pattern(length, 1 + group.rank(), dtype, device)
    expected = _pattern(length, 1, dtype, device)
    return lambda: _done(dist.broadcast(x, group=group, group_src=0)), lambda: (x != expected).sum()


def _all_to_all(group: ProcessGroup, length: int, dtype: torch.dtype, device: torch.device) -> Operation:
    n, share = group.size(), length // group.size()
    x = torch.cat([_pattern(share, group.rank() * n + to, dtype, device) for to in range(n)])
    expected = torch.cat([_pattern(share, origin * n + group.rank(), dtype, device) for origin in range(n)])
    out = torch.zeros_like(x)
    return lambda: _done(dist.all_to_all_single(out, x, group=group)), lambda: (out != expected).sum()


def _send_recv(group: ProcessGroup, length: int, dtype: torch.dtype, device: torch.device) -> Operation:
    n, rank = group.size(), group.rank()
    x, out = _pattern(length, rank, dtype, device), torch.zeros(length, dtype=dtype, device=device)
    expected = _pattern(length, (rank - 1) % n, dtype, device)

    def run() -> None:
        to_next = dist.P2POp(dist.isend, x, group=group, group_peer=(rank + 1) % n)
        from_last = dist.P2POp(dist.irecv, out, group=group, group_peer=(rank - 1) % n)
        for work in dist.batch_isend_irecv([to_next, from_last]):
            work.wait()

    return run, lambda: (out != expected).sum()


def _done(work: object) -> None:
    """Drop what a blocking collective returns."""


def _sizes(degrees: ParallelConfig) -> tuple[int, ...]:
    return degrees.pipeline, degrees.replicate, degrees.shard, degrees.context, degrees.tensor


OPERATIONS: Mapping[Kind, Callable[[ProcessGroup, int, torch.dtype, torch.device], Operation]] = {
    "all-reduce": _all_reduce,
    "reduce-scatter": _reduce_scatter,
    "all-gather": _all_gather,
    "broadcast": _broadcast,
    "all-to-all": _all_to_all,
    "send-recv": _send_recv,
}
