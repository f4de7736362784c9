"""Faults on schedule, to test with: each is written down before it strikes, so that a test can see it did.

Nothing here needs a privilege. A rank strikes itself, at the beginning of a step (`Injector.at`). What only the program
can do wrong it asks the injector about: `skips` before a collective, `corrupt` before gradients are reduced, `flip`
after the optimizer's step, `tokens` when it makes a batch. `KINDS` says of every kind what a detector should find, and
of the benign ones that it should find nothing to act on.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import math
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from faulttol import sockets
from faulttol.errors import InjectedFault
from faulttol.finding import FindingKind

if TYPE_CHECKING:
    import torch

_ENDLESS_S = 3600.0
_HOG_S = 60.0
"""A process that keeps a CPU busy does so for no longer, unless the fault says."""


@dataclass(frozen=True, slots=True)
class KindInfo:
    """What a kind of fault is, and what should be found of it."""

    what: str
    finding: FindingKind | None
    """None: benign."""
    also: frozenset[FindingKind] = frozenset()
    """Findings that say the same thing from what is seen at another level."""
    is_lasting: bool = False
    """It acts in every step from `step` on, for `num_steps` steps."""
    is_link: bool = False
    """It acts on connections: `to_rank`, `rate_bytes_per_s`."""


_STOPPED = frozenset({FindingKind.FREEZE, FindingKind.HANG, FindingKind.STUCK, FindingKind.COMMUNICATION_HANG})

KINDS: Mapping[str, KindInfo] = {
    "raise": KindInfo("raises InjectedFault", FindingKind.CRASH),
    "exit": KindInfo("exits at once with status 17", FindingKind.CRASH),
    "abort": KindInfo("aborts, as a failed assertion of native code does", FindingKind.CRASH),
    "segfault": KindInfo("reads address 0", FindingKind.CRASH),
    "kill": KindInfo("SIGKILL to itself", FindingKind.CRASH),
    "freeze": KindInfo("SIGSTOP to itself, for `seconds`", FindingKind.FREEZE, _STOPPED),
    "gil": KindInfo("native code keeps the GIL, for `seconds`", FindingKind.STUCK, _STOPPED),
    "hang": KindInfo("sleeps, for `seconds`", FindingKind.HANG, _STOPPED),
    "spin": KindInfo("runs an empty Python loop, for `seconds`", FindingKind.HANG, _STOPPED),
    "checkpoint_stall": KindInfo("a write in phase `checkpoint` stalls, for `seconds`", FindingKind.HANG, _STOPPED),
    "stuck_link": KindInfo(
        "what the rank sends to `to_rank` is dropped there",
        FindingKind.COMMUNICATION_HANG,
        frozenset(),
        is_lasting=True,
        is_link=True,
    ),
    "extra": KindInfo("makes an all-reduce that nobody else makes", FindingKind.DESYNC),
    "wrong_kind": KindInfo("makes a broadcast that nobody else makes", FindingKind.DESYNC),
    "wrong_dtype": KindInfo("makes an all-reduce of another dtype first", FindingKind.DESYNC),
    "skip": KindInfo("leaves out the collectives of one step", FindingKind.DESYNC),
    "slow": KindInfo("works `seconds` longer in every step", FindingKind.STRAGGLER, is_lasting=True),
    "slow_jitter": KindInfo(
        "works 0.5 to 1.5 times `seconds` longer in every step", FindingKind.STRAGGLER, is_lasting=True
    ),
    "slow_ramp": KindInfo(
        "works longer from step to step, up to `seconds` after 16", FindingKind.STRAGGLER, is_lasting=True
    ),
    "cpu_hog": KindInfo("a busy process on the CPUs that the rank may use", FindingKind.STRAGGLER, is_lasting=True),
    "shared_cpu": KindInfo(
        "is bound to one CPU, which `factor` busy processes use too", FindingKind.STRAGGLER, is_lasting=True
    ),
    "slow_link": KindInfo(
        "the link to `to_rank` carries `rate_bytes_per_s`",
        FindingKind.COMMUNICATION_SLOW,
        is_lasting=True,
        is_link=True,
    ),
    "slow_sender": KindInfo(
        "all that the rank sends is held to `rate_bytes_per_s` a connection",
        FindingKind.COMMUNICATION_SLOW,
        is_lasting=True,
        is_link=True,
    ),
    "slow_receiver": KindInfo(
        "all that is sent to `to_rank` is held to `rate_bytes_per_s` a connection; every rank's own share",
        FindingKind.COMMUNICATION_SLOW,
        is_lasting=True,
        is_link=True,
    ),
    "nan": KindInfo("a gradient becomes NaN", FindingKind.NUMERIC),
    "gradient": KindInfo("a gradient is multiplied by `factor`", FindingKind.NUMERIC),
    "bit_flip": KindInfo("one bit of one parameter is inverted", FindingKind.NUMERIC),
    "gc_pause": KindInfo("a garbage collection, then a pause of `seconds`", None),
    "evaluation": KindInfo("evaluates for `seconds`, in phase `evaluation`", None),
    "checkpoint": KindInfo("writes for `seconds`, in phase `checkpoint`", None),
    "compile": KindInfo("compiles for 0.3 to 1 times `seconds`, each rank for its own time; in a first step", None),
    "uneven": KindInfo(
        "ranks take turns in working `seconds` longer", None, frozenset({FindingKind.DATA_IMBALANCE}), is_lasting=True
    ),
    "imbalance": KindInfo(
        "has `factor` times the tokens, and works that much longer",
        None,
        frozenset({FindingKind.DATA_IMBALANCE}),
        is_lasting=True,
    ),
    "jitter": KindInfo("works up to `seconds` longer, at random", None, is_lasting=True),
    "all_slow": KindInfo("all ranks work `seconds` longer", None, is_lasting=True),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """One fault of one rank."""

    kind: str
    """A key of KINDS."""
    rank: int
    """-1: every rank."""
    step: int
    """The step at whose beginning it strikes."""
    num_steps: int = 0
    """Of what lasts: for how many steps; 0: for good."""
    seconds: float = 0.0
    """Of a pause: how long, 0 for good. Of a slow rank: how much longer a step."""
    to_rank: int = -1
    """Of a link: the receiver."""
    rate_bytes_per_s: int = 0
    """Of a slow link: what it still carries."""
    factor: float = 2.0
    """Of a gradient or a batch: multiplied by this."""
    tensor: str = ""
    """Of numbers: which one; empty for the largest."""
    element: int = 0
    bit: int = 20
    seed: int = 0
    """Of what is random."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"fault: kind: {self.kind!r} is unknown; one of {', '.join(KINDS)}")

    @property
    def info(self) -> KindInfo:
        """What its kind is."""
        return KINDS[self.kind]


