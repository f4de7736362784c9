"""Traces of real jobs of the labelled benchmark, as they were recorded: to be looked at again, view by view.

python -m tests.test_faulttol.traces FOLDER [NAME …]      # record them anew, or those only
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from statistics import median

from faulttol.bench.labels import traces
from faulttol.bench.labels.grid import Case, fault_of
from faulttol.bench.labels.traces import Trace
from faulttol.bench.labels.trial import running, settle, strike

FOLDER = Path(__file__).parent / "traces"
_STEPS_BEFORE = 64
CASES = (
    Case("ddp", 4, "clean", 2.0, 0),
    Case("ddp", 4, "gc_pause", 2.0, 0),
    Case("ddp", 4, "uneven", 2.0, 0),
    Case("ddp", 4, "imbalance", 2.0, 0),
    Case("ddp", 4, "slow", 2.0, 0),
    Case("ddp", 4, "hang", 2.0, 0),
    Case("ddp", 4, "extra", 2.0, 0),
    Case("ddp", 4, "skip", 2.0, 0),
    Case("fsdp", 4, "slow", 2.0, 1),
    Case("pipeline", 4, "hang", 2.0, 0),
)


def names() -> list[str]:
    """The traces that there are."""
    return traces.names(FOLDER)


def load(name: str) -> Trace:
    """Read one trace."""
    return traces.load(FOLDER, name)


def record(folder: Path, wanted: Collection[str] = ()) -> None:
    """Make every trial and keep what its ranks recorded, from `_STEPS_BEFORE` before the fault on."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed.fsdp", "faulttol.bench.labels.jobs"])
    for case in CASES:
        if wanted and f"{case.job}-{case.kind}" not in wanted:
            continue
        with running(case.job, case.num_ranks) as job:
            assert settle(job), case
            baseline = job.watch.memory.baseline
            assert baseline is not None
            fault, culprit = fault_of(case, baseline.span_s, median(baseline.local_s.values()))
            first = job.step - _STEPS_BEFORE
            outcome = strike(job, fault, watch_s=1.5 if case.truth == "none" else 8.0)
            kept = {
                rank: replace(
                    one,
                    events=tuple(event for event in one.events if event.step >= first),
                    marks=tuple(mark for mark in one.marks if mark.step >= first),
                )
                for rank, one in outcome.view.records.items()
            }
        name = f"{case.job}-{case.kind}"
        traces.save(Trace(name, culprit if case.truth != "none" else "", round(outcome.struck_s * 1e9), kept), folder)
        print(name, culprit, [str(one.finding.kind) for one in outcome.alarms], flush=True)


if __name__ == "__main__":
    record(Path(sys.argv[1]), sys.argv[2:])
