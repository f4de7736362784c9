"""What the signs of life of a rank say about it: a pure function from ages and states to a condition.

Whoever can look at the rank's machine (an agent, the launcher) fills in `Vitals`; `assess` only compares. Every age
is the time since the observer last saw a *change*, on the observer's own monotonic clock, so that no two clocks are
ever compared.

    process  native code  Python    loop
    gone     -            -         -          DEAD
    there    silent       -         -          FROZEN    SIGSTOP, swapped out, stuck in the kernel
    there    answers      silent    -          STUCK     the GIL is held, or native code does not return
    there    answers      answers   silent     STALLED   waits: only the collectives tell for whom
    there    answers      answers   advances   RUNNING
    nobody who looks at that machine reports   LOST      the node or its agent
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from faulttol.config import HealthConfig


class Condition(StrEnum):
    """What state a rank is in, the worst that its vitals prove."""

    RUNNING = "running"
    STALLED = "stalled"
    STUCK = "stuck"
    FROZEN = "frozen"
    DEAD = "dead"
    LOST = "lost"


@dataclass(frozen=True, kw_only=True, slots=True)
class Vitals:
    """What was seen of one rank at one moment.

    An age is in seconds since the observer last saw that sign change; None where nobody looks for that sign, which
    then proves nothing.
    """

    rank: int
    process_alive: bool = True
    """False when the process table of its machine has no such process, or a zombie."""
    process_state: str = ""
    """The letter of /proc/PID/stat: R running, S sleeping, D in the kernel, T stopped; empty if not known."""
    report_age_s: float = 0.0
    """Age of these vitals themselves: the time since the machine's agent last reported."""
    native_age_s: float | None = None
    """Since something in the process that needs no GIL answered."""
    python_age_s: float | None = None
    """Since a Python thread of the process showed a sign of life."""
    progress_age_s: float | None = None
    """Since the training loop got further: a mark, or a collective entered or completed."""
    gone_age_s: float | None = None
    """Since it was first seen to be gone."""
    cpu_wait_s: float | None = None
    """For how long its threads that train or talk to other ranks were ready to run and no CPU was free for them, all
    together, since it is looked after."""
    step: int = -1
    """The last step it was seen in; -1 before the first."""
    phase: str = ""
    """What the loop said that it is doing."""


@dataclass(frozen=True, slots=True)
class Health:
    """The condition of one rank, with what proves it."""

    rank: int
    condition: Condition
    age_s: float
    """For how long the sign that proves the condition was missing."""
    reason: str


def assess(vitals: Vitals, config: HealthConfig) -> Health:
    """Return the worst condition that the vitals prove."""
    if not vitals.process_alive:
        return Health(vitals.rank, Condition.DEAD, vitals.gone_age_s or 0.0, "its process is gone")
    if vitals.report_age_s > config.lost_after_s:
        return _missing(vitals, Condition.LOST, vitals.report_age_s, "report from its machine")
    if vitals.process_state in ("T", "t"):
        age_s = max(vitals.native_age_s or 0.0, vitals.python_age_s or 0.0)
        return Health(vitals.rank, Condition.FROZEN, age_s, f"its process is stopped (state {vitals.process_state})")
    if vitals.native_age_s is not None and vitals.native_age_s > config.frozen_after_s:
        return _missing(vitals, Condition.FROZEN, vitals.native_age_s, "answer from its process")
    patience = config.patience if vitals.phase in config.patient_phases else 1.0
    if vitals.python_age_s is not None and vitals.python_age_s > config.stuck_after_s * patience:
        if vitals.native_age_s is None and vitals.process_state == "D":
            return _missing(vitals, Condition.FROZEN, vitals.python_age_s, "sign of life, and it is in the kernel")
        return _missing(vitals, Condition.STUCK, vitals.python_age_s, "sign of life of a Python thread")
    if vitals.progress_age_s is not None and vitals.progress_age_s > config.stalled_after_s * patience:
        return _missing(vitals, Condition.STALLED, vitals.progress_age_s, "progress of its loop")
    return Health(vitals.rank, Condition.RUNNING, 0.0, "advances")


def _missing(vitals: Vitals, condition: Condition, age_s: float, what: str) -> Health:
    where = f" (step {vitals.step}{', ' + vitals.phase if vitals.phase else ''})"
    return Health(vitals.rank, condition, age_s, f"no {what} for {age_s:.1f} s{where}")
