"""Faults with labels, and what the detector says of them: precision, recall, culprits, delays, false alarms.

    python -m faulttol.bench.labelled [--jobs ddp,fsdp,pipeline] [--ranks 4,8] [--kinds …] [--magnitudes 1.2,1.8,3]
        [--seeds 10,11,…] [--workers N] [--budget-s S] [--runs FILE] [--traces FOLDER] [--json FILE] [--markdown FILE]
        [--smoke]

Jobs of 4 and 8 gloo ranks on this machine: DistributedDataParallel, FSDP2, a pipeline of two stages. Their
collectives, messages, gradients, rings, agents and sockets are real; a device's work is a sleep, since there are more
ranks than CPUs. Faults are real too (signals, a held GIL, paced connections, stray collectives, flipped bits) and their
targets drawn from the seed; `shared_cpu` is left out where there are fewer than 4 CPUs. A trial is one fault: it
strikes, and the first alarm within some seconds is the answer; in a benign trial none may come. Slow communication is
an alarm once a probe of the links names one. Of alarms in benign runs those are told apart that `faulttol.mode = act`
would answer with a recovery.

    precision of a class   trials rightly given it / all that were given it, benign ones included
    recall                 trials rightly given it / all trials of the class
    culprit                of those rightly given it: the strongest suspect is the target (a rank, a directed link)

The grid is ten seeds of every kind and magnitude in each of the three jobs, with 4 and 8 ranks from seed to seed in
turn: those of `grid.HELD_OUT_SEEDS`, which no threshold was chosen by, and which are gated. Seeds of
`grid.TUNED_SEEDS` may be looked at to make a rule better; they are told apart. Where none of a class was held out, its
gates are of what there is.

A job goes on from trial to trial; what ends it is followed by a new one. Every beginning of the order of trials is
balanced. `--runs` keeps every trial as a line of JSON, with a digest of the code that made and judged it: a second run
makes only what is missing, the figures are of all lines of this code with the `--seeds` that are asked for, and lines
of other code count for nothing.
`--workers` makes so many parts at a time. `--budget-s` bounds one run; with 0 it tells what the lines say. `--traces`
keeps what the ranks recorded in each, for looking at: it can not be judged anew as a whole, since probes answer a
suspicion. Rivals judge the same records (`faulttol.bench.labels.rivals`); those that need a run of their own are in
`trainsys.bench.rivals`. A magnitude is how many times longer the steps are meant to become; what became of it is kept
too, and slow faults are gated at those that made steps at least 1.5 times as long.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import torch

from faulttol import flight
from faulttol.bench import Report, arguments
from faulttol.bench.labels import rivals as other
from faulttol.bench.labels import traces
from faulttol.bench.labels.figures import judge, markdown, summary
from faulttol.bench.labels.grid import (
    CLASSES,
    EVERY,
    HELD_OUT_SEEDS,
    MAGNITUDES,
    RANKS,
    Case,
    Verdict,
    cases,
    fault_of,
    watch_s,
)
from faulttol.bench.labels.jobs import BACKLOG_S, JOBS, Withdraw
from faulttol.bench.labels.parts import in_parts
from faulttol.bench.labels.trial import DETECTOR, Outcome, RunningJob, TrialError, begin, running, settle, strike
from faulttol.bench.labels.version import code_version
from faulttol.rules.pace import paces
from faulttol.view import JobView

_CPUS_TO_SHARE_ONE = 4
"""With fewer, a rank that is bound to a busy CPU takes that from all the others too."""
_SMOKE_KINDS = ("clean", "slow", "hang", "kill")


def main(words: list[str]) -> int:
    """Run the benchmark and print its table."""
    parser = _parser()
    options = parser.parse_args(words)
    if options.smoke:
        options.jobs, options.ranks, options.kinds, options.magnitudes = ["ddp"], [4], list(_SMOKE_KINDS), [3.0]
        options.seeds = list(HELD_OUT_SEEDS[:2])
    if "shared_cpu" in options.kinds and (num_cpus := len(os.sched_getaffinity(0))) < _CPUS_TO_SHARE_ONE:
        print(f"shared_cpu is left out: with {num_cpus} CPUs it slows every rank; it takes {_CPUS_TO_SHARE_ONE}")
        options.kinds = [kind for kind in options.kinds if kind != "shared_cpu"]
    context = get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed.fsdp", "faulttol.bench.labels.jobs"])
    wanted = cases(options.jobs, options.ranks, options.kinds, options.magnitudes, options.seeds)
    made, num_others = read(options.runs)
    if num_others:
        print(f"{options.runs}: {num_others} lines were made by other code and count for nothing", flush=True)
    missing = [case for case in wanted if case.name not in made]
    if options.workers > 1:
        if options.runs is None:
            parser.error("--workers: the parts meet in --runs FILE; give one")
        folder = [] if options.traces is None else ["--traces", str(options.traces)]
        in_parts(missing, options.workers, options.budget_s, ["--runs", str(options.runs), *folder])
        made, _ = read(options.runs)
        missing = []
    for verdict in _trials(missing, time.monotonic() + options.budget_s, options.traces):
        made[verdict.name] = verdict
        if options.runs:
            _keep(options.runs, verdict)
        mark, num_made = "ok  " if verdict.is_right else "MISS", sum(case.name in made for case in wanted)
        print(
            f"{num_made}/{len(wanted)} {mark} {verdict.name} by {verdict.culprit or 'nobody'}: {verdict.said_kind} "
            f"{verdict.named} after {verdict.after_s:.2f} s, steps x {verdict.grown:.2f}",
            flush=True,
        )
    return 0 if options.part else _report(made, options)


def _report(made: Mapping[str, Verdict], options: argparse.Namespace) -> int:
    """Tell what all trials with these seeds say; return the exit code."""
    grid = cases(list(JOBS), RANKS, EVERY, MAGNITUDES, HELD_OUT_SEEDS)
    asked = cases(list(JOBS), RANKS, EVERY, MAGNITUDES, options.seeds)
    verdicts = [made[case.name] for case in asked if case.name in made]
    report = Report(
        "faulttol.labelled",
        {
            "trials": len(verdicts),
            "trials of the whole grid": len(grid),
            "trials by layout": dict(sorted(Counter(v.name.rpartition(f"/{v.kind}/")[0] for v in verdicts).items())),
            "trials by machine": dict(sorted(Counter(v.machine for v in verdicts).items())),
            "version": code_version(),
            "hang_after_s": DETECTOR.hang_after_s,
            "emulated": "the device's work, by sleeping",
            "rivals": "their rules on our records, except torch's flight recorder and analyser, which ran",
            "load average of the last 15 minutes": round(os.getloadavg()[2], 1),
            "false": [verdict.line() for verdict in verdicts if not verdict.is_right],
        },
    )
    judge(report, verdicts)
    print(summary(report))
    if options.markdown:
        options.markdown.write_text(markdown(report), encoding="utf-8")
    return report.finish(options)


def _keep(path: Path, verdict: Verdict) -> None:
    """Append a trial in one piece: parts share the file."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(fd, json.dumps(verdict.line()).encode() + b"\n")
    finally:
        os.close(fd)


