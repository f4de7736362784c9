"""The observer's side of the labelled benchmark: starts a job, follows it, injects one fault, says what was found."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from faulttol.agent import NodeAgent, Watched, start_ticks
from faulttol.bench.labels.jobs import JobSpec, ProbeAt, Withdraw, serve
from faulttol.config import DetectorConfig, HealthConfig
from faulttol.detector import Memory, observe
from faulttol.finding import Finding, FindingKind
from faulttol.history import Follower
from faulttol.inject import Fault, strikes
from faulttol.localize import DelayMatrix, Link, explain, from_backlogs, refine
from faulttol.view import JobView

DETECTOR = DetectorConfig(hang_after_s=1.0, hang_factor=3.0)
HEALTH = HealthConfig(frozen_after_s=1.0, stuck_after_s=1.0, stalled_after_s=8.0, patience=4.0)
LOOK_S = 0.05
"""Between two looks at the job."""
_AHEAD_S = 0.3
"""Between the order to probe and the step that it is for: all ranks have to get it in time."""
_PATIENCE_S = 10.0
"""So long a job may stand until a probe is given up: longer than the slowest payload takes."""
_START_S = 60.0
_AGAIN_S = 0.3
_LOCATED = frozenset({FindingKind.COMMUNICATION_SLOW, FindingKind.COMMUNICATION_HANG})


class TrialError(RuntimeError):
    """A trial could not be made."""


@dataclass(frozen=True, slots=True)
class Sighting:
    """A confirmed finding that was not there in the view before."""

    at_s: float
    """`time.monotonic()`."""
    finding: Finding


@dataclass(slots=True)
class Watch:
    """What was seen of a job since it began."""

    sightings: list[Sighting] = field(default_factory=list)
    memory: Memory = field(default_factory=Memory)
    holding: frozenset[Any] = frozenset()
    """Keys of the findings of the last view."""


class RunningJob:
    """A job of the benchmark with the agent and the detector beside it; use as a context manager."""

    def __init__(self, spec: JobSpec) -> None:
        self.spec = spec
        context = get_context("forkserver")
        self._processes: list[ForkServerProcess] = []
        self._orders: list[Connection] = []
        self._follower = Follower(spec.directory, range(spec.num_ranks))
        self._agent = NodeAgent()
        self.watch = Watch()
        self.usual_links: DelayMatrix | None = None
        self.backlogs: dict[int, dict[int, int]] = {}
        self._rows: dict[int, list[dict[Link, float]]] = {}
        """By the step of a probe: what ranks measured in it."""
        self.view = JobView({})
        self.findings: tuple[Finding, ...] = ()
        for rank in range(spec.num_ranks):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(rank, spec, theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._orders.append(ours)

    def __enter__(self) -> RunningJob:
        return self

    def __exit__(self, *_: object) -> None:
        self._agent.close()
        for process in self._processes:
            process.kill()
        for process, orders in zip(self._processes, self._orders, strict=True):
            process.join()
            process.close()
            orders.close()
        self._follower.close()

    @property
    def step(self) -> int:
        """The furthest step that a rank has begun."""
        return max((r.marks[-1].step for r in self.view.records.values() if r.marks), default=-1)

    @property
    def ended(self) -> dict[int, int]:
        """Exit codes of the ranks whose process has ended; of a signal, less than 0."""
        codes = {rank: process.exitcode for rank, process in enumerate(self._processes)}
        return {rank: code for rank, code in codes.items() if code is not None}

    def wait_until_ready(self) -> None:
        """Wait for the ranks' groups, then watch their processes."""
        for rank, orders in enumerate(self._orders):
            if not orders.poll(_START_S):
                raise TrialError(f"rank {rank} of {self.spec.name} has not begun in {_START_S:g} s")
            try:
                _, pid = orders.recv()
            except EOFError as error:
                log = (self.spec.directory / f"log{rank}").read_text()[-2000:]
                raise TrialError(f"rank {rank} of {self.spec.name} ended before it began:\n{log}") from error
            directory = self.spec.directory
            self._agent.watch(
                Watched(rank, pid, start_ticks(pid), directory / f"heart{rank}", directory / f"answers{rank}")
            )

    def look(self) -> list[Sighting]:
        """Look once; return what was found that the last look did not."""
        self.view = self._follower.look(self._agent.look())
        memory, findings = observe(self.watch.memory, self.view, DETECTOR, HEALTH)
        now_s = time.monotonic()
        findings += tuple(self._messages())
        new = [Sighting(now_s, one) for one in findings if one.key not in self.watch.holding]
        self.watch.memory = memory
        self.findings = findings
        self.watch.holding = frozenset(one.key for one in findings)
        self.watch.sightings += new
        return new

    def order(self, order: Fault | ProbeAt | Withdraw) -> None:
        """Give an order to every rank that still listens."""
        for orders in self._orders:
            try:
                orders.send(order)
            except BrokenPipeError:
                continue

    def links(self, patience_s: float = _PATIENCE_S) -> DelayMatrix | None:
        """Let the ranks measure their links; None where none of them gets any further for so long.

        Where links are slow, so are the steps until the probe and the probe itself: no time is too long for them, as
        long as operations begin.
        """
        usual = self.watch.memory.baseline
        self.look()
        step = self.step + 4 + (0 if usual is None else int(_AHEAD_S / usual.span_s))
        rows = self._rows.setdefault(step, [])
        self.order(ProbeAt(step))
        reached, reached_s = self._reached(), time.monotonic()
        while len(rows) < self.spec.num_ranks and time.monotonic() < reached_s + patience_s:
            time.sleep(LOOK_S)
            self.look()
            if (now := self._reached()) != reached:
                reached, reached_s = now, time.monotonic()
        if len(rows) < self.spec.num_ranks:
            return None
        return DelayMatrix({link: s for row in rows for link, s in row.items()})

    def _reached(self) -> dict[int, int]:
        """The last operation that each rank has begun."""
        return {rank: record.events[-1].index for rank, record in self.view.records.items() if record.events}

    def locate(self, finding: Finding) -> Finding:
        """Refine a finding about communication: a hang by what waits in the connections, slowness by two probes."""
        if finding.kind is FindingKind.COMMUNICATION_HANG:
            return refine(finding, from_backlogs(self.backlogs))
        vague = replace(finding, suspects=())
        if (first := self.links()) is None or (second := self.links()) is None:
            return vague
        return refine(vague, explain(first | second, DETECTOR, usual=self.usual_links))

    def _messages(self) -> Iterator[Finding]:
        for rank, orders in enumerate(self._orders):
            try:
                while orders.poll():
                    kind, value = orders.recv()
                    if kind == "probe":
                        step, row = value
                        self._rows[step].append(row)
                    elif kind == "backlog":
                        self.backlogs[rank] = value
                    elif kind == "divergence":
                        yield value.finding(self.step)
            except (EOFError, ConnectionResetError):
                continue


