"""Faults for a job that is recorded and knows nothing of it: struck from outside, by signals to its ranks.

Which process a rank is stands in its ring; only ranks of this machine and boot can be struck, and a process number that
was given anew is noticed. What is struck is written down first, in `RUN/faults.jsonl`, as `faulttol.inject` does it.
A slow rank is stopped for a share of every 20 ms: no more can be done from outside, and no less is needed.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from faulttol.agent import process_state, start_ticks
from faulttol.errors import RunError
from faulttol.inject import Fault
from faulttol.ring import RingInfo, RingReader

_SLICE_S = 0.02
_SIGNALS = {"kill": signal.SIGKILL, "abort": signal.SIGABRT, "segfault": signal.SIGSEGV}
KINDS = (*_SIGNALS, "freeze", "slow", "cpu_hog")
"""What can be done to a process from outside."""


@dataclass(frozen=True, slots=True)
class Target:
    """A rank's process, surely the one that wrote the ring."""

    rank: int
    pid: int
    ticks: int

    @property
    def is_there(self) -> bool:
        """Whether it has not ended."""
        return process_state(self.pid, self.ticks) is not None


def targets(run: Path) -> dict[int, Target]:
    """Return the ranks of a run's newest generation that run on this machine.

    Raises: RunError where there are none.
    """
    newest: dict[int, tuple[RingInfo, bool]] = {}
    for path in sorted(run.rglob("*.ring")):
        with RingReader(path) as reader:
            info, is_here = reader.info, reader.is_here
        if info.rank not in newest or info.generation > newest[info.rank][0].generation:
            newest[info.rank] = info, is_here
    found = {}
    for rank, (info, is_here) in newest.items():
        ticks = start_ticks(info.pid) if is_here else 0
        if ticks and ticks / os.sysconf("SC_CLK_TCK") <= info.created_ns / 1e9:  # it is older than its ring
            found[rank] = Target(rank, info.pid, ticks)
    if not found:
        raise RunError(f"{run}: no rank of it runs on this machine; {len(newest)} rings were found")
    return found


def strike(
    target: Target,
    fault: Fault,
    record: Path,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Do to the process what the fault says; returns when it is over.

    `fault.seconds`: how long a process is frozen, slow or disturbed. `fault.factor`: how many times slower it becomes.

    Raises: ValueError for a kind that only the process can do to itself.
    """
    if fault.kind not in KINDS:
        raise ValueError(f"kind: {fault.kind} cannot be done from outside; one of {', '.join(KINDS)} can")
    _write_down(record, fault, target.rank, is_over=False)
    if fault.kind in _SIGNALS:
        os.kill(target.pid, _SIGNALS[fault.kind])
    elif fault.kind == "cpu_hog":
        hog = subprocess.Popen(["timeout", str(fault.seconds), "sh", "-c", "while :; do :; done"])
        os.sched_setaffinity(hog.pid, os.sched_getaffinity(target.pid))
        hog.wait()
    else:
        _stop_and_go(target, fault, sleep, clock)
    _write_down(record, fault, target.rank, is_over=True)


def plan(
    kinds: Sequence[str], ranks: Sequence[int], *, count: int, every_s: float, seed: int, template: Fault
) -> list[tuple[float, Fault]]:
    """Return (seconds from the beginning, fault), drawn at random and the same for one seed."""
    chance = random.Random(seed)
    found = []
    for index in range(count):
        values = asdict(template) | {"kind": chance.choice(list(kinds)), "rank": chance.choice(list(ranks))}
        found.append((index * every_s, Fault(**values)))
    return found


def _stop_and_go(target: Target, fault: Fault, sleep: Callable[[float], None], clock: Callable[[], float]) -> None:
    """Keep it stopped all the time, or for the share that makes it `factor` times slower; it goes on in any case."""
    until_s = clock() + fault.seconds
    stopped_s = fault.seconds if fault.kind == "freeze" else _SLICE_S * (1 - 1 / max(1.0, fault.factor))
    try:
        while clock() < until_s and target.is_there:
            os.kill(target.pid, signal.SIGSTOP)
            sleep(stopped_s)
            os.kill(target.pid, signal.SIGCONT)
            if fault.kind == "slow":
                sleep(_SLICE_S - stopped_s)
    except ProcessLookupError:
        return  # somebody ended it meanwhile
    finally:
        if target.is_there:
            os.kill(target.pid, signal.SIGCONT)


def _write_down(record: Path, fault: Fault, rank: int, *, is_over: bool) -> None:
    line = {"fault": asdict(fault), "rank": rank, "at_ns": time.monotonic_ns(), "is_over": is_over}
    with record.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
