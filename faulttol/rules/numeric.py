"""Ranks whose numbers are wrong: not finite, or far from those of the ranks that do the same work."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median

from faulttol.config import DetectorConfig
from faulttol.events import RankRecord
from faulttol.finding import Finding, FindingKind, Suspect
from faulttol.view import JobView

_LEAST_SPREAD = 0.05
"""Spread of log norms that replicas have anyway; below it none counts as an outlier."""
_USUAL, _LEAST_USUAL = 32, 5
"""Earlier steps whose median is a rank's usual norm: at most, at least."""
_NORM, _LOSS = "gradient norm before the reduction", "loss"
_TO_SIGMA = 1.4826
"""Median absolute deviation to standard deviation, of a normal distribution."""


def outliers(values: Mapping[int, float], usual: Mapping[int, float], deviations: float) -> dict[int, float]:
    """Return the ranks whose value is not finite or changed unlike the others', each with its distance.

    A value is compared with the rank's own usual one: stages of a pipeline have other norms, and all of them grow and
    shrink together. Distance is in robust standard deviations of the logarithm of that ratio; inf for what is not
    finite. With fewer than three ranks to compare only what is not finite is told.
    """
    wrong = {rank: math.inf for rank, value in values.items() if not math.isfinite(value)}
    logs = {
        rank: math.log(value / usual[rank])
        for rank, value in values.items()
        if math.isfinite(value) and value > 0 and usual.get(rank, 0.0) > 0
    }
    if len(logs) < 3:
        return wrong
    middle = median(logs.values())
    spread = max(_LEAST_SPREAD, _TO_SIGMA * median(abs(x - middle) for x in logs.values()))
    far = {rank: abs(x - middle) / spread for rank, x in logs.items()}
    return wrong | {rank: distance for rank, distance in far.items() if distance > deviations}


def numeric(view: JobView, config: DetectorConfig) -> list[Finding]:
    """Return what the marks of the last steps say: a gradient norm before the reduction, a loss; the first step first.

    Only steps that every rank has marked are judged: who has marked one first is not who is to blame. Of the same ranks
    the first step is told. What is not finite on all ranks after it was not on some is told no more: the reduction
    spreads it.
    """
    norms: dict[int, dict[int, float]] = {}
    losses: dict[int, dict[int, float]] = {}
    for rank, record in view.records.items():
        for mark in record.marks:
            if mark.grad_norm is not None:
                norms.setdefault(mark.step, {})[rank] = mark.grad_norm
            if mark.loss is not None:
                losses.setdefault(mark.step, {})[rank] = mark.loss
    over = min((_last_over(record) for record in view.records.values()), default=-1)
    before: dict[int, list[float]] = {}
    findings: dict[object, Finding] = {}
    has_spread = False
    for step in sorted(step for step in norms.keys() | losses.keys() if step <= over):
        usual = {rank: median(own[-_USUAL:]) for rank, own in before.items() if len(own) >= _LEAST_USUAL}
        what, values = _NORM, norms.get(step, {})
        found = outliers(values, usual, config.gradient_deviations)
        for rank, norm in values.items():
            if math.isfinite(norm):
                before.setdefault(rank, []).append(norm)
        if not found:
            what, values = _LOSS, losses.get(step, {})
            found = {rank: math.inf for rank, loss in values.items() if not math.isfinite(loss)}
        if found and not (has_spread and len(found) == len(values)):
            finding = _finding(step, what, found, values)
            findings.setdefault(finding.key, finding)
        has_spread = has_spread or math.inf in found.values()
    return list(findings.values())


def lone_outlier(finding: Finding) -> int | None:
    """Return the rank whose own gradient alone was unlike the others'; None for whatever else a finding says.

    A loss names nobody: that of one rank is not finite where all ranks' parameters are already wrong.
    """
    is_norm = any(name.startswith(_NORM) for name in finding.evidence)
    return finding.culprits[0] if is_norm and len(finding.culprits) == 1 else None


def _last_over(record: RankRecord) -> int:
    """The last step that the rank has marked the end of, or gone on from."""
    return max((mark.step if mark.kind == "step_end" else mark.step - 1 for mark in record.marks), default=-1)


def _finding(step: int, what: str, found: Mapping[int, float], values: Mapping[int, float]) -> Finding:
    ranked = sorted(found, key=lambda rank: (-found[rank], rank))
    total = len(ranked)
    return Finding(
        kind=FindingKind.NUMERIC,
        suspects=tuple(Suspect(rank, 1.0 / total) for rank in ranked),
        summary=f"step {step}: {what} of rank {ranked[0]} is {values[ranked[0]]:.6g}",
        evidence={f"{what} of rank {rank}": values[rank] for rank in sorted(values)},
        step=step,
    )
