"""What trials say: precision, recall, culprits and delays of every class, false alarms, and the gates. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb
from statistics import fmean, median

from faulttol.bench import Gate, Report, table
from faulttol.bench.labels import rivals as other
from faulttol.bench.labels.grid import Verdict
from faulttol.bench.labels.trial import DETECTOR, HEALTH
from faulttol.finding import FindingKind

_HELD_OUT, _TUNED = "held out", "tuned"
_IN_TIME = "found within threshold + 1 s"
_COLUMNS = ("trials", "precision", "recall", "culprit", _IN_TIME)
_LIMITS = {"precision": 0.99, "recall": 0.99, "culprit": 0.95}
_SLOW_LIMITS = {"precision": 0.95, "recall": 0.9, "culprit": 0.95}
_AT_MOST = "share of alarms, at most (95 %)"


def judge(report: Report, verdicts: Sequence[Verdict]) -> None:
    """Add figures and gates of the trials to the report."""
    kept = [v for v in verdicts if v.truth != "slow" or v.grown >= 1.5]
    held_out, tuned = [v for v in kept if v.is_held_out], [v for v in kept if not v.is_held_out]
    for name in ("crash", "hang", "desync", "slow", "numeric"):
        has_held_out = any(v.truth == name for v in held_out)
        _by_class(report, name, held_out, _HELD_OUT, is_gated=True)
        _by_class(report, name, tuned, _TUNED, is_gated=not has_held_out)
    _by_magnitude(report, verdicts)
    has_held_out = any(v.truth == "none" for v in held_out)
    _benign(report, [v for v in held_out if v.truth == "none"], _HELD_OUT, is_gated=True)
    _benign(report, [v for v in tuned if v.truth == "none"], _TUNED, is_gated=not has_held_out)


def summary(report: Report) -> str:
    """Return the figures of every class as one table."""
    figures = {(case, metric): values for (case, metric, _), values in report.samples.items()}
    rows: list[tuple[str, ...]] = [("CLASS", *(column.upper() for column in _COLUMNS), "FOUND AFTER, S (MEDIAN, MOST)")]
    for case in dict.fromkeys(case for case, _, _ in report.samples):
        if (case, "precision") in figures:
            cells = [figures.get((case, column)) for column in _COLUMNS]
            after = figures.get((case, "found after"))
            told = "" if after is None else f"{median(after):.2f}, {max(after):.2f}"
            rows.append((case, *("" if cell is None else f"{cell[0]:.3g}" for cell in cells), told))
    return table(rows)


def markdown(report: Report) -> str:
    """Return the figures of every class, of benign runs and of the gates as tables for a README."""
    figures = {(case, metric): values for (case, metric, _), values in report.samples.items()}
    told = report.parameters
    rows = [f"{told.get('trials', 0)} of {told.get('trials of the whole grid', 0)} trials:", ""]
    rows += ["| class | trials | precision | recall | culprit named | found after, s (median, most) |"]
    rows += ["| --- | --- | --- | --- | --- | --- |"]
    cases_ = list(dict.fromkeys(case for case, _, _ in report.samples))
    for case in (case for case in cases_ if (case, "precision") in figures):
        cells = [f"{figures[case, column][0]:.3g}" for column in ("trials", "precision", "recall", "culprit")]
        after = figures.get((case, "found after"))
        cells.append("-" if after is None else f"{median(after):.2f}, {max(after):.2f}")
        rows.append(f"| {case} | {' | '.join(cells)} |")
    rows += [
        "",
        f"| clean and benign runs | trials | alarms | actions | {_AT_MOST} |",
        "| --- | --- | --- | --- | --- |",
    ]
    for case in (case for case in cases_ if (case, _AT_MOST) in figures):
        cells = [f"{figures[case, c][0]:.3g}" for c in ("trials", "alarms", "actions", _AT_MOST)]
        rows.append(f"| {case} | {' | '.join(cells)} |")
    rows += [
        "",
        "| slow faults, by what was meant | trials | recall | steps became (median) |",
        "| --- | --- | --- | --- |",
    ]
    for case in (case for case in cases_ if case.startswith("slow x ")):
        grown = figures[case, "steps grew"]
        rows.append(f"| {case} | {len(grown)} | {figures[case, 'recall'][0]:.3g} | {median(grown):.2f} |")
    rows += ["", "| held to | value | limit | |", "| --- | --- | --- | --- |"]
    rows += [f"| {g.name} | {g.value:.3g} | {g.limit:.3g} | {'ok' if g.ok else 'missed'} |" for g in report.gates]
    return "\n".join(rows) + "\n"


def _by_class(report: Report, name: str, verdicts: Sequence[Verdict], what: str, *, is_gated: bool) -> None:
    """Of trials that are all held out, or all not."""
    given = [v for v in verdicts if v.said == name]
    of_class = [v for v in verdicts if v.truth == name]
    right = [v for v in of_class if v.is_right]
    if not of_class:
        return
    case = f"{name}, {what}"
    found = {
        "precision": len(right) / len(given) if given else 0.0,
        "recall": len(right) / len(of_class),
        "culprit": sum(v.named == v.culprit for v in right) / len(right) if right else 0.0,
    }
    limits = _SLOW_LIMITS if name == "slow" else _LIMITS
    if name == "hang" and right:
        found[_IN_TIME] = sum(v.after_s <= hang_threshold_s(v.kind) + 1.0 for v in right) / len(right)
        limits = {**limits, _IN_TIME: 1.0}
    report.add(case, "trials", "1", len(of_class))
    for metric, value in found.items():
        report.add(case, metric, "1", value)
        if is_gated:
            report.gates.append(Gate(f"{name}: {metric}", value, limits[metric], value >= limits[metric]))
    if right:
        report.add(case, "found after", "s", *(v.after_s for v in right))
    for rival, how in other.RIVALS.items():
        said = [(v.rivals[rival], v.culprit) for v in of_class if rival in v.rivals]
        if said:
            report.add(f"{case}, {rival} ({how})", "recall", "1", fmean(one[0] == name for one, _ in said))
            report.add(f"{case}, {rival} ({how})", "culprit", "1", fmean(one[1] == culprit for one, culprit in said))


def hang_threshold_s(kind: str) -> float:
    """From when on something hangs: later in a phase in which more patience is had."""
    return DETECTOR.hang_after_s * (HEALTH.patience if kind == "checkpoint_stall" else 1.0)


def _by_magnitude(report: Report, verdicts: Sequence[Verdict]) -> None:
    slow = [v for v in verdicts if v.truth == "slow"]
    for magnitude in sorted({v.magnitude for v in slow}):
        those = [v for v in slow if v.magnitude == magnitude]
        report.add(f"slow x {magnitude:g}", "recall", "1", sum(v.is_right for v in those) / len(those))
        report.add(f"slow x {magnitude:g}", "steps grew", "1", *(v.grown for v in those))
    for kind in sorted({v.kind for v in verdicts}):
        those = [v for v in verdicts if v.kind == kind]
        report.add(f"kind {kind}", "right", "1", sum(v.is_right for v in those) / len(those))


def _benign(report: Report, verdicts: Sequence[Verdict], what: str, *, is_gated: bool) -> None:
    if not verdicts:
        return
    case = f"benign, {what}"
    alarms = sum(v.said != "none" for v in verdicts)
    actions = sum(_is_acted_on(v) for v in verdicts)
    report.add(case, "trials", "1", len(verdicts))
    report.add(case, "alarms", "1", alarms)
    report.add(case, "actions", "1", actions)
    report.add(case, _AT_MOST, "1", at_most(alarms, len(verdicts)))
    report.add(case, "suspicions that a probe dropped, and imbalances", "1", sum(v.suspicions for v in verdicts))
    if is_gated:
        report.gates.append(Gate("alarms in clean and benign runs", alarms, 0, alarms == 0))
        report.gates.append(Gate("actions in clean and benign runs", actions, 0, actions == 0))
    for rival, how in other.RIVALS.items():
        false = sum(v.rivals[rival][0] != "none" for v in verdicts if rival in v.rivals)
        report.add(f"{case}, {rival} ({how})", "alarms", "1", false)


def _is_acted_on(verdict: Verdict) -> bool:
    """Whether `faulttol.mode = act` answers the alarm with a recovery: a slow link's two ends are only told."""
    is_link = verdict.said_kind == FindingKind.COMMUNICATION_SLOW.value and not verdict.named.startswith("rank")
    return verdict.said != "none" and not is_link


def at_most(num: int, num_trials: int) -> float:
    """Return the share of which so few in so many trials would be seen with a probability of 5 % (Clopper, Pearson)."""

    def seen(share: float) -> float:
        return sum(comb(num_trials, k) * share**k * (1 - share) ** (num_trials - k) for k in range(num + 1))

    low, high = num / num_trials, 1.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if seen(middle) > 0.05 else (low, middle)
    return high