@contextmanager
def running(name: str, num_ranks: int, **more: Any) -> Iterator[RunningJob]:
    """A job that runs, until the block is left."""
    directory = Path(tempfile.mkdtemp(prefix="labelled-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    try:
        with RunningJob(JobSpec(name=name, num_ranks=num_ranks, directory=directory, **more)) as job:
            job.wait_until_ready()
            yield job
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def settle(job: RunningJob, timeout_s: float = 30.0) -> bool:
    """Wait until the job is healthy and the detector knows what is usual; False if it does not get there.

    Of a job that it has not waited for yet the links are measured too.
    """
    until_s = time.monotonic() + timeout_s
    clean_since, clean_since_s = job.step, time.monotonic()
    num_steps = DETECTOR.window_steps + 2
    while time.monotonic() < until_s:
        time.sleep(LOOK_S)
        job.look()
        if any(kind.is_fault for kind, _ in job.watch.holding):
            clean_since, clean_since_s = job.step, time.monotonic()
        is_long = time.monotonic() >= clean_since_s + DETECTOR.window_least_s
        if job.watch.memory.baseline is not None and job.step >= clean_since + num_steps and is_long:
            if job.usual_links is not None:
                return True
            job.usual_links = job.links()
            clean_since, num_steps = job.step, DETECTOR.fast_steps + 2
    return False


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one fault."""

    struck_s: float
    """When it struck, on the clock of the sightings; 0: it did not."""
    alarms: tuple[Sighting, ...]
    """What says that there is a fault, in order; slow communication only where a probe confirms it."""
    others: tuple[Sighting, ...]
    """What else was found: no faults, and suspicions of slow communication that no probe confirmed."""
    view: JobView
    """The job at the end of it."""


def strike(job: RunningJob, fault: Fault | None, *, watch_s: float) -> Outcome:
    """Inject a fault into the next step and watch until it is found, at most for `watch_s` from its striking.

    Without a fault it watches for as long. Slow communication has to be located by a probe before it is an alarm;
    where a probe shows nothing, the next one follows `_AGAIN_S` later.
    """
    record = job.spec.directory / "strikes"
    num_before = len(strikes(record))
    struck_s = 0.0
    if fault is None:
        struck_s = time.monotonic()
    else:
        job.order(fault)
    alarms: list[Sighting] = []
    others: list[Sighting] = []
    num_seen = len(job.watch.sightings)
    until_s = struck_s + watch_s if struck_s else time.monotonic() + 10.0
    probe_s = 0.0
    while time.monotonic() < until_s and not alarms:
        time.sleep(LOOK_S)
        job.look()
        new = job.watch.sightings[num_seen:]
        num_seen += len(new)
        if not struck_s and len(lines := strikes(record)) > num_before:
            struck_s = lines[num_before].at_ns / 1e9
            until_s = struck_s + watch_s
        alarms += [one for one in new if _is_alarm(one)]
        others += [one for one in new if not one.finding.kind.is_fault]
        for finding in job.findings if not alarms and time.monotonic() > probe_s else ():
            if finding.kind in _LOCATED:
                located = job.locate(finding)
                seen = Sighting(time.monotonic(), located)
                confirmed = located.suspects or finding.kind is FindingKind.COMMUNICATION_HANG
                (alarms if confirmed else others).append(seen)
                probe_s = time.monotonic() + _AGAIN_S
    for one in job.watch.sightings[num_seen:]:  # in time, while a probe was waited for: a job that stands answers none
        if one.at_s < until_s and one.finding.kind is not FindingKind.COMMUNICATION_SLOW and one.finding.kind.is_fault:
            alarms.append(one if _is_alarm(one) else Sighting(one.at_s, job.locate(one.finding)))
    return Outcome(struck_s, tuple(sorted(alarms, key=lambda one: one.at_s)), tuple(others), job.view)


def _is_alarm(sighting: Sighting) -> bool:
    """Whether it says by itself that there is a fault."""
    return sighting.finding.kind.is_fault and sighting.finding.kind not in _LOCATED


def begin(job: RunningJob) -> Outcome | None:
    """Watch a new job, in whose first step faults of its spec strike, until it is healthy; None if it does not get so.

    Before a job is known no probe says what of its communication is slow: only that is no alarm here.
    """
    is_healthy = settle(job)
    seen = job.watch.sightings
    alarms = [one for one in seen if _is_alarm(one) or one.finding.kind is FindingKind.COMMUNICATION_HANG]
    if not is_healthy and not alarms:
        return None
    lines = strikes(job.spec.directory / "strikes")
    others = [one for one in seen if one not in alarms]
    return Outcome(lines[0].at_ns / 1e9 if lines else 0.0, tuple(alarms), tuple(others), job.view)
