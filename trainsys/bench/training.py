"""A whole run must be as fast as its device: time of a step, tokens/s, MFU, and how long a checkpoint holds it up.

    python -m trainsys.bench.training [--repeats N] [--json FILE] [--smoke] [RECIPE… --key=value…]

starts `trainsys launch RECIPE… --key=value…` N times, by default `tiny --launch.kind=local --parallel.replicate=1`, and
reads what the runs recorded. The first steps of a run (a tenth, at least two) warm it up and are not counted. A rank
reports tokens/s as its step's targets over `time/step_s`, the time without data, saving and evaluation; MFU is
tokens/s x operations per token over the peak of all ranks' devices (`metrics.peak_flops_per_s`: the data sheet's, or a
matrix product measured at the start on a CPU).

Baseline and bound: tokens/s if every device computed at that peak. Gate: every run's loss falls.
`results/training-*.json` were written by it on machines with one and two H200s; each holds its settings.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from trainsys import metrics, recipe

_DEFAULT = ("tiny", "--launch.kind=local", "--parallel.replicate=1")
_SMOKE = (
    *_DEFAULT,
    *("--steps=6", "--engine.device=cpu", "--engine.precision=fp32", "--schedule.warmup_steps=1"),
    *("--model.num_layers=1", "--model.dim=32", "--model.num_heads=2", "--model.num_kv_heads=1", "--model.ffn_dim=64"),
    *("--data.sequence_length=32", "--checkpoint.every=3", "--evaluation.sequences=0", "--evaluation.sample_tokens=0"),
)
_STEP_METRICS = {
    "time/step_s": "s",
    "time/forward_s": "s",
    "time/backward_s": "s",
    "time/update_s": "s",
    "time/data_wait_s": "s",
    "memory/peak_bytes": "B",
    "checkpoint/blocked_s": "s",
}


def main(arguments: list[str]) -> int:
    """Run the benchmark and print its table; 1 where a correctness gate fails."""
    parser = argparse.ArgumentParser(prog="python -m trainsys.bench.training", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--repeats", type=int, default=1, help="runs (default 1: a run has many steps)")
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--smoke", action="store_true", help="six steps of a minute model: does it run?")
    chosen, given = parser.parse_known_args(arguments)
    with tempfile.TemporaryDirectory(prefix="bench-training-") as folder:
        chosen_settings = settings(given, Path(folder), smoke=chosen.smoke)
        num_runs = 1 if chosen.smoke else chosen.repeats
        runs = [train(chosen_settings, Path(folder, f"run{index}")) for index in range(num_runs)]
        document = describe(chosen_settings, runs)
    finish(document, chosen.json)
    return 0 if all(gate["ok"] for gate in document["gates"]) else 1


def settings(given: list[str], folder: Path, *, smoke: bool) -> list[str]:
    """Return what to launch: `given`, the default, or a minute run on text that is written to `folder`."""
    return [*_SMOKE, f"--data.path={text(folder)}"] if smoke else given or list(_DEFAULT)


def num_steps(launched: list[str]) -> int:
    """Return the steps of what is launched."""
    overrides = [setting for setting in launched if setting.startswith("--")]
    return recipe.load([setting for setting in launched if setting not in overrides], overrides).config.steps


def finish(document: dict[str, Any], path: Path | None) -> None:
    """Write a document where it was asked for, and print it."""
    if path:
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    _print(document)


def text(folder: Path) -> Path:
    """A folder of files that a byte model learns from at once."""
    corpus = folder / "corpus"
    corpus.mkdir()
    for index in range(40):
        lines = f"the quick brown fox jumps over {index} lazy dogs\n" * 10
        (corpus / f"{index}.txt").write_text(lines, encoding="utf-8")
    return corpus


def train(settings: list[str], run_dir: Path) -> Path:
    """Make one run in `run_dir`, its output on ours."""
    command = [sys.executable, "-m", "trainsys", "launch", *settings, f"--run_dir={run_dir}"]
    subprocess.run(command, check=True)
    return run_dir


def describe(settings: list[str], runs: list[Path], *, skip_last: int = 0) -> dict[str, Any]:
    """Everything the runs recorded, in the schema that all benchmarks share; without each run's last steps."""
    start = json.loads((runs[0] / "config.json").read_text(encoding="utf-8"))
    config = start["config"]
    samples: dict[tuple[str, str], list[float]] = {}
    gates, peaks = [], []
    for run in runs:
        records = metrics.read(run / "metrics.jsonl")
        for metric, unit, value in _samples(records, skip_last):
            samples.setdefault((metric, unit), []).append(value)
        losses = [record["train/loss"] for record in records if "train/loss" in record]
        gates.append({"name": "last loss below the first", "value": losses[-1], "limit": losses[0]})
        gates[-1]["ok"] = losses[-1] < losses[0]
        last = next(record for record in reversed(records) if record.get("speed/mfu"))
        peaks.append(last["speed/tokens_per_s"] / last["speed/mfu"])
    return {
        "name": "trainsys.training",
        "commit": start["commit"],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {
            "system": platform.platform(),
            "processor": platform.machine(),
            "cpus": os.cpu_count(),
            "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        },
        "versions": start["versions"],
        "parameters": {"command": ["trainsys", "launch", *settings], "runs": len(runs), "config": config},
        "results": [
            {"case": config["name"], "metric": metric, "unit": unit, "samples": taken}
            | {"median": statistics.median(taken), "min": min(taken), "max": max(taken)}
            for (metric, unit), taken in samples.items()
        ],
        "bounds": [
            {"metric": "tokens/s", "value": statistics.median(peaks), "unit": "tokens/s"}
            | {"how": "all ranks at the peak that the run printed, by the model's operations per token"}
        ],
        "gates": gates,
    }


def _samples(records: list[dict[str, Any]], skip_last: int) -> Iterator[tuple[str, str, float]]:
    """Yield (metric, unit, value) of every counted step and of every save."""
    steps = [record for record in records if "train/loss" in record]
    counted = [step["step"] for step in steps[max(2, len(steps) // 10) : len(steps) - skip_last]]
    tokens_before = {after["step"]: before["train/tokens"] for before, after in pairwise(steps)}
    peak_rate = next(r["speed/tokens_per_s"] / r["speed/mfu"] for r in reversed(steps) if r["speed/mfu"])
    for record in records:
        for metric, unit in _STEP_METRICS.items():
            if metric in record and (record["step"] in counted or metric.startswith("checkpoint")):
                yield metric, unit, record[metric]
        if "train/loss" in record and record["step"] in counted:
            rate = (record["train/tokens"] - tokens_before[record["step"]]) / record["time/step_s"]
            yield "tokens/s", "tokens/s", rate
            yield "MFU", "1", rate / peak_rate


def _print(document: dict[str, Any]) -> None:
    for row in document["results"]:
        numbers = "  ".join(f"{row[key]:16,.6g}" for key in ("median", "min", "max"))
        print(f"{row['case']:16s} {row['metric']:22s} {numbers} {row['unit']}")
    for bound in document["bounds"]:
        print(f"bound            {bound['metric']:22s} {bound['value']:16,.6g} {bound['unit']}")
    for gate in document["gates"]:
        print(f"{'ok' if gate['ok'] else 'FAILED':6s} {gate['name']}: {gate['value']:.4f} (limit {gate['limit']:.4f})")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
