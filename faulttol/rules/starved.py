"""A rank whose threads find no CPU free: those that wait for it see slow communication. Pure."""

from __future__ import annotations

from statistics import median, median_low

from faulttol.config import DetectorConfig
from faulttol.finding import Finding, FindingKind, Suspect
from faulttol.rules.window import Baseline, Window

_TIMES = 1.5
"""How many times what its peers wait for a CPU it waits at least: on a busy machine all wait, and unevenly."""


def starved(found: Window, baseline: Baseline, config: DetectorConfig) -> Finding | None:
    """Return the straggler where its waiting for a CPU explains enough of what these steps grew; else None.

    Its threads that talk to others are late as well, and its own time outside of collectives says little. What a rank
    usually waits, what its peers wait more too, and what it waits in few of these steps, is no fault of it; where one
    of them is not known, nothing is.
    """
    parts = [found.cpu_wait_s(part) for part in found.parts(config.slow_windows)]
    known = set.intersection(*(set(part) for part in parts))
    waits_s = {rank: median_low(part[rank] for part in parts) for rank in known}
    ranks = sorted(found.paces)
    if len(ranks) < 2 or any(rank not in waits_s or rank not in baseline.cpu_wait_s for rank in ranks):
        return None
    more_s = {rank: waits_s[rank] - baseline.cpu_wait_s[rank] for rank in ranks}
    rank = max(ranks, key=lambda one: more_s[one])
    others_s = median(waits_s[other] for other in ranks if other != rank)
    extra_s = more_s[rank] - max(0.0, median(more_s[other] for other in ranks if other != rank))
    explained_s = config.cpu_wait_share * (found.span_s - baseline.span_s)
    if waits_s[rank] < _TIMES * others_s or extra_s < max(config.straggler_floor_s, explained_s):
        return None
    return Finding(
        kind=FindingKind.STRAGGLER,
        suspects=(Suspect(rank, 1.0),),
        summary=f"rank {rank} waits {waits_s[rank] * 1e3:.1f} ms a step for a CPU, others {others_s * 1e3:.1f} ms",
        evidence={
            "wait for a CPU, s": waits_s[rank],
            "usual wait for a CPU, s": baseline.cpu_wait_s[rank],
            "wait of the others for a CPU, s": others_s,
            "step, s": found.span_s,
            "usual step, s": baseline.span_s,
            "steps": len(found.steps),
        },
        step=found.steps[-1],
        slowdown=found.span_s / baseline.span_s if baseline.span_s > 0 else 1.0,
    )
