"""The labelled benchmark in parts, several at a time: each a process of its own, all of them adding to one file."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence

from faulttol.bench.labels.grid import SLOW, Case

_MODULE = "faulttol.bench.labelled"


def in_parts(missing: Sequence[Case], num_workers: int, budget_s: float, options: Sequence[str]) -> None:
    """Make trials, the seeds one after the other, each layout of a seed by one worker at a time.

    Raises: RuntimeError if a part failed; what the others made is kept.
    """
    todo, failed, lock = deque(parts_of(missing)), list[str](), threading.Lock()
    until_s, num_made = time.monotonic() + budget_s, 0

    def work() -> None:
        nonlocal num_made
        while (left_s := until_s - time.monotonic()) > 0:
            try:
                part = todo.popleft()
            except IndexError:
                return
            command = [sys.executable, "-m", _MODULE, "--part", "--budget-s", str(left_s), *options, *words_of(part)]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
                assert process.stdout is not None
                for line in process.stdout:
                    count, _, told = line.partition(" ")
                    is_trial = "/" in count and count.replace("/", "").isdigit()
                    with lock:
                        num_made += is_trial
                        print(f"{num_made}/{len(missing)} {told}" if is_trial else line, end="", flush=True)
            if process.returncode:
                failed.append(f"{' '.join(command)}: exit code {process.returncode}")

    workers = [threading.Thread(target=work) for _ in range(num_workers)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if failed:
        raise RuntimeError("; ".join(failed))


def parts_of(missing: Sequence[Case]) -> list[list[Case]]:
    """Divide trials by seed and layout, in the order of the first of each."""
    parts: dict[tuple[int, str, int], list[Case]] = {}
    for case in missing:
        parts.setdefault((case.seed, case.job, case.num_ranks), []).append(case)
    return list(parts.values())


def words_of(part: Sequence[Case]) -> list[str]:
    """The options that choose these trials, all of one layout and seed.

    Where a kind lacks one magnitude and another kind another, they choose both of both: what is made is not made again.
    """
    first = part[0]
    kinds = dict.fromkeys(case.kind for case in part)
    magnitudes = dict.fromkeys(f"{case.magnitude:g}" for case in part if case.kind in SLOW)
    words = {"jobs": first.job, "ranks": str(first.num_ranks), "seeds": str(first.seed), "kinds": ",".join(kinds)}
    if magnitudes:
        words["magnitudes"] = ",".join(magnitudes)
    return [f"--{name}={value}" for name, value in words.items()]
