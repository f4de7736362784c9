"""Benchmarks of this package, `python -m checkpoint.bench.NAME`, and the form their results have."""

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


@dataclass(slots=True)
class Report:
    """The results of one run of a benchmark."""

    name: str
    parameters: dict[str, Any]
    samples: dict[tuple[str, str, str], list[float]] = field(default_factory=dict)
    """By (case, metric, unit)."""
    bounds: list[Bound] = field(default_factory=list)
    gates: list[Gate] = field(default_factory=list)

    def add(self, case: str, metric: str, unit: str, value: float) -> None:
        """Add one sample."""
        self.samples.setdefault((case, metric, unit), []).append(value)

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
        return {
            "name": self.name,
            "commit": _commit(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": {
                "cpus": len(os.sched_getaffinity(0)),
                "processor": _processor(),
                "system": f"{platform.system()} {platform.release()}",
                "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            },
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "parameters": self.parameters,
            "results": results,
            "bounds": [asdict(bound) for bound in self.bounds],
            "gates": [asdict(gate) for gate in self.gates],
        }

    def show(self) -> None:
        """Print the results as a table."""
        rows: list[Sequence[str]] = [("CASE", "METRIC", "MEDIAN", "MIN", "MAX", "UNIT")]
        for (case, metric, unit), values in self.samples.items():
            figures = [f"{f(values):.4g}" for f in (statistics.median, min, max)]
            rows.append((case, metric, *figures, unit))
        rows += [("bound", b.metric, f"{b.value:.4g}", "", "", f"{b.unit} ({b.how})") for b in self.bounds]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        for gate in self.gates:
            print(f"{'ok    ' if gate.ok else 'MISSED'} {gate.name}: {gate.value:.4g}, limit {gate.limit:.4g}")

    def write(self, path: Path) -> None:
        """Write the results as JSON."""
        path.write_text(json.dumps(self.document(), indent=1))


def arguments(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="samples of every case (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results there")
    parser.add_argument("--smoke", action="store_true", help="run the smallest form: that it works, no figures")
    return parser


def _commit() -> str:
    """Return the commit that is measured, and whether the tree had changes beside it."""
    head, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")
    if not head:
        return "unknown"
    return f"{head} and {len(changes.splitlines())} changed files" if changes else head


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
