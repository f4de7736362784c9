"""Faults with labels, and what the detector says of them: precision, recall, culprits, delays, false alarms.

    python -m faulttol.bench.labelled [--jobs ddp,fsdp,pipeline] [--ranks 4,8] [--kinds …] [--magnitudes 1.2,1.5,2,4]
        [--seeds 6,7,…] [--minutes M] [--runs FILE] [--traces FOLDER] [--json FILE] [--smoke]

Jobs of 4 and 8 gloo ranks on this machine: DistributedDataParallel, FSDP2, a pipeline of two stages. Their
collectives, messages, gradients, rings, agents and sockets are real; a device's work is a sleep, since there are more
ranks than CPUs. Faults are real too (signals, a held GIL, paced connections, stray collectives, flipped bits) and their
targets drawn from the seed. A trial is one fault: it strikes, and the first alarm within some seconds is the answer; in
a benign trial none may come. Slow communication is an alarm once a probe of the links names one.

    precision of a class   trials rightly given it / all that were given it, benign ones included
    recall                 trials rightly given it / all trials of the class
    culprit                of those rightly given it: the strongest suspect is the target (a rank, a directed link)

Seeds of `grid.TUNED_SEEDS` may be looked at to make a rule better, those of `grid.HELD_OUT_SEEDS` may not: they are
made first, told apart, and gated. Where none of a class was made, its gates are of what there is.

A job goes on from trial to trial; what ends it is followed by a new one. Every beginning of the order of trials is
balanced. `--runs` keeps every trial as a line of JSON: a second run makes only what is missing, and `--minutes` bounds
one run. `--traces` keeps what the ranks recorded in each. Rivals judge the same records
(`faulttol.bench.labels.rivals`); those that need a run of their own are in `trainsys.bench.rivals`. A magnitude is how
many times longer the steps are meant to become; what became of it is kept too, and slow faults are gated at those that
made steps at least 1.5 times as long.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from math import comb
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, median

from faulttol import flight
from faulttol.bench import Gate, Report, arguments, table
from faulttol.bench.labels import rivals as other
from faulttol.bench.labels import traces
from faulttol.bench.labels.grid import (
    BENIGN,
    CLASSES,
    ENDING,
    HELD_OUT_SEEDS,
    MAGNITUDES,
    NUMERIC,
    SLOW,
    STANDING,
    TUNED_SEEDS,
    Case,
    Verdict,
    cases,
    fault_of,
)
from faulttol.bench.labels.jobs import BACKLOG_S, JOBS, Withdraw
from faulttol.bench.labels.trial import DETECTOR, Outcome, RunningJob, TrialError, running, settle, strike
from faulttol.rules.pace import paces
from faulttol.view import JobView

_WATCH_S = {"none": 2.0, "crash": 3.0, "hang": 2.4, "desync": 4.0, "slow": 6.0, "numeric": 3.0}
_WATCH_STEPS = 40
"""Slow faults are watched for so many of the steps that they are meant to make, at least."""
_HELD_OUT, _TUNED = "held out", "tuned"
_IN_TIME = "found within threshold + 1 s"
_COLUMNS = ("trials", "precision", "recall", "culprit", _IN_TIME)
_LIMITS = {"precision": 0.99, "recall": 0.99, "culprit": 0.95}
_SLOW_LIMITS = {"precision": 0.95, "recall": 0.9, "culprit": 0.95}
_SMOKE_KINDS = ("clean", "slow", "hang", "kill")


def main(words: list[str]) -> int:
    """Run the benchmark and print its table."""
    options = _parser().parse_args(words)
    if options.smoke:
        options.jobs, options.ranks, options.kinds, options.magnitudes = ["ddp"], [4], list(_SMOKE_KINDS), [4.0]
        options.seeds = [HELD_OUT_SEEDS[0]]
    context = get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed.fsdp", "faulttol.bench.labels.jobs"])
    wanted = cases(options.jobs, options.ranks, options.kinds, options.magnitudes, options.seeds)
    made = _read(options.runs)
    missing = [case for case in wanted if case.name not in made]
    begun_s = time.monotonic()
    for verdict in _trials(missing, begun_s + 60 * options.minutes, options.traces):
        made[verdict.name] = verdict
        if options.runs:
            with options.runs.open("a") as file:
                file.write(json.dumps(verdict.line()) + "\n")
        mark, num_made = "ok  " if verdict.is_right else "MISS", sum(case.name in made for case in wanted)
        print(
            f"{num_made}/{len(wanted)} {mark} {verdict.name} by {verdict.culprit or 'nobody'}: {verdict.said_kind} "
            f"{verdict.named} after {verdict.after_s:.2f} s, steps x {verdict.grown:.2f}",
            flush=True,
        )
    names = {case.name for case in wanted}
    verdicts = [verdict for name, verdict in made.items() if name in names]
    report = Report(
        "faulttol.labelled",
        {
            "jobs": options.jobs,
            "ranks": options.ranks,
            "magnitudes": options.magnitudes,
            "seeds": options.seeds,
            "trials": len(verdicts),
            "trials of the whole grid": len(wanted),
            "hang_after_s": DETECTOR.hang_after_s,
            "emulated": "the device's work, by sleeping",
            "rivals": "their rules on our records, except torch's flight recorder and analyser, which ran",
            "load average of the last 15 minutes": round(os.getloadavg()[2], 1),
            "false": [verdict.line() for verdict in verdicts if not verdict.is_right],
        },
    )
    judge(report, verdicts)
    print(summary(report))
    return report.finish(options)


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
        limit_s = DETECTOR.hang_after_s + 1.0
        found[_IN_TIME] = sum(v.after_s <= limit_s for v in right) / len(right)
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
    report.add(case, "trials", "1", len(verdicts))
    report.add(case, "alarms", "1", alarms)
    report.add(case, "share of alarms, at most (95 %)", "1", at_most(alarms, len(verdicts)))
    report.add(case, "suspicions that a probe dropped, and imbalances", "1", sum(v.suspicions for v in verdicts))
    if is_gated:
        report.gates.append(Gate("alarms in clean and benign runs", alarms, 0, alarms == 0))
    for rival, how in other.RIVALS.items():
        false = sum(v.rivals[rival][0] != "none" for v in verdicts if rival in v.rivals)
        report.add(f"{case}, {rival} ({how})", "alarms", "1", false)


def at_most(num: int, num_trials: int) -> float:
    """Return the share of which so few in so many trials would be seen with a probability of 5 % (Clopper, Pearson)."""

    def seen(share: float) -> float:
        return sum(comb(num_trials, k) * share**k * (1 - share) ** (num_trials - k) for k in range(num + 1))

    low, high = num / num_trials, 1.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if seen(middle) > 0.05 else (low, middle)
    return high


def _trials(missing: Sequence[Case], until_s: float, folder: Path | None) -> Iterator[Verdict]:
    """Make the trials, in one job for as long as it lives; a trial that cannot be made is told and left out."""
    with ExitStack() as stack:
        job: RunningJob | None = None
        for case in missing:
            if time.monotonic() > until_s:
                return
            try:
                if job is None or (job.spec.name, job.spec.num_ranks) != (case.job, case.num_ranks) or not settle(job):
                    stack.close()
                    job = stack.enter_context(running(case.job, case.num_ranks))
                    if not settle(job):
                        raise TrialError(f"{case.name}: the job does not settle")
                yield _trial(job, case, folder)
                is_over = case.ends_job
            except TrialError as error:
                print(f"{error}; left out", flush=True)
                is_over = True
            if is_over:
                stack.close()
                job = None


def _trial(job: RunningJob, case: Case, folder: Path | None) -> Verdict:
    baseline = job.watch.memory.baseline
    assert baseline is not None
    fault, culprit = fault_of(case, baseline.span_s)
    first_step = job.step + 1
    watch_s = _WATCH_S[case.truth]
    if case.kind == "stuck_link":
        watch_s = _WATCH_S["slow"]  # it does not pass by itself
    if case.truth == "slow":
        watch_s = max(watch_s, _WATCH_STEPS * case.magnitude * baseline.span_s)
    outcome = strike(job, fault, watch_s=watch_s)
    if not outcome.struck_s:
        raise TrialError(f"{case.name}: the fault did not strike")
    job.order(Withdraw())
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        named = culprit if case.truth != "none" else ""
        trace = traces.Trace(
            case.name.replace("/", "-"), named, round(outcome.struck_s * 1e9), dict(outcome.view.records)
        )
        traces.save(trace, folder)
    alarm = outcome.alarms[0] if outcome.alarms else None
    finding = None if alarm is None else alarm.finding
    return Verdict(
        name=case.name,
        truth=case.truth,
        kind=case.kind,
        magnitude=case.magnitude,
        said="none" if finding is None else CLASSES[finding.kind],
        said_kind="nothing" if finding is None else finding.kind.value,
        named="" if finding is None or not finding.suspects else str(finding.suspects[0]),
        culprit=culprit,
        after_s=0.0 if alarm is None else alarm.at_s - outcome.struck_s,
        grown=_span_s(outcome.view, outcome.struck_s) / baseline.span_s,
        suspicions=len(outcome.others),
        rivals=_rivals(job, outcome, case, dict(baseline.local_s), first_step),
        summary="" if finding is None else finding.summary,
    )


def _span_s(view: JobView, since_s: float) -> float:
    """Median of the whole steps since then, of all ranks; 0 where there were none."""
    spans = []
    for record in view.records.values():
        begun = {mark.step: mark.at_ns / 1e9 for mark in record.marks if mark.kind == "step_begin"}
        spans += [
            pace.span_s
            for pace in paces(record).values()
            if begun.get(pace.step, 0.0) >= since_s and not pace.phases & {"probe", "verify"}
        ]
    return median(spans) if spans else 0.0


def _rivals(
    job: RunningJob, outcome: Outcome, case: Case, before: dict[int, float], first_step: int
) -> dict[str, tuple[str, str]]:
    said = {
        "section score": other.section_score(outcome.view, before, first_step),
        "show_straggler": other.show_straggler(outcome.view, first_step),
        "process table": other.process_table(outcome.view),
        "flight recorder": other.NOTHING,
        "analyser on our records": other.NOTHING,
    }
    if case.truth in ("crash", "hang", "desync"):
        folder = job.spec.directory
        (folder / "dump").touch()
        time.sleep(2 * BACKLOG_S + 0.1)
        said["flight recorder"] = other.flight_recorder(folder, "torch_rank_")
        flight.dump(list(outcome.view.records.values()), folder, "our_rank_")
        said["analyser on our records"] = other.flight_recorder(folder, "our_rank_")
        for path in (folder / "dump", *folder.glob("torch_rank_*"), *folder.glob("our_rank_*")):
            path.unlink(missing_ok=True)
    return said


def _read(path: Path | None) -> dict[str, Verdict]:
    if path is None or not path.exists():
        return {}
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {line["name"]: Verdict(**line) for line in lines}


def _parser() -> argparse.ArgumentParser:
    def words(text: str) -> list[str]:
        return text.split(",")

    parser = arguments(__doc__)
    every = (*BENIGN, *SLOW, *STANDING, *NUMERIC, *ENDING)
    parser.add_argument("--jobs", type=words, default=list(JOBS), help="of ddp, fsdp, pipeline (default: all)")
    parser.add_argument("--ranks", type=lambda text: [int(word) for word in words(text)], default=[4, 8])
    parser.add_argument("--kinds", type=words, default=list(every), help=f"of {', '.join(every)} (default: all)")
    parser.add_argument(
        "--magnitudes", type=lambda text: [float(word) for word in words(text)], default=list(MAGNITUDES)
    )
    parser.add_argument(
        "--seeds", type=lambda text: [int(word) for word in words(text)], default=[*HELD_OUT_SEEDS, *TUNED_SEEDS]
    )
    parser.add_argument("--minutes", type=float, default=1e6, help="make no new trial after so long")
    parser.add_argument(
        "--runs", type=Path, metavar="FILE", help="lines of JSON, one a trial, that are kept and added to"
    )
    parser.add_argument("--traces", type=Path, metavar="FOLDER", help="keep what the ranks recorded of each trial")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
