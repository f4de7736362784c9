"""What others would say of the same trial, from the same records. Own implementations of published rules.

section score    nvidia-resiliency-ext: of each rank's time in its own sections, the least median over its own, and
                 its own best over its own; below 0.75 is a straggler. It sees compute only, and no hang: its report
                 is a collective.
show_straggler   DeepSpeed: sum over operations of latency less the least latency of any rank. It prints a number
                 for every rank and judges nothing; here it accuses who waits least, where the others' waiting
                 exceeds a fifth of the time.
flight recorder  torch: its dump of each rank, and its analyser, which ran; also the analyser on dumps of our records
process table    whoever only learns of processes that end, as a launcher does; the first in order is accused

A process group's timeout and Ray alone need runs of their own: `trainsys.bench.rivals`.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Mapping
from pathlib import Path
from statistics import median

from faulttol.config import DetectorConfig, HealthConfig
from faulttol.rules.pace import Pace, paces
from faulttol.view import JobView, match

SCORE = 0.75
_WAITING = 0.2
RIVALS = {
    "section score": "by its rule",
    "show_straggler": "by its rule",
    "process table": "by its rule",
    "flight recorder": "ran",
    "analyser on our records": "ran",
}
"""What others there are, and whether they ran or their rule was applied to our records."""
Said = tuple[str, str]
"""Class, who; `none` and empty where nothing is said."""
NOTHING: Said = ("none", "")


def section_score(view: JobView, before: Mapping[int, float], first_step: int) -> Said:
    """Accuse the rank with the lowest score of its time outside of collectives since `first_step`.

    `before`: each rank's median while nothing was wrong, the best that it ever did being taken for that.
    """
    own = _locals_s(view, first_step)
    if len(own) < 2:
        return NOTHING
    medians = {rank: median(values) for rank, values in own.items() if values}
    least = min(medians.values())
    scores = {rank: min(least, before.get(rank, value)) / max(value, 1e-9) for rank, value in medians.items()}
    worst = min(scores, key=lambda rank: scores[rank])
    return ("slow", f"rank {worst}") if scores[worst] < SCORE else NOTHING


def show_straggler(view: JobView, first_step: int) -> Said:
    """Accuse the rank that waits least, where the others wait for more than a fifth of the time."""
    waits: dict[int, float] = {}
    spans: dict[int, list[int]] = {}
    events = [e for r in view.records.values() for e in r.events if e.step >= first_step and e.state == "ended"]
    for operation in match(events).values():
        if operation.absent or operation.is_message:
            continue
        least = min(event.duration_ns or 0 for event in operation.events.values())
        for rank, event in operation.events.items():
            waits[rank] = waits.get(rank, 0.0) + ((event.duration_ns or 0) - least) / 1e9
            spans.setdefault(rank, []).append(event.begin_ns)
    if len(waits) < 2:
        return NOTHING
    total_s = max((max(times) - min(times)) / 1e9 for times in spans.values())
    first = min(waits, key=lambda rank: waits[rank])
    others_s = median(wait for rank, wait in waits.items() if rank != first)
    return ("slow", f"rank {first}") if others_s - waits[first] > _WAITING * total_s else NOTHING


def flight_recorder(folder: Path, prefix: str) -> Said:
    """What torch's analyser makes of the dumps: ranks missing in an operation, or operations that do not fit.

    Where the analyser itself stops, as on gloo's dumps or where a rank wrote none, that is said, with its error.
    """
    logging.disable(logging.CRITICAL)  # what it would print
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            from torch.distributed.flight_recorder.components.builder import build_db
            from torch.distributed.flight_recorder.components.config_manager import JobConfig
            from torch.distributed.flight_recorder.components.loader import read_dir

            options = JobConfig().parse_args([str(folder), "-p", prefix])
            details, version = read_dir(options)
            found = build_db(details, options, version)
    except (AssertionError, EOFError, KeyError, ValueError, IndexError, TypeError, NotImplementedError) as error:
        return "stopped", type(error).__name__
    finally:
        logging.disable(logging.NOTSET)
    for one in reversed(found.collectives):
        if one.missing_ranks:
            return "hang", f"rank {min(one.missing_ranks)}"
        if one.mismatch_collectives:
            return "desync", f"rank {min(one.mismatch_collectives)}"
    return NOTHING


def process_table(view: JobView) -> Said:
    """An ended process is told at once, with its rank; of several the first."""
    dead = [rank for rank, vitals in sorted(view.vitals.items()) if not vitals.process_alive]
    return ("crash", f"rank {dead[0]}") if dead else NOTHING


def _locals_s(view: JobView, first_step: int) -> dict[int, list[float]]:
    config, health = DetectorConfig(), HealthConfig()
    found: dict[int, list[float]] = {}
    for rank, record in view.records.items():
        own: list[Pace] = [
            pace for pace in paces(record, first_step).values() if not pace.phases & set(health.patient_phases)
        ]
        if len(own) >= config.window_steps // 2:
            found[rank] = [pace.local_s for pace in own]
    return found
