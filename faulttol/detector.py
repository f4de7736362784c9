"""From views of a job to findings: what `observe` is given and what it remembers is all it knows.

It compares no two clocks, reads none, and asks nobody: the same views give the same findings, in a test, on a recorded
trace, or beside a job. A finding is reported once it was made in `confirmations` views in a row; a process that is gone
needs no second look.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from faulttol.config import DetectorConfig, HealthConfig
from faulttol.finding import Finding, FindingKind
from faulttol.rules.numeric import numeric
from faulttol.rules.speed import slow
from faulttol.rules.stop import stops
from faulttol.rules.window import Baseline, usual, window
from faulttol.view import JobView

_HEALTHY_WINDOWS = 8
"""How many healthy windows the baseline is the lower median of."""
_AT_ONCE = frozenset({FindingKind.CRASH, FindingKind.NUMERIC})
_Key = tuple[FindingKind, tuple[tuple[int, int], ...]]


@dataclass(frozen=True, slots=True)
class Memory:
    """What a detector carries from view to view; the first one is empty. A new generation begins with a new one."""

    first_step: int | None = None
    healthy: tuple[Baseline, ...] = ()
    """Of the last healthy windows that do not overlap."""
    learnt_step: int = -1
    """The last step that the baseline has seen."""
    judged_step: int = -1
    """The last step that a rule about speed has seen."""
    looked_step: int | None = None
    """The last step that all ranks had begun when their speed was looked at."""
    seen: Mapping[_Key, int] = field(default_factory=dict)
    """In how many views in a row a finding was made."""
    slow: tuple[Finding, ...] = ()
    """What the rules about speed said of the last window."""

    @property
    def baseline(self) -> Baseline | None:
        """What is usual in this job; None before the first healthy window."""
        return usual(self.healthy)


def observe(
    memory: Memory, view: JobView, config: DetectorConfig, health: HealthConfig
) -> tuple[Memory, tuple[Finding, ...]]:
    """Return what to remember and the findings that hold in this view and are confirmed, the gravest first."""
    steps = [mark.step for record in view.records.values() for mark in record.marks if mark.step >= 0]
    if memory.first_step is None and steps:
        memory = replace(memory, first_step=min(steps))
    stopping = stops(view, config, health)
    findings = [*stopping, *numeric(view, config)]
    fresh = {finding.key for finding in findings}
    if not stopping:
        judged_step = memory.judged_step
        memory = _pace(memory, view, config, health)
        findings += memory.slow
        if memory.judged_step != judged_step:
            fresh |= {finding.key for finding in memory.slow}
    seen = {finding.key: memory.seen.get(finding.key, 0) + (finding.key in fresh) for finding in findings}
    confirmed = tuple(
        finding for finding in findings if finding.kind in _AT_ONCE or seen[finding.key] >= config.confirmations
    )
    return replace(memory, seen=seen), confirmed


def _pace(memory: Memory, view: JobView, config: DetectorConfig, health: HealthConfig) -> Memory:
    """Judge the last steps by what was usual, and learn from them if there is nothing wrong with them."""
    begun = _begun(view)
    if begun is not None and begun == memory.looked_step:
        return memory  # no step is over that was not: to look for one takes most of what a look takes
    memory = replace(memory, looked_step=begun)
    found = window(view, memory.first_step or 0, config, health)
    if found is None or found.steps[-1] == memory.judged_step:
        return memory
    findings = tuple(slow(found, memory.baseline, config))
    memory = replace(memory, judged_step=found.steps[-1], slow=findings)
    recent = found.last(found.num_lasting(config.window_steps, config.window_least_s))
    if any(finding.kind.is_fault for finding in findings) or recent.steps[0] <= memory.learnt_step:
        return memory
    healthy = (*memory.healthy, recent.baseline())[-_HEALTHY_WINDOWS:]
    return replace(memory, healthy=healthy, learnt_step=recent.steps[-1])


def _begun(view: JobView) -> int | None:
    """Return the last step that all ranks have begun; None where one marks no steps."""
    steps = [[m.step for m in record.marks if m.kind == "step_begin"] for record in view.records.values()]
    return min(own[-1] for own in steps) if steps and all(steps) else None
