"""Pure judgement over what is known of the ranks: is one at fault, which one, and why.

Signs of life and progress are counts that change, not times: when a count was last seen to change is noted on
the supervisor's own clock, so that no two machines' clocks are ever compared.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace

from launch.entry import Outcome, Raised, Returned
from launch.errors import Reason

# What a rank says when it lost a peer rather than failed: gloo, NCCL, the rendezvous store.
_PEER_LOSS = re.compile(
    r"closed by peer|reset by peer|broken pipe|read error|write error|socket closed|connection refused"
    r"|timed out waiting \d+ms|connect timeout|pair closure|connectfullmesh failed|monitoredbarrier"
    r"|ncclremoteerror|remote process exited|nccl communicator was aborted|watchdog caught collective"
    r"|failed to recv|connection was likely closed|wait timeout after|client socket has timed out",
    re.IGNORECASE,
)
_SILENT_SIGNS = 4  # missed signs of life that make a rank suspect, once others complain of a lost peer
_SILENT_MIN_S = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """How long ranks may stay silent, in seconds."""

    start_timeout_s: float
    frozen_timeout_s: float
    hang_timeout_s: float
    exit_timeout_s: float
    """From the entry's return to the end of the process."""
    heartbeat_interval_s: float


@dataclass(frozen=True, slots=True)
class Pulse:
    """What a rank's heartbeat said."""

    alive_count: int
    progress_count: int
    step: int
    phase: str


@dataclass(frozen=True, slots=True)
class Exit:
    """How a rank's process ended."""

    code: int | None = None
    signal: int | None = None
    detail: str = ""
    """What the launcher knows beside code and signal, in words."""

    @property
    def summary(self) -> str:
        if self.signal is not None:
            return f"killed by {_signal_name(self.signal)}"
        return f"exit code {self.code}" if self.code is not None else self.detail


@dataclass(frozen=True, slots=True)
class RankReport:
    """What a launcher knows of one rank at one moment."""

    pulse: Pulse | None = None
    """None before the rank joined, and when nothing new could be read."""
    outcome: Outcome | None = None
    exit: Exit | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class RankStatus:
    """One rank as the supervisor has seen it so far; times are the supervisor's."""

    rank: int
    pulse: Pulse | None = None
    outcome: Outcome | None = None
    exit: Exit | None = None
    alive_at_s: float = 0.0
    progress_at_s: float = 0.0
    outcome_at_s: float = 0.0
    exit_at_s: float = 0.0

    @property
    def unfinished(self) -> bool:
        return self.outcome is None and self.exit is None

    @property
    def failed(self) -> Reason | None:
        """Whether it ended badly, and how."""
        if isinstance(self.outcome, Raised):
            return "raised"
        if self.exit is not None and (self.outcome is None or self.exit.code != 0):
            return "died"
        return None

    @property
    def failed_at_s(self) -> float:
        return self.outcome_at_s if self.failed == "raised" else self.exit_at_s


@dataclass(frozen=True, slots=True)
class Fault:
    """The rank to blame, and why."""

    rank: int
    reason: Reason


def observe(before: RankStatus, report: RankReport, now_s: float) -> RankStatus:
    """`before`, brought up to date by `report`; what was known and is no longer reported stays known."""
    status = before
    pulse = report.pulse
    if pulse is not None:
        known = status.pulse
        if known is None or pulse.alive_count != known.alive_count:
            status = replace(status, alive_at_s=now_s)
        if known is None or pulse.progress_count != known.progress_count:
            # Progress is a sign of life too: the loop's thread ran.
            status = replace(status, alive_at_s=now_s, progress_at_s=now_s)
        status = replace(status, pulse=pulse)
    if report.outcome is not None and status.outcome is None:
        status = replace(status, outcome=report.outcome, outcome_at_s=now_s)
    if report.exit is not None and status.exit is None:
        status = replace(status, exit=report.exit, exit_at_s=now_s)
    return status


def completed(statuses: Sequence[RankStatus]) -> bool:
    """Whether every rank returned and its process ended well."""
    return all(isinstance(status.outcome, Returned) and status.exit == Exit(code=0) for status in statuses)


def ended_badly(statuses: Sequence[RankStatus]) -> bool:
    """Whether a rank raised or died; `blame` says which one caused it."""
    return any(status.failed for status in statuses)