@dataclass(frozen=True, slots=True)
class Strike:
    """One line of the record."""

    fault: Fault
    rank: int
    at_ns: int
    """`time.monotonic_ns()` of the rank's machine."""
    is_over: bool
    """False: it strikes now; True: it stops acting."""


class Injector:
    """One rank's share of a schedule; call `at` at the start of each step.

    `connections` (`faulttol.sockets.connections`) are needed for faults of links. `mark_phase` is told of the phases
    in which the rank evaluates or writes, as `Recorder.mark_phase` is. The CPUs that the process may use when it makes
    the injector are those that it has back after `shared_cpu`.
    """

    def __init__(
        self,
        schedule: Sequence[Fault],
        *,
        rank: int,
        record: Path,
        connections: Mapping[int, Sequence[int]] | None = None,
        mark_phase: Callable[[str], None] | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._rank = rank
        self._record = record
        self._connections = connections
        self._sleep = sleep
        self._cpus = os.sched_getaffinity(0)
        self._mark_phase = mark_phase or (lambda phase: None)
        self._acting: dict[Fault, random.Random] = {}
        self._hogs: dict[Fault, _Hogs] = {}
        self._schedule: list[Fault] = []
        for fault in schedule:
            self.add(fault)

    def add(self, fault: Fault) -> None:
        """Take one more fault into the schedule, if it is one of this rank."""
        if not self._is_mine(fault):
            return
        if fault.info.is_link and self._connections is None:
            raise ValueError(f"fault: kind: {fault.kind} acts on connections; give Injector(connections=…)")
        self._schedule.append(fault)

    def at(self, step: int) -> None:
        """Strike with what is scheduled for this step, after appending it to the record."""
        for fault in [one for one in self._acting if one.num_steps and step >= one.step + one.num_steps]:
            self._stop(fault)
        for fault in self._schedule:
            if fault.step == step:
                self._write_down(fault, is_over=False)
                if fault.info.is_lasting:
                    self._acting[fault] = random.Random(fault.seed)
                    self._start(fault)
                else:
                    self._strike(fault)
        for fault, chance in self._acting.items():
            self._sleep(_extra_s(fault, self._rank, step, chance))

    def skips(self, step: int) -> bool:
        """True in a step whose collectives the rank is to leave out."""
        return any(fault.kind == "skip" and fault.step == step for fault in self._schedule)

    def tokens(self, step: int, usual: int) -> int:
        """Return how many tokens the rank has in the step, of usually so many."""
        factors = [fault.factor for fault in self._acting if fault.kind == "imbalance"]
        return round(usual * math.prod(factors))

    def corrupt(self, step: int, tensors: Mapping[str, torch.Tensor]) -> bool:
        """Damage one of the rank's gradients, before they are reduced, if the schedule says so; whether it did."""
        return self._damage(("nan", "gradient"), step, tensors)

    def flip(self, step: int, tensors: Mapping[str, torch.Tensor]) -> bool:
        """Invert a bit of one of the rank's parameters if the schedule says so; whether it did."""
        return self._damage(("bit_flip",), step, tensors)

    def _damage(self, kinds: tuple[str, ...], step: int, tensors: Mapping[str, torch.Tensor]) -> bool:
        chosen = [fault for fault in self._schedule if fault.step == step and fault.kind in kinds]
        for fault in chosen:
            name = fault.tensor or max(tensors, key=lambda key: tensors[key].numel())
            _damage(fault, tensors[name])
        return bool(chosen)

    def close(self) -> None:
        """Stop what still acts. Idempotent."""
        for fault in list(self._acting):
            self._stop(fault)

    def _is_mine(self, fault: Fault) -> bool:
        if fault.kind == "stuck_link":
            return fault.to_rank == self._rank
        return fault.rank in (self._rank, -1)

    def _start(self, fault: Fault) -> None:
        if fault.kind == "stuck_link":
            sockets.block(self._descriptors(fault))
        elif fault.info.is_link:
            sockets.pace(self._descriptors(fault), fault.rate_bytes_per_s)
        if fault.kind == "cpu_hog":
            self._hogs[fault] = _Hogs(1, fault.seconds)
        elif fault.kind == "shared_cpu":
            cpus = sorted(self._cpus)
            _bind({cpus[os.getpid() % len(cpus)]})  # of other jobs of this machine the same rank may be bound as well
            self._hogs[fault] = _Hogs(max(1, round(fault.factor)), fault.seconds)

    def _stop(self, fault: Fault) -> None:
        if fault.kind == "stuck_link":
            sockets.unblock(self._descriptors(fault))
        elif fault.info.is_link:
            sockets.pace(self._descriptors(fault), sockets.UNPACED)
        if (hogs := self._hogs.pop(fault, None)) is not None:
            hogs.close()
        del self._acting[fault]
        if fault.kind == "shared_cpu" and not any(other.kind == "shared_cpu" for other in self._acting):
            _bind(self._cpus)
        self._write_down(fault, is_over=True)

    def _descriptors(self, fault: Fault) -> list[int]:
        assert self._connections is not None
        if fault.kind == "stuck_link":
            return list(self._connections.get(fault.rank, ()))
        ranks = [fault.to_rank] if fault.to_rank >= 0 else [rank for rank in self._connections if rank != self._rank]
        return [descriptor for rank in ranks for descriptor in self._connections.get(rank, ())]

    def _strike(self, fault: Fault) -> None:
        if fault.kind == "raise":
            raise InjectedFault(f"injected at step {fault.step} of rank {self._rank}")
        if fault.kind in _PHASES:
            self._mark_phase(_PHASES[fault.kind])
        if fault.kind == "gc_pause":
            gc.collect()
        if fault.kind == "compile":
            self._pause(random.Random(f"{fault.seed} {self._rank}").uniform(0.3, 1.0) * fault.seconds)
        elif fault.kind in _PAUSES:
            self._pause(fault.seconds)
        elif fault.kind in _STRIKES:
            _STRIKES[fault.kind](fault)

    def _pause(self, seconds: float) -> None:
        """Sleep for so long, or for good."""
        while not seconds:
            self._sleep(_ENDLESS_S)
        self._sleep(seconds)

    def _write_down(self, fault: Fault, *, is_over: bool) -> None:
        line = {"fault": asdict(fault), "rank": self._rank, "at_ns": time.monotonic_ns(), "is_over": is_over}
        fd = os.open(self._record, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            os.write(fd, json.dumps(line).encode() + b"\n")  # in one piece: ranks share the file
            os.fsync(fd)
        finally:
            os.close(fd)


def strikes(record: Path) -> list[Strike]:
    """Return all that was written down, over all ranks, in the order of its happening; nothing before the first."""
    if not record.exists():
        return []
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    return [Strike(Fault(**one["fault"]), one["rank"], one["at_ns"], one["is_over"]) for one in lines]


def fired(record: Path) -> list[Fault]:
    """The faults that struck, over all ranks, in the order of their striking; none before the first."""
    return [strike.fault for strike in strikes(record) if not strike.is_over]


def schedule(
    kinds: Sequence[str], ranks: Sequence[int], *, first_step: int, every_steps: int, count: int, seed: int
) -> list[Fault]:
    """Return `count` faults of kinds and ranks drawn at random, one every so many steps; the same for one seed."""
    chance = random.Random(seed)
    return [
        Fault(
            kind=chance.choice(list(kinds)),
            rank=chance.choice(list(ranks)),
            step=first_step + index * every_steps,
            num_steps=max(1, every_steps // 2),
            seconds=0.05,
            seed=seed + index,
        )
        for index in range(count)
    ]


def _spin(fault: Fault) -> None:
    until_s = time.monotonic() + (fault.seconds or math.inf)
    while time.monotonic() < until_s:
        pass


def _keep_gil(fault: Fault) -> None:
    library = ctypes.PyDLL(None)  # unlike CDLL, it does not release the GIL around a call
    until_s = time.monotonic() + (fault.seconds or math.inf)
    while (left_s := until_s - time.monotonic()) > 0:
        library.usleep(ctypes.c_uint(int(min(left_s, 1000.0) * 1e6)))


def _freeze(fault: Fault) -> None:
    waker = None
    if fault.seconds:
        waker = subprocess.Popen(["sh", "-c", f"sleep {fault.seconds}; kill -CONT {os.getpid()}"])
    os.kill(os.getpid(), signal.SIGSTOP)
    if waker is not None:
        waker.wait()


def _stray_collective(fault: Fault) -> None:
    """Enter a collective alone; whoever enters the group next meets it."""
    import torch
    import torch.distributed as dist

    if fault.kind == "wrong_kind":
        dist.broadcast(torch.zeros(3), 0)
    elif fault.kind == "wrong_dtype":
        dist.all_reduce(torch.zeros(5, dtype=torch.int16))
    else:
        dist.all_reduce(torch.zeros(7))


def _segfault(fault: Fault) -> None:
    ctypes.string_at(0)


def _exit(fault: Fault) -> None:
    os._exit(17)


def _abort(fault: Fault) -> None:
    os.abort()


def _kill(fault: Fault) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


_STRIKES: Mapping[str, Callable[[Fault], None]] = {
    "exit": _exit,
    "abort": _abort,
    "segfault": _segfault,
    "kill": _kill,
    "freeze": _freeze,
    "gil": _keep_gil,
    "spin": _spin,
    "extra": _stray_collective,
    "wrong_kind": _stray_collective,
    "wrong_dtype": _stray_collective,
}
"""What strikes once and at once, as `_PAUSES` do; other kinds act in every step, or where the program asks."""
_PAUSES = frozenset({"hang", "gc_pause", "evaluation", "checkpoint", "checkpoint_stall"})
"""What strikes by sleeping, as `compile` does."""
_PHASES = {"evaluation": "evaluation", "checkpoint": "checkpoint", "checkpoint_stall": "checkpoint"}
"""What the rank says that it does meanwhile."""


def _extra_s(fault: Fault, rank: int, step: int, chance: random.Random) -> float:
    """For how long a fault that makes work longer holds this step up."""
    factors: Mapping[str, Callable[[], float]] = {
        "slow": lambda: 1.0,
        "all_slow": lambda: 1.0,
        "imbalance": lambda: 1.0,
        "slow_jitter": lambda: chance.uniform(0.5, 1.5),
        "slow_ramp": lambda: min(1.0, (step - fault.step + 1) / 16),
        "jitter": lambda: random.Random(fault.seed * 1_000_003 + step * 1009 + rank).random(),
        "uneven": lambda: (step + rank) % 2,
    }
    return fault.seconds * factors[fault.kind]() if fault.kind in factors else 0.0


def _damage(fault: Fault, tensor: torch.Tensor) -> None:
    import torch

    flat = tensor.detach().view(-1)
    place = fault.element % flat.numel()
    if fault.kind == "nan":
        flat[place] = math.nan
    elif fault.kind == "gradient":
        flat.mul_(fault.factor)
    else:
        size = flat.element_size()
        integers = flat.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size])
        mask = 1 << (fault.bit % (8 * size - 1))  # the sign bit aside: the mask has to fit
        integers[place] ^= mask


_BUSY = """
while read -r line 2>/dev/null </proc/{pid}/stat && case $line in *') Z '*) false ;; esac; do
    i=0; while [ $i -lt 20000 ]; do i=$((i + 1)); done
done
"""
"""Keeps a CPU busy for as long as a process lives; one that is killed and not waited for yet lives no more."""


class _Hogs:
    """Busy processes on the CPUs that this process may use now; they end with it, however it ends."""

    def __init__(self, count: int, seconds: float) -> None:
        command = ["timeout", str(seconds or _HOG_S), "sh", "-c", _BUSY.format(pid=os.getpid())]
        self._hogs = [subprocess.Popen(command, stdin=subprocess.DEVNULL) for _ in range(count)]

    def close(self) -> None:
        """End them."""
        for hog in self._hogs:
            hog.terminate()  # which `timeout` passes on
        for hog in self._hogs:
            hog.wait()


def _bind(cpus: set[int]) -> None:
    """Leave all threads of this process these CPUs; what they start has them too."""
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
            os.sched_setaffinity(int(thread), cpus)