def _trials(missing: Sequence[Case], until_s: float, folder: Path | None) -> Iterator[Verdict]:
    """Make the trials, in one job for as long as it lives; a trial that cannot be made is told and left out."""
    with ExitStack() as stack:
        job: RunningJob | None = None
        for case in missing:
            if time.monotonic() > until_s:
                return
            try:
                is_fit = job is not None and (job.spec.name, job.spec.num_ranks) == (case.job, case.num_ranks)
                if job is None or case.opens_job or not is_fit or not settle(job):
                    stack.close()
                    faults = (fault,) if case.opens_job and (fault := fault_of(case, 0.0, 0.0)[0]) else ()
                    job = stack.enter_context(running(case.job, case.num_ranks, faults=faults))
                    if not case.opens_job and not settle(job):
                        raise TrialError(f"{case.name}: the job does not settle")
                yield _opening(job, case, folder) if case.opens_job else _trial(job, case, folder)
                is_over = case.ends_job
            except TrialError as error:
                print(f"{error}; left out", flush=True)
                is_over = True
            if is_over:
                stack.close()
                job = None


def _opening(job: RunningJob, case: Case, folder: Path | None) -> Verdict:
    """The trial of a fault that strikes in the first step of a job, which has only begun."""
    outcome = begin(job)
    if outcome is None:
        raise TrialError(f"{case.name}: the job does not settle")
    baseline = job.watch.memory.baseline
    grown = _longest_grown(outcome.view, _span_s(outcome.view, 0.0) if baseline is None else baseline.span_s)
    return _verdict(job, case, outcome, "", grown, dict(baseline.local_s) if baseline else {}, folder)


