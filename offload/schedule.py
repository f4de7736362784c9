"""Which subgroup of the optimizer's state is updated where and when, and how long a step takes: pure functions.

A subgroup is a run of parameters whose fp32 master, first and second moment travel together. It takes one of four
paths: `cpu` (updated in DRAM; 2 bytes a parameter down, 2 up), `stream` (states to the device and back, 12 bytes each
way, updated there), `resident` (states stay on the device) and `tier` (states live out of core and are updated on the
CPU between a read and a write). Follows Deep Optimizer States (arXiv 2410.21316) in interleaving CPU and device,
Fuyou (2403.06504) in updating as gradients arrive, and MLP-Offload in walking an out-of-core tier to and fro; differs:
the share of each path comes from measured rates of both at once instead of a fixed stride, updates may run under the
next forward, where clipping allows no earlier start, and all of it is exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Literal

from offload.errors import SpecError

Path = Literal["cpu", "stream", "resident", "tier"]
Mode = Literal["sync", "defer", "stream", "spec"]

STATE_BYTES = 12
"""fp32 master and two moments of a parameter."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of elements of one parameter inside a subgroup."""

    parameter: int
    start: int
    """First element, in the flattened parameter."""
    count: int
    offset: int
    """Where they are in the subgroup."""


@dataclass(frozen=True, slots=True)
class Subgroup:
    """A run of parameters of one group, of one dtype."""

    index: int
    group: int
    start: int
    """First element, in the group's parameters laid end to end."""
    count: int
    pieces: tuple[Piece, ...]


