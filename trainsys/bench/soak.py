"""A run under faults must end where the undisturbed run ends, and spend its time on training.

    python -m trainsys.bench.soak [--minutes M] [--every-s S] [--seed N] [--json FILE] [--smoke] [RECIPE… --key=value…]

The run that the results beside this file are of:

    python -m trainsys.bench.soak --minutes 15 --every-s 20 --json trainsys/bench/results/soak-tiny-cpu.json

trains a recipe (by default `tiny` on 3 local ranks and 1 spare) twice, for the same number of steps, chosen so that the
second run lasts about M minutes: once undisturbed, the baseline, and once with a fault of random kind in a random rank
every S seconds. Kinds: SIGKILL, exit, abort, segmentation fault, SIGSTOP, a sleep and an endless loop outside of any
collective, the GIL held by native code, an exception. The second run recovers in its processes (`faulttol.mode = act`).

    effective training time = 1 - sum over recoveries of (time between the two steps around it - usual time) / wall time

Steps done again, waiting for a spare, and detection all count as lost. `lost` is from the last step before to the first
after, less the usual time; where it went, by recovery, in seconds:

    detection   from the strike until the launcher had noticed
    recovery    from there until all ranks had their new places: leaving collectives, waiting for a spare
    restore     from there until the first step was done, less the usual time: groups, engine, checkpoint, data
    done again  steps that were done before and are not kept, at the usual time each

A collective counts as hanging after 5 s here, or ten times what such ones usually take; the default is a minute.

Bound: 1, no time lost. Gates: every loss and the model at the end equal the undisturbed run's to the bit; every fault
that was ordered struck, and was recovered from.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from faulttol.inject import Fault, Strike, fired, strikes
from trainsys import drill, metrics
from trainsys.bench import training
from trainsys.folder import RunFolder

_KINDS = ("kill", "exit", "abort", "segfault", "freeze", "hang", "spin", "gil", "raise")
_DEFAULT = (
    *("tiny", "--launch.kind=local", "--parallel.replicate=3", "--batch.global_sequences=12"),
    *("--evaluation.every=0", "--evaluation.sequences=0", "--evaluation.sample_tokens=0"),
)
_SMOKE = (
    *_DEFAULT,
    *("--engine.backend=torch", "--engine.zero_stage=0", "--engine.precision=fp32", "--optim.kind=adamw"),
    *("--model.num_layers=1", "--model.dim=32", "--model.num_heads=2", "--model.num_kv_heads=1", "--model.ffn_dim=64"),
    *("--data.sequence_length=32", "--schedule.warmup_steps=1", "--faulttol.heartbeat_interval_s=0.2"),
    *("--faulttol.health.stalled_after_s=2", "--faulttol.health.stuck_after_s=2"),
)
_RECOVERING = (
    *("--faulttol.mode=act", "--faulttol.drill=true", "--launch.spares=1", "--faulttol.detector.hang_after_s=5"),
    # Faults are the point here; and with fewer ranks sums are rounded otherwise.
    *("--faulttol.policy.restarts_per_hour=100000", "--faulttol.policy.no_progress_limit=20"),
    "--faulttol.policy.shrink=false",
)
_SMOKE_STEPS, _PROBE_STEPS = 40, 12
_POLL_S = 0.05


def main(arguments: list[str]) -> int:
    """Run the benchmark and print its table; 1 where a correctness gate fails."""
    parser = argparse.ArgumentParser(prog="python -m trainsys.bench.soak", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--minutes", type=float, default=15.0, help="about how long the disturbed run lasts")
    parser.add_argument("--every-s", type=float, default=20.0, help="seconds between two faults")
    parser.add_argument("--seed", type=int, default=0, help="of the faults")
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--smoke", action="store_true", help="one fault in a minute run: does it work?")
    chosen, given = parser.parse_known_args(arguments)
    with tempfile.TemporaryDirectory(prefix="bench-soak-") as name:
        folder = Path(name)
        if chosen.smoke:
            settings = [*_SMOKE, f"--data.path={training.text(folder)}", f"--steps={_SMOKE_STEPS}"]
            faults = [Fault(kind="kill", rank=0, step=20)]
        else:
            settings, faults = given or list(_DEFAULT), None
            probe = training.train([*settings, f"--steps={_PROBE_STEPS}"], folder / "probe")
            steps = max(20, round(0.75 * 60 * chosen.minutes / _usual_s(_times(probe))))
            settings = [*settings, f"--steps={steps}"]
        calm = training.train(settings, folder / "calm")
        rough = folder / "rough"
        chance = random.Random(chosen.seed)
        wall_s = _disturbed([*settings, *_RECOVERING], rough, faults, chosen.every_s, chance)
        document = _describe([*settings, *_RECOVERING], calm, rough, wall_s)
    document["parameters"] |= {"every_s": chosen.every_s, "seed": chosen.seed, "minutes": chosen.minutes}
    training.finish(document, chosen.json)
    return 0 if all(gate["ok"] for gate in document["gates"]) else 1


def _disturbed(
    settings: Sequence[str], run_dir: Path, faults: list[Fault] | None, every_s: float, chance: random.Random
) -> float:
    """Make a run and order faults for it while it goes on, or all `faults` before; return the seconds it took."""
    folder = RunFolder(run_dir)
    began_s = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "trainsys", "launch", *settings, f"--run_dir={run_dir}"])
    try:
        next_s = None
        while process.poll() is None:
            time.sleep(_POLL_S)
            if not folder.metrics.exists():
                continue
            for fault in faults or ():
                drill.order(folder, fault)
            if faults is not None:
                faults = []
                continue
            now_s = time.monotonic()
            next_s = now_s + every_s if next_s is None else next_s
            if now_s >= next_s:
                next_s += every_s
                drill.order(folder, Fault(kind=chance.choice(_KINDS), rank=chance.randrange(3), step=_step(folder) + 2))
    finally:
        process.kill()
        process.wait()
    if process.returncode:
        raise SystemExit(f"the disturbed run ended with exit code {process.returncode}")
    return time.monotonic() - began_s


def _step(folder: RunFolder) -> int:
    """Return the last step that is recorded."""
    return max((record["step"] for record in metrics.read(folder.metrics)), default=0)


def _times(run: Path) -> dict[int, float]:
    """Return when each step was recorded."""
    return {record["step"]: record["time"] for record in metrics.read(run / "metrics.jsonl") if "train/loss" in record}


def _losses(run: Path) -> dict[int, float]:
    records = metrics.read(run / "metrics.jsonl")
    return {record["step"]: record["train/loss"] for record in records if "train/loss" in record}


def _usual_s(times: Mapping[int, float]) -> float:
    return statistics.median(after - before for before, after in pairwise(times.values()))


def _parts(
    times: Mapping[int, float], recoveries: Sequence[Mapping[str, Any]], struck: Sequence[Strike], usual_s: float
) -> dict[str, list[float]]:
    """Return where the time of each recovery went, beside the recovery itself."""
    to_wall_s = time.time() - time.monotonic()  # the ranks run on this machine
    at_s = [strike.at_ns / 1e9 + to_wall_s for strike in struck if not strike.is_over]
    parts: dict[str, list[float]] = {"detection": [], "restore": [], "done again": []}
    for recovery in recoveries:
        noticed_s = recovery["time"] - recovery["after_s"]["rejoined"]
        cause_s = max((one for one in at_s if one <= noticed_s), default=None)
        if cause_s is not None:
            parts["detection"].append(noticed_s - cause_s)
        first = min((step for step, done_s in times.items() if done_s > recovery["time"]), default=None)
        if first is not None:  # of what was lost again before it got a step further, only the last is kept
            parts["restore"].append(max(0.0, times[first] - recovery["time"] - usual_s))
            parts["done again"].append(max(0, recovery["step"] - first) * usual_s)
    return parts


def _describe(settings: Sequence[str], calm: Path, rough: Path, wall_s: float) -> dict[str, Any]:
    start = json.loads((rough / "config.json").read_text(encoding="utf-8"))
    recoveries = [json.loads(line) for line in (rough / "events" / "recoveries.jsonl").read_text().splitlines()]
    struck = fired(drill.record(RunFolder(rough)))
    ordered = (rough / "drill.jsonl").read_text().splitlines()
    times, undisturbed = _times(rough), _times(calm)
    usual_s, total_s = _usual_s(times), max(times.values()) - min(times.values())
    lost = [
        max(0.0, after - before - usual_s)
        for before, after in pairwise(times.values())
        if any(before < recovery["time"] <= after for recovery in recoveries)
    ]
    parts = _parts(times, recoveries, strikes(drill.record(RunFolder(rough))), usual_s)
    calm_s = max(undisturbed.values()) - min(undisturbed.values())
    expected, found = _losses(calm), _losses(rough)
    different = [step for step in expected if expected[step] != found.get(step)]
    models = [(run / "model" / "model.safetensors").read_bytes() for run in (calm, rough)]
    # What was ordered for a step behind the last one cannot strike.
    missed = [line for line in ordered if Fault(**json.loads(line)) not in struck]
    late = [line for line in missed if json.loads(line)["step"] > max(times)]
    samples: dict[tuple[str, str], list[float]] = {
        ("effective training time", "1"): [1 - sum(lost) / total_s],
        ("undisturbed time / disturbed time", "1"): [calm_s / total_s],
        ("wall time of the disturbed run", "s"): [wall_s],
        ("usual step", "s"): [usual_s],
        ("faults", "1"): [len(struck)],
        ("recovery", "s"): [recovery["after_s"]["rejoined"] for recovery in recoveries],
        ("lost", "s"): lost,
        **{(part, "s"): taken for part, taken in parts.items()},
    }
    for kind in sorted({fault.kind for fault in struck}):
        samples[f"faults of kind {kind}", "1"] = [sum(fault.kind == kind for fault in struck)]
    gates: list[dict[str, Any]] = [
        {"name": "steps whose loss differs from the undisturbed run's", "value": len(different), "limit": 0},
        {"name": "models that differ at the end", "value": int(models[0] != models[1]), "limit": 0},
        {"name": "faults that were ordered and did not strike", "value": len(missed) - len(late), "limit": 0},
        {"name": "faults without a recovery", "value": max(0, len(struck) - len(recoveries)), "limit": 0},
    ]
    return {
        "name": "trainsys.soak",
        "commit": start["commit"],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"system": platform.platform(), "processor": platform.machine(), "cpus": os.cpu_count()},
        "versions": start["versions"],
        "parameters": {"command": ["trainsys", "launch", *settings], "steps": len(times), "kinds": list(_KINDS)},
        "results": [
            {"case": start["config"]["name"], "metric": metric, "unit": unit, "samples": taken}
            | {"median": statistics.median(taken), "min": min(taken), "max": max(taken)}
            for (metric, unit), taken in samples.items()
            if taken
        ],
        "bounds": [{"metric": "effective training time", "value": 1.0, "unit": "1", "how": "no time lost"}],
        "gates": [gate | {"ok": gate["value"] <= gate["limit"]} for gate in gates],
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
