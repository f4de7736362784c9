"""Benchmarks of this package, `python -m parallel.bench.NAME`, and the form their results have.

A benchmark fills a `Report` and ends with `return report.finish(options)`:

    options = arguments(__doc__).parse_args()
    results = spawn(measure, 2, "gloo", options.repeats)   # [measure(rank, 2, repeats) for every rank]
    if results is None:                                    # another rank of a torchrun job than 0
        return 0
    report = Report("parallel.pipeline", {"ranks": 2})
    report.add("1f1b", "step", "s", 0.1)                   # once a sample
    report.gates.append(Gate("wrong gradients", 0, 0, ok=True))
    return report.finish(options)
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from parallel.ranks import Backend, RankError, device_of, spawn

__all__ = ["Backend", "Bound", "Gate", "RankError", "Report", "arguments", "commit", "device_of", "spawn"]


@dataclass(frozen=True, slots=True)
class Bound:
    """What the hardware allows, measured in the same run."""

    metric: str
    value: float
    unit: str
    how: str


@dataclass(frozen=True, slots=True)
class Gate:
    """A figure that this run was held to."""

    name: str
    value: float
    limit: float
    ok: bool
    is_speed: bool = False
    """A speed that is missed is reported; anything else that is missed fails the benchmark."""


@dataclass(slots=True)
class Report:
    """The results of one run of a benchmark."""

    name: str
    parameters: dict[str, Any]
    samples: dict[tuple[str, str, str], list[float]] = field(default_factory=dict)
    """By (case, metric, unit)."""
    bounds: list[Bound] = field(default_factory=list)
    gates: list[Gate] = field(default_factory=list)

    def add(self, case: str, metric: str, unit: str, *values: float) -> None:
        """Add samples."""
        self.samples.setdefault((case, metric, unit), []).extend(values)

    def median(self, case: str, metric: str) -> float:
        """Return the median of a case's samples."""
        (found,) = [v for (c, m, _), v in self.samples.items() if (c, m) == (case, metric)]
        return statistics.median(found)

    def document(self) -> dict[str, Any]:
        """Return the results in the form that all benchmarks share."""
        results = [
            {
                "case": case,
                "metric": metric,
                "unit": unit,
                "samples": values,
                "median": statistics.median(values),
                "min": min(values),
                "max": max(values),
            }
            for (case, metric, unit), values in self.samples.items()
        ]
        gates = [{"name": g.name, "value": g.value, "limit": g.limit, "ok": g.ok} for g in self.gates]
        return {
            "name": self.name,
            "commit": commit(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": {
                "cpus": len(os.sched_getaffinity(0)),
                "processor": _processor(),
                "system": f"{platform.system()} {platform.release()}",
                "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
                "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
            },
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "parameters": self.parameters,
            "results": results,
            "bounds": [asdict(bound) for bound in self.bounds],
            "gates": gates,
        }

    def show(self) -> None:
        """Print the results as a table."""
        rows: list[Sequence[str]] = [("CASE", "METRIC", "MEDIAN", "MIN", "MAX", "UNIT")]
        for (case, metric, unit), values in self.samples.items():
            figures = [f"{f(values):.4g}" for f in (statistics.median, min, max)]
            rows.append((case, metric, *figures, unit))
        rows += [("bound", b.metric, f"{b.value:.4g}", "", "", f"{b.unit} ({b.how})") for b in self.bounds]
        print(table(rows))
        for gate in self.gates:
            print(f"{'ok    ' if gate.ok else 'MISSED'} {gate.name}: {gate.value:.4g}, limit {gate.limit:.4g}")

    def write(self, path: Path) -> None:
        """Write the results as JSON."""
        path.write_text(json.dumps(self.document(), indent=1) + "\n")

    def finish(self, options: argparse.Namespace) -> int:
        """Print the table, write `--json`; return the exit code: 1 where a gate other than a speed is missed."""
        self.show()
        if options.json:
            self.write(options.json)
        return 1 if any(not gate.ok and not gate.is_speed for gate in self.gates) else 0


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of equally many cells as aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def arguments(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    return parser


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that every benchmark has."""
    parser.add_argument("--repeats", type=int, default=5, help="samples of every case (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results there")
    parser.add_argument("--smoke", action="store_true", help="run the smallest form: that it works, no figures")


def commit() -> str:
    """Return the commit of the checkout, or `unknown`."""
    done = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
