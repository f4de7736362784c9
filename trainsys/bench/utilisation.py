"""Where the device's time goes: how much of a step is the model's arithmetic at peak rate, and what takes the rest.

    python -m trainsys.bench.utilisation [--json FILE] [--smoke] [RECIPE… --key=value…]

starts `trainsys launch RECIPE… --key=value…` once and records three of its steps with the profiler. Step time, tokens/s
and MFU are those of `trainsys.bench.training`, of the steps that are not recorded. The recorded ones say how a step is
shared out: each instant of rank 0's device belongs to the first of these that is running then,

    products        matrix products
    attention       fused attention
    optimizer       the update
    copies          memory copies and fills
    other           elementwise operations, norms, the loss
    communication   collectives, where nothing of the above hides them
    idle            none: the device waits for the host

and `arithmetic` is MFU: what the products and attention would take at the device's peak. MFU, what products and
attention take above that, and the others make up the step: what is lost, and to what. On a CPU, where there are no
kernels, the innermost operators are taken for them.

Baseline and bound: the device's peak. Gate: the run's loss falls.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainsys.bench import training

_KINDS = {
    "communication": r"nccl|gloo|c10d::",
    "attention": r"flash|fmha|attention|attn",
    "products": r"gemm|nvjet|cutlass|cublas|xmma|aten::(mm|addmm|bmm|baddbmm|_grouped_mm|linear)$|mkldnn",
    "optimizer": r"adam|multi_tensor_apply|foreach|muon",
    "copies": r"memcpy|memset|aten::(copy_|fill_|zero_|clone)$",
}
_ORDER = ("products", "attention", "optimizer", "copies", "other", "communication")
_NUM_RECORDED = 3


@dataclass(frozen=True, slots=True)
class Kernel:
    """One stretch of the device's time."""

    name: str
    start_us: float
    end_us: float


def main(arguments: list[str]) -> int:
    """Run the benchmark and print its table; 1 where a correctness gate fails."""
    parser = argparse.ArgumentParser(prog="python -m trainsys.bench.utilisation", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--smoke", action="store_true", help="six steps of a minute model: does it run?")
    chosen, given = parser.parse_known_args(arguments)
    with tempfile.TemporaryDirectory(prefix="bench-utilisation-") as folder:
        settings = training.settings(given, Path(folder), smoke=chosen.smoke)
        # The last steps: the others have warmed everything up.
        recorded = f"--profile.start_step={training.num_steps(settings) - _NUM_RECORDED + 1}"
        run = training.train([*settings, recorded, f"--profile.num_steps={_NUM_RECORDED}"], Path(folder, "run"))
        document = training.describe(settings, [run], skip_last=_NUM_RECORDED)
        trace = json.loads((run / "profile" / "rank0.json").read_text(encoding="utf-8"))
    document["name"] = "trainsys.utilisation"
    case = document["results"][0]["case"]
    mfu = statistics.median(row["median"] for row in document["results"] if row["metric"] == "MFU")
    for name, value in losses(shares(trace["traceEvents"]), mfu).items():
        document["results"].append(
            {"case": case, "metric": f"share of {name}", "unit": "1", "samples": [value]}
            | {"median": value, "min": value, "max": value}
        )
    training.finish(document, chosen.json)
    return 0 if all(gate["ok"] for gate in document["gates"]) else 1


def losses(share: Mapping[str, float], mfu: float) -> dict[str, float]:
    """Return the parts of a step's time, which sum to 1: the arithmetic at peak rate, and what is lost, by cause.

    The recorded steps' shares are applied to the unrecorded steps, whose MFU it is.
    """
    busy = share["products"] + share["attention"]
    rest = {kind: share[kind] for kind in ("optimizer", "copies", "other", "communication", "idle")}
    return {"arithmetic": mfu, "products and attention below peak": busy - mfu, **rest}


def shares(events: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Return the share of the recorded steps' time that each kind of kernel has, and `idle`; they sum to 1."""
    complete = [event for event in events if event.get("ph") == "X"]
    steps = [event for event in complete if re.match(r"ProfilerStep#", event["name"])]
    start = min(event["ts"] for event in steps)
    end = max(event["ts"] + event["dur"] for event in steps)
    taken = dict.fromkeys(_ORDER, 0.0)
    for kind, duration in _exclusive(list(_kernels(complete)), start, end):
        taken[kind] += duration
    total = end - start
    found = {kind: taken[kind] / total for kind in _ORDER}
    return found | {"idle": 1 - sum(found.values())}


def kind_of(name: str) -> str:
    """Return which kind of work a kernel does, by its name."""
    return next((kind for kind, pattern in _KINDS.items() if re.search(pattern, name, re.IGNORECASE)), "other")


def _kernels(events: list[Mapping[str, Any]]) -> Iterator[Kernel]:
    """Yield the device's kernels, or, where there is no such device, the operators that call no other."""
    on_device = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    if on_device:
        yield from (Kernel(e["name"], e["ts"], e["ts"] + e["dur"]) for e in on_device)
        return
    by_thread: dict[Any, list[Kernel]] = {}
    for event in events:
        if event.get("cat") == "cpu_op":
            kernel = Kernel(event["name"], event["ts"], event["ts"] + event["dur"])
            by_thread.setdefault(event["tid"], []).append(kernel)
    for kernels in by_thread.values():
        yield from _innermost(sorted(kernels, key=lambda kernel: (kernel.start_us, -kernel.end_us)))


def _innermost(operators: list[Kernel]) -> Iterator[Kernel]:
    """Yield one thread's time in pieces, each of the innermost operator that runs; outer operators come first."""
    running: list[Kernel] = []
    since = 0.0

    def leave(until: float) -> Iterator[Kernel]:
        nonlocal since
        while running and running[-1].end_us <= until:
            over = running.pop()
            yield Kernel(over.name, since, over.end_us)
            since = over.end_us

    for operator in operators:
        yield from leave(operator.start_us)
        if running:
            yield Kernel(running[-1].name, since, operator.start_us)
        running.append(operator)
        since = operator.start_us
    yield from leave(float("inf"))


def _exclusive(kernels: list[Kernel], start: float, end: float) -> Iterator[tuple[str, float]]:
    """Yield (kind, duration) of every stretch between `start` and `end` in which something runs."""
    changes: list[tuple[float, int, str]] = []
    for kernel in kernels:
        begun, over = max(kernel.start_us, start), min(kernel.end_us, end)
        if begun < over:
            kind = kind_of(kernel.name)
            changes += [(begun, 1, kind), (over, -1, kind)]
    changes.sort()
    running: Counter[str] = Counter()
    since = start
    for moment, change, kind in changes:
        first = next((kind for kind in _ORDER if running[kind]), None)
        if first is not None and moment > since:
            yield first, moment - since
        since = moment
        running[kind] += change


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