def judge_silence(statuses: Sequence[RankStatus], limits: Limits, now_s: float) -> Fault | None:
    """The rank that is at fault by what it does not do, if one is; the watch began at 0 s."""
    missing = [status.rank for status in statuses if status.pulse is None and status.unfinished]
    if missing and now_s > limits.start_timeout_s:
        return Fault(missing[0], "never joined")
    running = [status for status in statuses if status.unfinished and status.pulse is not None]
    frozen = [status for status in running if now_s - status.alive_at_s > limits.frozen_timeout_s]
    if frozen:
        return Fault(min(frozen, key=lambda status: status.alive_at_s).rank, "frozen")
    if any(now_s - status.progress_at_s > limits.hang_timeout_s for status in running):
        # The culprit stopped first, the others soon after: all that stand still are candidates.
        still = [status for status in running if now_s - status.progress_at_s > limits.hang_timeout_s / 2]
        return Fault(min(still, key=_advance).rank, "hung")
    lingering = [status for status in statuses if status.outcome is not None and status.exit is None]
    for status in lingering:
        if now_s - status.outcome_at_s > limits.exit_timeout_s:
            return Fault(status.rank, "hung")
    return None


def blame(statuses: Sequence[RankStatus], limits: Limits, now_s: float) -> Fault:
    """The rank that caused the failure, once at least one raised or died.

    A rank that failed for a reason of its own comes before ranks that only lost a peer. When all only lost a
    peer, the peer is sought: a rank without signs of life, else one that is behind all who complain.
    """
    failed = [status for status in statuses if status.failed]
    own = [status for status in failed if not _lost_peer(status)]
    if own:
        first = min(own, key=_failure_order)
        return _fault(first)
    silence_s = max(_SILENT_MIN_S, _SILENT_SIGNS * limits.heartbeat_interval_s)
    running = [status for status in statuses if status.unfinished and status.pulse is not None]
    silent = [status for status in running if now_s - status.alive_at_s > silence_s]
    if silent:
        return Fault(min(silent, key=lambda status: status.alive_at_s).rank, "frozen")
    reached = [status.pulse.step for status in failed if status.pulse is not None]
    behind = [status for status in running if reached and status.pulse and status.pulse.step < min(reached)]
    if behind:
        return Fault(min(behind, key=_advance).rank, "hung")
    return _fault(min(failed, key=_failure_order))


def tells_of_lost_peer(messages: Sequence[str]) -> bool:
    """Whether an error says that a peer was lost, rather than that this rank failed."""
    return any(_PEER_LOSS.search(message) for message in messages)


def describe(statuses: Sequence[RankStatus], rank: int, fault: Fault, limits: Limits, now_s: float) -> str:
    """One line on a rank for a failure report."""
    status = statuses[rank]
    blamed = fault.rank == rank
    if isinstance(status.outcome, Raised):
        return f"raised {status.outcome.summary}"
    if status.exit is not None and status.failed:
        when = " after its entry returned" if status.outcome is not None else ""
        return f"died{when}: {status.exit.summary}{_where(status)}"
    if status.outcome is not None:
        if blamed:
            return f"hung: its entry returned, but its process has not ended {limits.exit_timeout_s:g} s later"
        return "returned"
    if status.pulse is None:
        return f"never joined in {limits.start_timeout_s:g} s" if blamed else "had not joined yet"
    alive_s, progress_s = now_s - status.alive_at_s, now_s - status.progress_at_s
    if blamed and fault.reason == "frozen":
        return f"frozen: no sign of life for {alive_s:.1f} s{_where(status)}"
    if blamed and fault.reason == "hung":
        level = [str(other.rank) for other in statuses if other is not status and _level(other, status)]
        tie = f"; no further behind than rank {', '.join(level)}: compare their stacks" if level else ""
        return f"hung: no progress for {progress_s:.1f} s{_where(status)}{tie}"
    return f"running{_where(status)}, last progress {progress_s:.1f} s ago"


def _fault(status: RankStatus) -> Fault:
    assert status.failed is not None
    return Fault(status.rank, status.failed)


def _advance(status: RankStatus) -> tuple[int, float, int]:
    """Orders ranks by how far their loop got."""
    assert status.pulse is not None
    return status.pulse.step, status.progress_at_s, status.pulse.progress_count


def _level(one: RankStatus, other: RankStatus) -> bool:
    """Whether nothing but their stacks can tell which of two ranks stopped first."""
    return (
        one.unfinished
        and one.pulse is not None
        and other.pulse is not None
        and (one.pulse.step, one.pulse.progress_count) == (other.pulse.step, other.pulse.progress_count)
    )


def _failure_order(status: RankStatus) -> tuple[float, int, float]:
    """Orders failures by when they were seen; in one glance deaths come first, as what others complain of."""
    raised_at_s = status.outcome.at_s if isinstance(status.outcome, Raised) else 0.0
    return status.failed_at_s, 1 if status.failed == "raised" else 0, raised_at_s


def _lost_peer(status: RankStatus) -> bool:
    outcome = status.outcome
    return isinstance(outcome, Raised) and tells_of_lost_peer(outcome.messages)


def _where(status: RankStatus) -> str:
    return f", at step {status.pulse.step} ({status.pulse.phase})" if status.pulse is not None else ""


def _signal_name(number: int) -> str:
    try:
        return f"{signal.Signals(number).name} (signal {number})"
    except ValueError:  # a real-time signal has no name
        return f"signal {number}"