def _trial(job: RunningJob, case: Case, folder: Path | None) -> Verdict:
    """The trial of a fault that strikes a job of which the detector knows what is usual."""
    baseline = job.watch.memory.baseline
    assert baseline is not None
    fault, culprit = fault_of(case, baseline.span_s, median(baseline.local_s.values()))
    first_step = job.step + 1
    outcome = strike(job, fault, watch_s=watch_s(case, baseline.span_s))
    grown = _span_s(outcome.view, outcome.struck_s) / baseline.span_s
    return _verdict(job, case, outcome, culprit, grown, dict(baseline.local_s), folder, first_step)


def _verdict(
    job: RunningJob,
    case: Case,
    outcome: Outcome,
    culprit: str,
    grown: float,
    before: dict[int, float],
    folder: Path | None,
    first_step: int = 0,
) -> Verdict:
    """What came of a trial; faults are withdrawn."""
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
        grown=grown,
        suspicions=len(outcome.others),
        rivals=_rivals(job, outcome, case, before, first_step),
        summary="" if finding is None else finding.summary,
        version=code_version(),
        machine=f"{os.cpu_count()} CPUs, torch {torch.__version__.partition('+')[0]}",
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


def _longest_grown(view: JobView, usual_s: float) -> float:
    """By how many times the longest whole step took longer than is usual; 0 where there were none."""
    longest_s = max((pace.span_s for record in view.records.values() for pace in paces(record).values()), default=0.0)
    return longest_s / usual_s if usual_s else 0.0


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


def read(path: Path | None) -> tuple[dict[str, Verdict], int]:
    """Return by name the trials that this code made and judged, and how many lines are of other code."""
    if path is None or not path.exists():
        return {}, 0
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    own = [line for line in lines if line.get("version") == code_version()]
    return {line["name"]: Verdict(**line) for line in own}, len(lines) - len(own)


def _parser() -> argparse.ArgumentParser:
    def words(text: str) -> list[str]:
        return text.split(",")

    parser = arguments(__doc__)
    parser.add_argument("--jobs", type=words, default=list(JOBS), help="of ddp, fsdp, pipeline (default: all)")
    parser.add_argument("--ranks", type=lambda text: [int(word) for word in words(text)], default=list(RANKS))
    parser.add_argument("--kinds", type=words, default=list(EVERY), help=f"of {', '.join(EVERY)} (default: all)")
    parser.add_argument(
        "--magnitudes", type=lambda text: [float(word) for word in words(text)], default=list(MAGNITUDES)
    )
    parser.add_argument("--seeds", type=lambda text: [int(word) for word in words(text)], default=list(HELD_OUT_SEEDS))
    parser.add_argument("--budget-s", type=float, default=float("inf"), help="begin no trial after so long")
    parser.add_argument(
        "--runs", type=Path, metavar="FILE", help="lines of JSON, one a trial, that are kept and added to"
    )
    parser.add_argument(
        "--workers", type=int, default=1, help="parts made at a time, two CPUs for each are enough (default: 1)"
    )
    parser.add_argument("--part", action="store_true", help="only make trials: tell no figures of them")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables of the README there")
    parser.add_argument("--traces", type=Path, metavar="FOLDER", help="keep what the ranks recorded of each trial")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