def cut(groups: Sequence[Sequence[int]], numel: int) -> list[Subgroup]:
    """Cut every group's parameters, given by their sizes and laid end to end, into subgroups of `numel` elements.

    Parameters are numbered through all groups. Subgroups come in the order of their first parameter.
    """
    if numel < 1:
        raise SpecError(f"subgroup_numel: {numel}; at least 1")
    found: list[tuple[int, int, tuple[Piece, ...]]] = []
    first = 0
    for group, sizes in enumerate(groups):
        pieces: list[Piece] = []
        start = filled = 0
        for number, size in enumerate(sizes, first):
            taken = 0
            while taken < size:
                count = min(size - taken, numel - filled)
                pieces.append(Piece(number, taken, count, filled))
                taken, filled = taken + count, filled + count
                if filled == numel:
                    found.append((group, start, tuple(pieces)))
                    pieces, start, filled = [], start + filled, 0
        if pieces:
            found.append((group, start, tuple(pieces)))
        first += len(sizes)
    found.sort(key=lambda entry: (entry[2][0].parameter, entry[2][0].start))
    return [
        Subgroup(index, group, start, sum(piece.count for piece in pieces), pieces)
        for index, (group, start, pieces) in enumerate(found)
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """What this machine does, in parameters or bytes a second."""

    cpu: float
    """Parameters updated by the CPU, alone."""
    device: float
    """Parameters updated by the device."""
    up: float
    """Bytes from host to device, alone."""
    down: float
    """Bytes from device to host, alone."""
    both: float
    """Bytes of both ways at once, summed."""
    cpu_beside: float | None = None
    """Parameters updated by the CPU while states are streamed; None: as alone."""
    stream_beside: float | None = None
    """Parameters streamed while the CPU updates others, whose gradients and values cross the link too; None: what
    these leave of it."""
    tier_read: float = math.inf
    tier_write: float = math.inf

    def __post_init__(self) -> None:
        names = ("cpu", "device", "up", "down", "both", "cpu_beside", "stream_beside", "tier_read", "tier_write")
        values = {name: getattr(self, name) for name in names}
        wrong = [f"{name}: {value}; above 0" for name, value in values.items() if value is not None and not value > 0]
        if wrong:
            raise SpecError("\n".join(f"rates: {problem}" for problem in wrong))

    @property
    def stream(self) -> float:
        """Parameters streamed to the device and back, alone."""
        way = min(self.up, self.down, self.both / 2)
        return min(self.device, way / STATE_BYTES)

    @property
    def beside(self) -> tuple[float, float]:
        """Parameters a second of the CPU and of the stream while both run."""
        cpu = self.cpu_beside or self.cpu
        if self.stream_beside:
            return cpu, self.stream_beside
        way = min(self.up, self.down, self.both / 2)
        return cpu, min(self.device, max(0.1 * way, way - 2 * cpu) / STATE_BYTES)

    @property
    def tier(self) -> float:
        """Parameters whose states are read, updated and written back."""
        each_s = STATE_BYTES / self.tier_read + STATE_BYTES / self.tier_write
        return 1 / max(each_s, 1 / self.cpu)


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """What a plan may use."""

    device_bytes: int = 2 << 30
    """Device memory for states: buffers of streams first, resident states with the rest."""
    host_bytes: int | None = None
    """Host memory for states; what does not fit goes to the tier. None: everything fits."""
    num_slots: int = 3
    """Subgroups on their way through the device at once."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The path of every subgroup, and why."""

    paths: tuple[Path, ...]
    num_slots: int
    reason: str

    def numel(self, subgroups: Sequence[Subgroup], path: Path) -> int:
        """Parameters on a path."""
        return sum(group.count for group, taken in zip(subgroups, self.paths, strict=True) if taken == path)


Interleave = int | Literal["auto", "cpu"]


def plan(
    counts: Sequence[int], rates: Rates | None, *, interleave: Interleave = "auto", budget: Budget | None = None
) -> Plan:
    """Return the path of subgroups of so many parameters, in the order in which a forward needs them.

    `interleave=k` streams every k-th of those that are neither resident nor in the tier (1: all), `cpu` none; `auto`
    gives each to whichever of CPU and stream would have it done first, which needs `rates`.

    The first subgroups are resident: their gradients come last and the next forward needs them first. The last ones
    are in the tier: they have the longest time to be read.
    """
    budget = budget or Budget()
    if not (interleave in ("auto", "cpu") or (isinstance(interleave, int) and interleave >= 1)):
        raise SpecError(f"interleave: {interleave!r}; allowed: 'auto', 'cpu', or at least 1")
    if interleave == "auto" and rates is None:
        raise SpecError("interleave: 'auto' needs measured rates; calibrate, or give a number or 'cpu'")
    paths: list[Path] = ["cpu"] * len(counts)
    slot_bytes = STATE_BYTES * max(counts, default=0)
    num_slots = budget.num_slots if slot_bytes else 0
    while num_slots > 1 and num_slots * slot_bytes > budget.device_bytes:
        num_slots -= 1
    streams = interleave != "cpu" and 0 < num_slots * slot_bytes <= budget.device_bytes
    if interleave not in ("auto", "cpu") and not streams and counts:
        raise SpecError(
            f"device_bytes: {budget.device_bytes}; a subgroup on its way through the device takes {slot_bytes}: "
            "give it that, or make subgroups smaller"
        )
    left = budget.device_bytes - (num_slots * slot_bytes if streams else 0)
    for index, count in enumerate(counts):
        if STATE_BYTES * count > left:
            break
        paths[index], left = "resident", left - STATE_BYTES * count
    room = math.inf if budget.host_bytes is None else budget.host_bytes
    for index, count in enumerate(counts):
        if paths[index] == "cpu":
            room -= STATE_BYTES * count
            if room < 0:
                paths[index] = "tier"
    _interleave(paths, counts, interleave if streams else "cpu", rates)
    shares = {path: sum(c for c, p in zip(counts, paths, strict=True) if p == path) for path in sorted(set(paths))}
    reason = ", ".join(f"{path} {share / 1e6:.4g}M" for path, share in shares.items())
    return Plan(tuple(paths), num_slots if streams else 0, reason)


def _interleave(paths: list[Path], counts: Sequence[int], interleave: Interleave, rates: Rates | None) -> None:
    on_host = [index for index, path in enumerate(paths) if path == "cpu"]
    if interleave == "cpu" or not on_host:
        return
    if isinstance(interleave, int):
        for index in on_host[interleave - 1 :: interleave]:
            paths[index] = "stream"
        return
    assert rates is not None
    cpu, stream = rates.beside
    cpu_s = stream_s = 0.0
    for index in on_host:
        on_cpu, streamed = cpu_s + counts[index] / cpu, stream_s + counts[index] / stream
        if streamed < on_cpu:
            paths[index], stream_s = "stream", streamed
        else:
            cpu_s = on_cpu


@dataclass(frozen=True, slots=True)
class Timeline:
    """What the model predicts of one step, from the start of a backward to the start of the next one."""

    step_s: float
    backward_s: float
    exposed_s: float
    """Time that is neither forward nor backward."""
    update_s: float
    """From the first update's start to the last one's end."""
    busy_s: dict[str, float]
    """Time that each of `cpu`, `device` works on updates."""


@dataclass(slots=True)
class _Server:
    """One of the two that update, with the subgroups that it still has to."""

    waiting: list[int]
    current: int | None = None
    left: float = 0.0
    busy_s: float = 0.0


def predict(
    counts: Sequence[int],
    paths: Sequence[Path],
    rates: Rates,
    *,
    forward_s: float,
    backward_s: float,
    mode: Mode,
    prefetched: Set[int] = frozenset(),
) -> Timeline:
    """Return the timeline of a step whose forward and backward take so long on the device.

    The states of `prefetched` subgroups of `stream` are on the device before backward ends.

    Gradients arrive evenly in backward, the last subgroup's first. Updates start at their gradients' arrival in
    `stream` and `spec`, after backward otherwise; of what is there, what forward needs first is first. The forward
    of a subgroup's parameters starts when it is updated and the forward before it is done; in `sync` when all are.
    """
    total = sum(counts) or 1
    arrival, behind = [0.0] * len(counts), 0
    for index in reversed(range(len(counts))):
        behind += counts[index]
        arrival[index] = backward_s * behind / total
    early = mode in ("stream", "spec")
    ready = arrival if early else [backward_s] * len(counts)
    done = [0.0] * len(counts)
    host = _Server([i for i, path in enumerate(paths) if path in ("cpu", "tier")])
    device = _Server([i for i, path in enumerate(paths) if path in ("stream", "resident")])
    works = ["prefetched" if index in prefetched else path for index, path in enumerate(paths)]
    now = _serve(host, device, counts, works, rates, ready, done)
    clock = max(now, backward_s) if mode == "sync" else backward_s
    for index, count in enumerate(counts):
        # The way up of a CPU subgroup's parameters.
        lag = 2 * count / rates.up if paths[index] in ("cpu", "tier") else 0.0
        clock = max(clock, done[index] + lag) + forward_s * count / total
    step_s = max(clock, backward_s + forward_s)
    first = min((ready[i] for i in range(len(counts))), default=0.0)
    return Timeline(
        step_s,
        backward_s,
        step_s - forward_s - backward_s,
        max(0.0, now - first),
        {"cpu": host.busy_s, "device": device.busy_s},
    )


def _serve(
    host: _Server,
    device: _Server,
    counts: Sequence[int],
    works: Sequence[str],
    rates: Rates,
    ready: Sequence[float],
    done: list[float],
) -> float:
    """Fill in when each subgroup is updated; return when the last one is. Two servers that slow each other down."""
    now = 0.0
    while host.waiting or device.waiting or host.current is not None or device.current is not None:
        for server in (host, device):
            if server.current is None:
                _start(server, counts, ready, now)
        speeds = [_speed(server, other, works, rates) for server, other in ((host, device), (device, host))]
        ends = [
            now + server.left / speed
            for server, speed in zip((host, device), speeds, strict=True)
            if server.current is not None
        ]
        arrivals = [
            max(now, min(ready[i] for i in server.waiting))
            for server in (host, device)
            if server.current is None and server.waiting
        ]
        then = min(ends + arrivals)
        for server, speed in zip((host, device), speeds, strict=True):
            if server.current is not None:
                server.left -= (then - now) * speed
                server.busy_s += then - now
                if server.left <= 1e-9 * counts[server.current]:
                    done[server.current], server.current = then, None
        now = then
    return now


def _start(server: _Server, counts: Sequence[int], ready: Sequence[float], now: float) -> None:
    arrived = [index for index in server.waiting if ready[index] <= now]
    if arrived:
        server.current = min(arrived)
        server.waiting.remove(server.current)
        server.left = float(counts[server.current])


def _speed(server: _Server, other: _Server, works: Sequence[str], rates: Rates) -> float:
    if server.current is None:
        return 1.0
    work = works[server.current]
    beside = None if other.current is None else works[other.current]
    if work == "resident":
        return rates.device
    if work == "tier":
        return rates.tier
    if work == "stream":
        return rates.stream if beside is None else rates.beside[1]
    if work == "prefetched":  # only the way down is left
        return min(rates.device, rates.down / STATE_BYTES)
    if beside == "prefetched":
        return (rates.cpu + rates.beside[0]) / 2  # half of the copies that calibration saw
    return rates.beside[0] if beside == "stream" else rates.cpu
