"""A rank whose threads find no CPU free: those that wait for it see slow communication. Pure."""

from __future__ import annotations

from statistics import median

from faulttol.config import DetectorConfig
from faulttol.finding import Finding, FindingKind, Suspect
from faulttol.rules.window import Baseline, Window

_TIMES = 1.5
"""How many times what its peers wait for a CPU it waits at least: on a busy machine all wait, and unevenly."""


def starved(found: Window, baseline: Baseline, config: DetectorConfig) -> Finding | None:
    """Return the straggler where its waiting for a CPU explains enough of what steps grew; None where it does not.

    Its threads that talk to others are late as well, and its own time outside of collectives says little. What ranks
    usually wait, and what all of them wait more, is no rank's fault.
    """
    if len(found.cpu_wait) < max(2, len(found.paces)):
        return None
    grown = {rank: now - baseline.cpu_wait.get(rank, 0.0) for rank, now in found.cpu_wait.items()}
    rank = max(sorted(grown), key=lambda one: grown[one])
    others = median(more for other, more in grown.items() if other != rank)
    extra_s = (grown[rank] - others) * found.span_s
    waits_s = {one: wait * found.span_s for one, wait in found.cpu_wait.items()}
    others_s = median(wait for other, wait in waits_s.items() if other != rank)
    if waits_s[rank] < _TIMES * others_s or extra_s < max(
        config.straggler_floor_s, config.cpu_wait_share * (found.span_s - baseline.span_s)
    ):
        return None
    return Finding(
        kind=FindingKind.STRAGGLER,
        suspects=(Suspect(rank, 1.0),),
        summary=f"rank {rank} waits {waits_s[rank] * 1e3:.1f} ms a step for a CPU, others {others_s * 1e3:.1f} ms",
        evidence={
            "wait for a CPU, s": waits_s[rank],
            "wait of the others for a CPU, s": others_s,
            "step, s": found.span_s,
            "usual step, s": baseline.span_s,
            "steps": len(found.steps),
        },
        step=found.steps[-1],
        slowdown=found.span_s / baseline.span_s if baseline.span_s > 0 else 1.0,
    )
