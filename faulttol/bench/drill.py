"""What the recorder sees of real faults, and how fast survivors are free and together again: on gloo or on NCCL.

Stages, each with ranks and a timeout of its own; one that fails is told, and the others run:

    coverage     whoever starts collectives, also (on a GPU) while a CUDA graph is captured: calls counted by torch's
                 profiler against records, and how many of these the device timed
    SIGSTOP      a rank stops inside its loop: the rings of both are read from outside. Found: from the fault until the
                 others' open operation is older than --threshold. Named: the rank whose recorder gives no signs.
                 Freed: from the order to let go until the survivor's loop has its error or its end. Formed anew: from
                 there until the survivor and a warm spare have finished a collective of a new group
    SIGKILL      the same with a rank that dies; where the survivor gets an error of its own, that is when it is found
    timing       (on a GPU) a collective's duration as the recorder has it, against events of a stream that ran nothing
                 else: the difference is what the records are off
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist

import faulttol
from faulttol.bench import Gate, Report, arguments
from faulttol.bench.parts.callers import CALLERS, count
from faulttol.bench.parts.ranks import Device, Rank, RankError, join, leave, store_folder, together
from faulttol.events import CollectiveEvent
from faulttol.ring import RingReader

STAGES = ("coverage", "SIGSTOP", "SIGKILL", "timing")
_SMOKE_CALLERS = ("torch.distributed", "messages")
_TIMEOUT_S = 60.0
_STEPS_BEFORE = 20


def main() -> int:
    """Run the stages and report."""
    parser = arguments(__doc__)
    parser.set_defaults(repeats=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument("--threshold", type=float, default=1.0, metavar="S", help="age of a hang (default: 1 s)")
    options = parser.parse_args()
    device = cast(Device, options.device)
    if device == "cuda" and torch.cuda.device_count() < 2:
        parser.error(f"--device cuda: two ranks need a GPU each; there are {torch.cuda.device_count()}")
    report = Report("faulttol.drill", {"device": device, "threshold_s": options.threshold})
    for stage in options.stages:
        if stage == "timing" and device == "cpu":
            continue
        for _ in range(1 if options.smoke else options.repeats):
            begin = time.monotonic()
            try:
                if stage == "coverage":
                    _cover(report, device, options.smoke)
                elif stage == "timing":
                    _time(report, device)
                else:
                    _fault(report, device, stage, options.threshold)
            except RankError as error:
                report.gates.append(Gate(f"{stage}: {error}"[-2000:], 1, 0, ok=False))
            report.add(stage, "wall", "s", time.monotonic() - begin)
    return report.finish(options)


# Coverage.


def _cover(report: Report, device: Device, is_smoke: bool) -> None:
    names = [name for name in CALLERS if not is_smoke or name in _SMOKE_CALLERS]
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(store_folder())
        ranks = [stack.enter_context(Rank(device, index)) for index in range(2)]
        answers = together(ranks, _call_all, folder, device, names, timeout_s=_TIMEOUT_S)
        for rank, (counts, captured) in enumerate(answers):
            record = faulttol.read_ring(faulttol.ring_path(folder, rank))
            for name, called in counts.items():
                events = [event for event in record.events if event.phase == name]
                seen = Counter(event.kind for event in events)
                case = f"coverage, {name}"
                report.add(case, "calls", "1", called.total())
                report.add(case, "recorded", "1", seen.total())
                report.add(case, "ended", "1", sum(event.state == "ended" for event in events))
                report.add(case, "timed by the device", "1", sum(event.device_ns is not None for event in events))
                wrong = sum(((called - seen) + (seen - called)).values())
                report.gates.append(Gate(f"{case}, rank {rank}: miscounted", wrong, 0, ok=wrong == 0))
                unfinished = sum(event.state != "ended" for event in events)
                report.gates.append(Gate(f"{case}, rank {rank}: not ended", unfinished, 0, ok=unfinished == 0))
            report.gates.append(Gate(f"rank {rank}: lost", record.num_lost, 0, ok=record.num_lost == 0))
            if captured is not None:
                report.add("coverage, CUDA graph", "replays that were right", "1", float(captured))
                report.gates.append(Gate(f"rank {rank}: wrong graphs", not captured, 0, ok=bool(captured)))


def _call_all(
    rank: int, world_size: int, folder: str, device: Device, names: list[str]
) -> tuple[dict[str, Counter[str]], bool | None]:
    join(rank, world_size, folder, device)
    recorder = faulttol.install(folder)
    counts = count(rank, world_size, device, {name: CALLERS[name] for name in names})
    captured = _capture() if device == "cuda" else None
    _settle(device)
    dist.barrier()
    deadline = time.monotonic() + 10
    while recorder.num_pending and time.monotonic() < deadline:
        time.sleep(0.001)
    faulttol.uninstall()
    dist.destroy_process_group()
    return counts, captured


def _capture() -> bool:
    """Return whether a graph with a collective in it can be captured and replayed while others are recorded."""
    x = torch.ones(16, device="cuda")
    side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(side):
        dist.all_reduce(x)
    torch.cuda.synchronize()
    for _ in range(50):  # to be watched while the graph is captured
        dist.all_reduce(x, async_op=True)
    x.fill_(1)
    graph: Any = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        dist.all_reduce(x)
        time.sleep(0.1)  # several looks of the recorder's thread
    torch.cuda.synchronize()
    x.fill_(1)
    graph.replay()
    graph.replay()
    torch.cuda.synchronize()
    return bool(x[0].item() == dist.get_world_size() ** 2)


# Faults.


def _fault(report: Report, device: Device, stage: str, threshold_s: float) -> None:
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(store_folder())
        num = 2
        ranks = [stack.enter_context(Rank(device, index)) for index in range(num)]
        spare = stack.enter_context(Rank(device, num - 1))  # on the device of the one that is lost
        together([*ranks, spare], _warm, device, timeout_s=_TIMEOUT_S)
        together(ranks, _enter, folder, device, timeout_s=_TIMEOUT_S)
        for place, rank in enumerate(ranks):
            rank.tell(_loop, place, device)
        readers = [stack.enter_context(RingReader(faulttol.ring_path(folder, place))) for place in range(num)]
        _until(lambda: all(reader.num_begun > 3 * _STEPS_BEFORE for reader in readers), "steps before the fault")
        struck = time.monotonic()
        ranks[-1].signal(signal.SIGSTOP if stage == "SIGSTOP" else signal.SIGKILL)
        blamed = _find(ranks, readers, threshold_s)
        found = time.monotonic()
        report.add(stage, "found after", "s", found - struck)
        limit = threshold_s + 1
        report.gates += [
            Gate(f"{stage}: seconds to find", found - struck, limit, ok=found - struck <= limit),
            Gate(f"{stage}: rank named", blamed, num - 1, ok=blamed == num - 1),
        ]
        ranks[-1].signal(signal.SIGKILL)  # what fencing does to a rank that only stopped
        taken = ranks[0].let_go(_TIMEOUT_S)
        kind = ranks[0].answer(_TIMEOUT_S)
        freed = time.monotonic()
        report.add(stage, "letting go", "s", taken)
        report.add(stage, f"freed after ({kind})", "s", freed - found)
        sums = together([ranks[0], spare], _form_anew, folder, device, timeout_s=_TIMEOUT_S)
        formed = time.monotonic()
        report.add(stage, "formed anew after", "s", formed - freed)
        report.add(stage, "fault to first collective", "s", formed - struck)
        wrong = sum(value != num for value in sums)
        report.gates.append(Gate(f"{stage}: wrong sums of the new group", wrong, 0, ok=wrong == 0))


def _warm(place: int, num: int, device: Device) -> None:
    """Load what a first collective would."""
    import torch.distributed._functional_collectives

    torch.ones(1, device=device).sum().item()


def _enter(rank: int, world_size: int, folder: str, device: Device) -> None:
    join(rank, world_size, folder, device)
    faulttol.install(folder)


def _loop(rank: int, device: Device) -> str:
    """Step until that ends; return by what."""
    x = torch.ones(1 << 20, device=device)
    step = 0
    try:
        while True:
            faulttol.mark_step(step)
            dist.all_reduce(x)
            dist.all_reduce(x[:1024])
            x.fill_(1)
            if x[0].item() != 1:  # waits for the device, as a loop that reads its loss does
                raise AssertionError
            step += 1
    except RuntimeError as error:
        kind = type(error).__name__
        faulttol.uninstall()
        error.__traceback__ = None
        return kind


def _find(ranks: list[Rank], readers: list[RingReader], threshold_s: float) -> int:
    """Return the rank to blame for an operation that failed, or has been open for longer than the threshold.

    It is the one that is dead, or whose recorder gives no signs, or that has not entered the operation.
    """
    entered: dict[int, int] = {}
    waiting: dict[int, dict[int, CollectiveEvent]] = {place: {} for place in range(len(readers))}
    found: list[int] = []

    def look() -> bool:
        limit_ns = threshold_s * 1e9
        for place, reader in enumerate(readers):
            record = reader.poll()
            for event in record.events:
                entered[place] = max(entered.get(place, 0), event.seq)
                waiting[place].pop(event.index, None)
                if event.state != "ended":
                    waiting[place][event.index] = event
            now = time.monotonic_ns()
            stuck = [e for e in waiting[place].values() if e.state == "failed" or now - e.begin_ns > limit_ns]
            if stuck:
                dead = [p for p, rank in enumerate(ranks) if not rank.process.is_alive()]
                silent = [p for p, r in enumerate(readers) if now - r.sign_ns > limit_ns / 2]
                oldest = min(event.seq for event in stuck)
                absent = [p for p, seq in entered.items() if seq < oldest]
                found.extend([*dead, *silent, *absent, -1])
                return True
        return False

    _until(look, "an operation that hangs", 0.01)
    return found[0]


def _form_anew(place: int, num: int, folder: str, device: Device) -> float:
    """Join the group of the next generation, recorded; return a sum over it."""
    if place == 0:
        leave()
    Path(folder).mkdir(exist_ok=True)
    join(place, num, folder, device, generation=1)
    faulttol.install(folder, generation=1)
    x = torch.ones(4, device=device)
    dist.all_reduce(x)
    value = x[0].item()
    faulttol.uninstall()
    return value


# Timing.


def _time(report: Report, device: Device) -> None:
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(store_folder())
        ranks = [stack.enter_context(Rank(device, index)) for index in range(min(2, torch.cuda.device_count()))]
        for rank, (measured, begun) in enumerate(
            together(ranks, _time_collectives, folder, device, timeout_s=_TIMEOUT_S)
        ):
            record = faulttol.read_ring(faulttol.ring_path(folder, rank))
            big = [event for event in record.events if event.step == 1]
            for event, seconds, begin_ns in zip(big, measured, begun, strict=True):
                report.add("timing", "measured", "ms", seconds * 1e3)
                if event.device_ns is None:
                    continue
                report.add("timing", "recorded", "ms", event.device_ns / 1e6)
                report.add("timing", "recorded begin - host's call", "ms", (event.started_ns - begin_ns) / 1e6)
            untimed = sum(event.device_ns is None for event in big)
            report.gates.append(Gate(f"timing, rank {rank}: untimed", untimed, 0, ok=untimed == 0))


def _time_collectives(rank: int, world_size: int, folder: str, device: Device) -> tuple[list[float], list[int]]:
    """Return what each of some large collectives took by events around it, and when it was called."""
    join(rank, world_size, folder, device)
    recorder = faulttol.install(folder)
    x = torch.ones(64 << 20, device=device)
    faulttol.mark_step(0)
    for _ in range(3):
        dist.all_reduce(x)
    torch.cuda.synchronize()
    dist.barrier()
    torch.cuda.synchronize()
    faulttol.mark_step(1)
    make: Any = torch.cuda.Event
    measured, begun = [], []
    for _ in range(5):
        begin, end = make(enable_timing=True), make(enable_timing=True)
        begun.append(time.monotonic_ns())
        begin.record()
        dist.all_reduce(x)
        end.record()
        torch.cuda.synchronize()
        measured.append(begin.elapsed_time(end) / 1e3)
    deadline = time.monotonic() + 10
    while recorder.num_pending and time.monotonic() < deadline:
        time.sleep(0.001)
    faulttol.uninstall()
    dist.destroy_process_group()
    return measured, begun


def _settle(device: Device) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _until(reached: Callable[[], bool], what: str, pause_s: float = 0.005, timeout_s: float = _TIMEOUT_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not reached():
        if time.monotonic() > deadline:
            raise RankError(f"{what}: not seen in {timeout_s:g} s")
        time.sleep(pause_s)


if __name__ == "__main__":
    raise SystemExit(main())
