"""What a rank did, as facts: its collectives and messages, and the marks that its loop set between them. Pure.

Two ranks' records of one operation are matched without any clock: by (`group`, `seq`) for a collective, by (`group`,
sender, receiver, `seq`) for a message. Times are `time.monotonic_ns()` of the rank's own machine: differences of one
rank's times are sound, differences between ranks need an offset (`faulttol.clock`), which no rule relies on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

State = Literal["begun", "ended", "failed"]

KINDS = (
    "all_gather",
    "all_gather_coalesced",
    "all_gather_into_tensor",
    "all_gather_into_tensor_coalesced",
    "all_reduce",
    "all_reduce_coalesced",
    "all_to_all",
    "all_to_all_single",
    "barrier",
    "broadcast",
    "gather",
    "monitored_barrier",
    "recv",
    "recv_any_source",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "reduce_scatter_tensor_coalesced",
    "scatter",
    "send",
)
"""Every kind of operation, by its name in `torch.distributed`. Their places are the numbers in a ring's records."""

MESSAGES = frozenset({"send", "recv", "recv_any_source"})
"""The kinds between two ranks."""
UNEVEN = frozenset({"all_to_all", "all_to_all_single", "all_gather", "reduce_scatter"})
"""The kinds whose `bytes` may rightly differ between the ranks of one operation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectiveEvent:
    """One collective or one message, as one rank saw it."""

    rank: int
    """The recording rank in the job."""
    index: int
    """Place among all that this rank recorded, from 1; a gap is a loss, marks count too."""
    kind: str
    """One of KINDS."""
    group: str
    """Name of the group, the same on all its ranks."""
    group_ranks: tuple[int, ...]
    """The members, by their rank in the job, in the order of their rank in the group."""
    backend: str
    """What carries it: `gloo`, `nccl`, …"""
    seq: int
    """From 1. Collectives: place among the group's collectives on this rank. Messages: among those of the group from
    this sender to this receiver; of `recv_any_source`, among this rank's receipts of that kind."""
    peer: int | None
    """Rank in the job: the other end of a message (None: any source), the root of a rooted collective, else None."""
    bytes: int
    """What this rank gives: its input; of a receipt, of `scatter` and of `broadcast`, what it gets."""
    dtype: str
    """Of the first tensor, as `bfloat16`; empty without one (a barrier)."""
    step: int
    """Of the last `mark_step`; -1 before the first."""
    phase: str
    """Of the last mark that named one."""
    state: State
    begin_ns: int
    """When the rank called it."""
    end_ns: int | None
    """When it was over: of a device's collective the device's end. None while it has begun only."""
    device_ns: int | None = None
    """How long the device worked on it, waiting for other ranks included; None on the CPU, or where untimed."""
    end_is_late: bool = False
    """The end is the moment when somebody looked: this rank when it next began something or set a mark, the recorder up
    to `poll_s` later, or the caller when he called `wait`. False: it was waited for, or the device timed it."""

    @property
    def is_message(self) -> bool:
        """Whether it is between two ranks only."""
        return self.kind in MESSAGES

    @property
    def started_ns(self) -> int:
        """When its work began: the call on the CPU, the device's start on a device that timed it."""
        if self.device_ns is None or self.end_ns is None:
            return self.begin_ns
        return self.end_ns - self.device_ns

    @property
    def duration_ns(self) -> int | None:
        """Return the end less `started_ns`; None while it has not ended."""
        return None if self.end_ns is None else self.end_ns - self.started_ns

    @property
    def source(self) -> int | None:
        """Sender of a message; None if unknown, or of a collective."""
        if not self.is_message:
            return None
        return self.rank if self.kind == "send" else self.peer

    @property
    def target(self) -> int | None:
        """Receiver of a message; None of a collective."""
        if not self.is_message:
            return None
        return self.peer if self.kind == "send" else self.rank


MarkKind = Literal["step_begin", "step_end", "phase"]
MARK_KINDS: tuple[MarkKind, ...] = ("step_begin", "step_end", "phase")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMark:
    """Where a rank's loop was: a step began or ended, or a phase of it began."""

    rank: int
    index: int
    """As of CollectiveEvent: one count over both."""
    kind: MarkKind
    step: int
    phase: str
    at_ns: int
    tokens: int | None = None
    """What this rank had to work on in the step: tells data imbalance from a slow rank. Of `step_begin` or
    `step_end`, whichever knew."""
    loss: float | None = None
    """Of `step_end`."""
    grad_norm: float | None = None
    """Of `step_end`: of this rank's gradient before it was reduced, if the loop knows it."""

    @property
    def is_numeric_fault(self) -> bool:
        """Whether the step's loss or gradient norm is not a finite number."""
        return any(x is not None and not math.isfinite(x) for x in (self.loss, self.grad_norm))


@dataclass(frozen=True, slots=True, kw_only=True)
class RankRecord:
    """What is known of one rank, both lists in the order of `index`."""

    rank: int
    world_size: int
    generation: int
    events: tuple[CollectiveEvent, ...]
    marks: tuple[StepMark, ...]
    now_ns: int
    """The rank's machine's `time.monotonic_ns()` when it was read: what is open has been so until then."""
    num_lost: int = 0
    """Records that were overwritten before they were read, or that the recorder could not write."""
