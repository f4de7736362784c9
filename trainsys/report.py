"""A finished or running run in a few lines, from its folder alone."""

from __future__ import annotations

import statistics
from pathlib import Path

from trainsys import metrics
from trainsys.errors import RunError
from trainsys.folder import RunFolder


def summarise(run: Path) -> str:
    """Return loss, validation, speed and checkpoint cost of the run in `run`.

    Raises:
        RunError: the folder holds no run, or one that has not made a step.
    """
    folder = RunFolder(run)
    record = folder.record()
    if record["config"].get("rl", {}).get("tasks"):
        from trainsys.rl.report import summarise as summarise_rounds

        return summarise_rounds(run)
    if not folder.metrics.exists():
        raise RunError(f"{run}: has no metrics yet")
    records = metrics.read(folder.metrics)
    train = [entry for entry in records if "train/loss" in entry]
    if not train:
        raise RunError(f"{run}: has made no step yet")
    validation = [entry for entry in records if "validation/loss" in entry]
    saves = [entry["checkpoint/blocked_s"] for entry in records if "checkpoint/blocked_s" in entry]
    last = train[-1]
    steps = [entry["time/step_s"] for entry in train]
    rows = {
        "run": f"{run} ({record['run_id']}), started {len(record['starts'])} time(s), first {record['created']}",
        "progress": f"step {last['step']} of {record['config']['steps']}, {last['train/tokens']:,} tokens",
        "loss": f"{train[0]['train/loss']:.4f} at step {train[0]['step']}, now {last['train/loss']:.4f} nats/token",
        "validation": ", ".join(f"{entry['validation/loss']:.4f} at {entry['step']}" for entry in validation[-5:]),
        "speed": f"{last['speed/tokens_per_s']:,.0f} tokens/s, MFU {last['speed/mfu']:.1%}",
        "step time": f"median {statistics.median(steps):.3f} s, longest {max(steps):.3f} s",
        "memory peak": f"{max(entry['memory/peak_bytes'] for entry in train) / 2**30:.2f} GiB on rank 0",
        "checkpoints": f"{len(saves)} saves, median {statistics.median(saves):.3f} s blocked" if saves else "none",
    }
    return "\n".join(f"{name:<13}{text or 'none yet'}" for name, text in rows.items())
