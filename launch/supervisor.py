"""The loop that watches ranks: streams rank 0, stops on request, ends the run when a rank is at fault."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, Protocol

from launch import signals, verdict
from launch.diagnosis import Diagnosis, told
from launch.entry import Raised, Returned
from launch.errors import LaunchError, RankFailed, RankNote
from launch.job import Job, JobResult
from launch.verdict import Fault, Limits, RankReport, RankStatus

_POLL_S = 0.1
_SETTLE_S = 1.0  # how long others may still report after the first failure, so that its cause is among the reports
STACKS_S = 0.5  # how long ranks get to write the stacks of their threads before they are killed
LONGEST_TICK_S = 5.0  # a supervisor that was itself suspended for longer holds no rank to account for it
_TAIL_BYTES = 8192


class Ranks(Protocol):
    """The running ranks of one job, as a launcher holds them; each writes `log_dir/rankN.log`."""

    def poll(self) -> list[RankReport]:
        """What is known of each rank now, by rank; returns soon, whatever state the ranks are in."""

    def request_stop(self) -> None:
        """Ask every rank to save and leave."""

    def dump_stacks(self) -> None:
        """Ask every rank to write the stacks of its threads to its log."""

    def kill(self) -> None:
        """End every rank, whatever state it is in, and return when all are gone. Idempotent."""


class StopWish:
    """What signals to the launcher have asked for."""

    def __init__(self) -> None:
        self.requested = False
        self.impatient = False
        """A SIGINT after the first request: do not wait."""

    def note(self, number: int) -> None:
        self.impatient = self.impatient or (self.requested and number == signal.SIGINT)
        self.requested = True


def log_path(log_dir: Path, rank: int) -> Path:
    """Where rank `rank` prints."""
    return log_dir / f"rank{rank}.log"


def supervise(
    ranks: Ranks,
    job: Job,
    limits: Limits,
    *,
    stop_grace_s: float,
    on_output: Callable[[bytes], None],
    diagnosis: Diagnosis | None = None,
) -> JobResult:
    """Watch `ranks` until all have returned, one is at fault, or a stop is over; none is left running.

    What `diagnosis` finds is told where it is a fault, kept, and changes nothing.

    Raises: RankFailed.
    """
    watch = _Watch(ranks, job, on_output)
    stop = StopWish()
    stop_at_s: float | None = None
    with signals.caught(stop.note):
        while True:
            watch.look()
            for finding in diagnosis.look() if diagnosis is not None else ():
                if finding.kind.is_fault:
                    on_output(f"[{job.name}] {told(finding)}\n".encode())
            if verdict.completed(watch.statuses):
                return watch.finish("completed" if stop_at_s is None else "stopped")
            if verdict.ended_badly(watch.statuses):
                _settle(watch)
                watch.fail(verdict.blame(watch.statuses, limits, watch.now_s), limits)
            if stop.requested and stop_at_s is None:
                stop_at_s = watch.now_s
                ranks.request_stop()
            if stop_at_s is None:
                fault = verdict.judge_silence(watch.statuses, limits, watch.now_s)
                if fault is not None:
                    _collect_stacks(watch)
                    watch.fail(fault, limits)
            elif stop.impatient or watch.now_s - stop_at_s > stop_grace_s:
                return watch.finish("stopped")
            time.sleep(_POLL_S)


def _settle(watch: _Watch) -> None:
    """Keep looking until every rank has ended or the time for it is over."""
    deadline_s = watch.now_s + _SETTLE_S
    while watch.now_s < deadline_s and any(status.unfinished for status in watch.statuses):
        time.sleep(_POLL_S)
        watch.look()


def _collect_stacks(watch: _Watch) -> None:
    """Have ranks say where they are; one that froze cannot, its peers can."""
    watch.quiet = True  # the report shows them, after the rank at fault
    watch.ranks.dump_stacks()
    deadline_s = watch.now_s + STACKS_S
    while watch.now_s < deadline_s:
        time.sleep(_POLL_S)
        watch.look()


class _Watch:
    """What was seen of the ranks so far, and on what clock."""

    def __init__(self, ranks: Ranks, job: Job, on_output: Callable[[bytes], None]) -> None:
        self.ranks = ranks
        self.now_s = 0.0
        """Time under supervision: it stands still while the supervisor itself is suspended."""
        self.quiet = False
        """Do not pass on any more of what rank 0 prints."""
        self.statuses = [RankStatus(rank=rank) for rank in range(job.world_size)]
        self._job = job
        self._on_output = on_output
        self._read_bytes = 0
        self._looked_s = time.monotonic()

    def look(self) -> None:
        """Bring the statuses up to date and pass on what rank 0 printed since; nothing once a rank has failed.

        A failing rank publishes its outcome before it prints its traceback. Here the printed text is read before
        the outcomes, so that rank 0's complaint about a lost peer is never shown ahead of the cause.
        """
        printed = self._read_new()
        reports = self.ranks.poll()
        looked_s = time.monotonic()
        self.now_s += min(looked_s - self._looked_s, LONGEST_TICK_S)
        self._looked_s = looked_s
        self.statuses = [
            verdict.observe(status, report, self.now_s) for status, report in zip(self.statuses, reports, strict=True)
        ]
        self.quiet = self.quiet or verdict.ended_badly(self.statuses)
        if printed and not self.quiet:
            self._on_output(printed)

    def finish(self, outcome: Literal["completed", "stopped"]) -> JobResult:
        """End what still runs, and tell how the job ended."""
        self._kill()
        printed = self._read_new()
        if printed:
            self._on_output(printed)
        return JobResult(
            outcome=outcome,
            results=[s.outcome.value if isinstance(s.outcome, Returned) else None for s in self.statuses],
            killed=[status.rank for status in self.statuses if status.unfinished],
            duration_s=self.now_s,
        )

    def fail(self, fault: Fault, limits: Limits) -> None:
        """End every rank and raise the RankFailed that tells of all, the one at fault first."""
        notes = [
            (status, verdict.describe(self.statuses, status.rank, fault, limits, self.now_s))
            for status in self.statuses
        ]
        self._kill()
        ended = self.statuses[fault.rank].exit
        raise RankFailed(
            job_name=self._job.name,
            rank=fault.rank,
            reason=fault.reason,
            exit_code=ended.code if ended is not None else None,
            signal=ended.signal if ended is not None else None,
            notes=[self._note(status, summary) for status, summary in notes],
        )

    def _kill(self) -> None:
        """End every rank; one that stays is told of, and changes nothing of how the job went."""
        try:
            self.ranks.kill()
        except LaunchError as error:
            self._on_output(f"[{self._job.name}] {error}\n".encode())

    def _note(self, status: RankStatus, summary: str) -> RankNote:
        path = log_path(self._job.log_dir, status.rank)
        return RankNote(
            rank=status.rank,
            summary=summary,
            traceback=status.outcome.traceback if isinstance(status.outcome, Raised) else "",
            log=str(path),
            log_tail=tail(path),
        )

    def _read_new(self) -> bytes:
        new = read_from(log_path(self._job.log_dir, 0), self._read_bytes)
        self._read_bytes += len(new)
        return new


def read_from(path: Path, start: int) -> bytes:
    """What a log has from that byte on; nothing of one that somebody removed, or that cannot be read now."""
    try:
        with open(path, "rb") as log:
            log.seek(start)
            return log.read()
    except OSError:
        return b""


def tail(path: Path) -> str:
    """The last whole lines of a log, or why they cannot be read."""
    try:
        with open(path, "rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(0, size - _TAIL_BYTES))
            tail = log.read()
    except OSError as error:
        return f"({error})"
    if size > _TAIL_BYTES:
        tail = tail.partition(b"\n")[2] or tail
    return tail.decode(errors="replace")
