"""Ranks whose numbers are wrong: not finite, or far from those of the ranks that do the same work."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median

from faulttol.config import DetectorConfig
from faulttol.finding import Finding, FindingKind, Suspect
from faulttol.view import JobView

_LEAST_SPREAD = 0.05
"""Spread of log norms that replicas have anyway; below it none counts as an outlier."""
_USUAL, _LEAST_USUAL = 32, 5
"""Earlier steps whose median is a rank's usual norm: at most, at least."""
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
    """Return what the marks of the last steps say: a gradient norm before the reduction, a loss.

    Where ranks were not finite in several steps, the first step's are named: the reduction spreads it to all.
    """
    norms: dict[int, dict[int, float]] = {}
    losses: dict[int, dict[int, float]] = {}
    for rank, record in view.records.items():
        for mark in record.marks:
            if mark.grad_norm is not None:
                norms.setdefault(mark.step, {})[rank] = mark.grad_norm
            if mark.loss is not None:
                losses.setdefault(mark.step, {})[rank] = mark.loss
    before: dict[int, list[float]] = {}
    for step in sorted(norms.keys() | losses.keys()):
        usual = {rank: median(own[-_USUAL:]) for rank, own in before.items() if len(own) >= _LEAST_USUAL}
        found = outliers(norms.get(step, {}), usual, config.gradient_deviations)
        for rank, norm in norms.get(step, {}).items():
            before.setdefault(rank, []).append(norm)
        what = "gradient norm before the reduction"
        if not found:
            what = "loss"
            found = {rank: math.inf for rank, loss in losses.get(step, {}).items() if not math.isfinite(loss)}
        if found:
            values = norms.get(step, {}) if "norm" in what else losses[step]
            return [_finding(step, what, found, values)]
    return []


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
