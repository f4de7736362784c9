"""A run under faults must end where the undisturbed run ends, and spend its time on training.

    python -m trainsys.bench.soak [--minutes M] [--every-s S] [--seed N] [--steps N] [--budget-s B] [--folder DIR]
        [--json FILE] [--smoke] [RECIPE… --key=value…]

The run that the results beside this file are of:

    python -m trainsys.bench.soak --minutes 15 --every-s 20 --json trainsys/bench/results/soak-tiny-cpu.json

trains a recipe (by default `tiny` on 3 local ranks and 1 spare) twice, for the same number of steps, chosen so that the
first run lasts about M minutes: with a fault of random kind in a random rank every S seconds, and once undisturbed, the
baseline. Kinds: SIGKILL, exit, abort, segmentation fault, SIGSTOP, a sleep and an endless loop outside of any
collective, the GIL held by native code, an exception. The first run recovers in its processes (`faulttol.mode = act`).

What there is so far is written to FILE after the first run, and when the budget is over, SIGINT or SIGTERM comes: what
was not compared then fails its gate. With `--folder` the runs are kept, and a second call makes what is missing.

    effective training time = 1 - sum over recoveries of (time between the two steps around it - usual time) / wall time

Steps done again, waiting for a spare, and detection all count as lost. `lost` is from the last step kept before to the
first after, less the usual time; it is the sum of, by recovery:

    done again  from that last step until the strike: work that is not kept
    detection   from the strike until the launcher had noticed
    recovery    from there until all ranks had their new places: leaving collectives, waiting for a spare
    restore     from there until the first step was done, less the usual time: groups, engine, checkpoint, data

Beside them stands `slower steps`: all other steps' time above the usual, as while a new spare starts on the same cores.
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
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from faulttol.inject import Fault, fired, strikes
from launch import signals
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
_SMOKE_STEPS, _PROBE_STEPS, _FEWEST_STEPS = 40, 12, 3
_POLL_S, _STOP_S = 0.05, 60.0


def main(arguments: list[str]) -> int:
    """Run the benchmark and print its table; 1 where a correctness gate fails."""
    parser = argparse.ArgumentParser(prog="python -m trainsys.bench.soak", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--minutes", type=float, default=15.0, help="about how long the disturbed run lasts")
    parser.add_argument("--every-s", type=float, default=20.0, help="seconds between two faults")
    parser.add_argument("--seed", type=int, default=0, help="of the faults")
    parser.add_argument("--steps", type=int, help="of both runs, instead of as many as fit --minutes")
    parser.add_argument("--budget-s", type=float, default=1e9, help="stop, and say what there is, after so long")
    parser.add_argument("--folder", type=Path, help="keep the runs there; one that is complete is not repeated")
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--smoke", action="store_true", help="one fault in a minute run: does it work?")
    chosen, given = parser.parse_known_args(arguments)
    until_s = time.monotonic() + chosen.budget_s
    with tempfile.TemporaryDirectory(prefix="bench-soak-") as name, signals.caught(_interrupt):
        folder = chosen.folder or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        if chosen.smoke:
            settings = [*_SMOKE, f"--data.path={training.text(folder)}", f"--steps={_SMOKE_STEPS}"]
            faults = [Fault(kind="kill", rank=0, step=20)]
        else:
            settings, faults = [*(given or _DEFAULT)], None
            settings.append(f"--steps={chosen.steps or _num_steps(settings, folder, chosen.minutes)}")
        calm, rough = folder / "calm", folder / "rough"
        disturbed = [*settings, *_RECOVERING]
        chance = random.Random(chosen.seed)
        try:
            if not _is_complete(rough):
                shutil.rmtree(rough, ignore_errors=True)
                _run(disturbed, rough, until_s, _Striker(RunFolder(rough), faults, chosen.every_s, chance))
            if chosen.json:
                _write(_describe(disturbed, calm, rough), chosen)
            if not _is_complete(calm):
                _run([*settings, *(["--resume"] if RunFolder(calm).exists() else [])], calm, until_s)
        except _Interrupted as why:
            print(f"ended early ({why}): what there is follows", flush=True)
            if len(_times(rough)) < _FEWEST_STEPS:
                raise SystemExit(f"the disturbed run has not made {_FEWEST_STEPS} steps") from why
        document = _write(_describe(disturbed, calm, rough), chosen)
    training.finish(document, chosen.json)
    return 0 if all(gate["ok"] for gate in document["gates"]) else 1


class _Interrupted(Exception):
    """The budget is over, or a signal asked for the end."""


def _interrupt(number: int) -> None:
    raise _Interrupted(signal.Signals(number).name)


def _num_steps(settings: Sequence[str], folder: Path, minutes: float) -> int:
    """Return the steps of runs already begun in `folder`, or as many as fit the time."""
    for run in (RunFolder(folder / "rough"), RunFolder(folder / "calm")):
        if run.exists():
            return int(run.record()["config"]["steps"])
    shutil.rmtree(folder / "probe", ignore_errors=True)
    probe = training.train([*settings, f"--steps={_PROBE_STEPS}"], folder / "probe")
    return max(20, round(0.75 * 60 * minutes / _usual_s(_times(probe))))


def _is_complete(run: Path) -> bool:
    return (run / "model" / "model.safetensors").exists()


def _write(document: dict[str, Any], chosen: argparse.Namespace) -> dict[str, Any]:
    document["parameters"] |= {"every_s": chosen.every_s, "seed": chosen.seed, "minutes": chosen.minutes}
    if chosen.json:
        chosen.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return document


def _run(settings: Sequence[str], run_dir: Path, until_s: float, meanwhile: Callable[[], None] = lambda: None) -> None:
    """Make a run, calling `meanwhile` often while it goes on. Raises: _Interrupted; the run is resumable then."""
    command = [sys.executable, "-m", "trainsys", "launch", *settings, f"--run_dir={run_dir}"]
    # In a session of its own: a Ctrl-C is ours alone, and comes to it as one wish to stop.
    process = subprocess.Popen(command, start_new_session=True)
    try:
        while process.poll() is None:
            time.sleep(_POLL_S)
            meanwhile()
            if time.monotonic() > until_s:
                raise _Interrupted("--budget-s is over")
    except _Interrupted:
        process.terminate()
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            print(f"{run_dir}: the run did not stop in {_STOP_S:g} s, and is killed", flush=True)
        raise
    finally:
        process.kill()
        process.wait()
    if process.returncode:
        raise SystemExit(f"{run_dir}: the run ended with exit code {process.returncode}")


class _Striker:
    """Orders faults for a run while it goes on, or all that are given before its first step."""

    def __init__(
        self, folder: RunFolder, faults: Sequence[Fault] | None, every_s: float, chance: random.Random
    ) -> None:
        self._folder, self._faults, self._every_s, self._chance = folder, faults, every_s, chance
        self._begun_s = self._next_s = 0.0
        self._num = 0

    def __call__(self) -> None:
        if not self._folder.metrics.exists():
            return
        now_s = time.monotonic()
        if not self._next_s:
            self._begun_s, self._next_s = now_s, now_s + self._every_s
            for fault in self._faults or ():
                drill.order(self._folder, fault)
        if self._faults is None and now_s >= self._next_s:
            self._next_s += self._every_s
            self._num += 1
            step = _step(self._folder)
            # Two steps may have begun since that was recorded: one then, another while all records were read.
            fault = Fault(kind=self._chance.choice(_KINDS), rank=self._chance.randrange(3), step=step + 3)
            drill.order(self._folder, fault)
            where = f"rank {fault.rank}, step {fault.step}"
            print(f"[soak] {now_s - self._begun_s:.0f} s: fault {self._num}: {fault.kind} in {where}", flush=True)


def _step(folder: RunFolder) -> int:
    """Return the last step that is recorded."""
    return max((record["step"] for record in metrics.read(folder.metrics)), default=0)


def _records(run: Path) -> list[dict[str, Any]]:
    """Return what each step recorded; nothing of a run that has not begun."""
    path = run / "metrics.jsonl"
    return [record for record in metrics.read(path) if "train/loss" in record] if path.exists() else []


def _times(run: Path) -> dict[int, float]:
    """Return when each step was recorded."""
    return {record["step"]: record["time"] for record in _records(run)}


def _losses(run: Path) -> dict[int, float]:
    return {record["step"]: record["train/loss"] for record in _records(run)}


def _usual_s(times: Mapping[int, float]) -> float:
    return statistics.median(after - before for before, after in pairwise(times.values()))


def split(
    times: Mapping[int, float], recoveries: Sequence[tuple[float, float]], strikes_s: Sequence[float], usual_s: float
) -> dict[str, list[float]]:
    """Return where the time around recoveries went, by part; all parts of an interval add up to what it lost.

    `times`: when each step that is kept was done; `recoveries`: when each was noticed, and when all ranks had places.
    """
    parts: dict[str, list[float]] = {"lost": [], "done again": [], "detection": [], "recovery": [], "restore": []}
    for before, after in pairwise(times.values()):
        own = [recovery for recovery in recoveries if before < recovery[1] <= after]
        since_s, part = before, "done again"
        for noticed_s, placed_s in own:
            struck_s = max((one for one in strikes_s if since_s < one <= noticed_s), default=noticed_s)
            parts[part].append(struck_s - since_s)
            parts["detection"].append(noticed_s - struck_s)
            parts["recovery"].append(placed_s - noticed_s)
            since_s, part = placed_s, "restore"  # it was lost again before it got a step further
        if own:
            parts["restore"].append(after - since_s - usual_s)
            parts["lost"].append(after - before - usual_s)
    return parts


def _describe(settings: Sequence[str], calm: Path, rough: Path) -> dict[str, Any]:
    start = json.loads((rough / "config.json").read_text(encoding="utf-8"))
    record = rough / "events" / "recoveries.jsonl"
    recoveries = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    struck = fired(drill.record(RunFolder(rough)))
    schedule = rough / "drill.jsonl"
    ordered = schedule.read_text().splitlines() if schedule.exists() else []
    times = _times(rough)
    usual_s, total_s = _usual_s(times), max(times.values()) - min(times.values())
    to_wall_s = time.time() - time.monotonic()  # the ranks run on this machine
    strikes_s = [one.at_ns / 1e9 + to_wall_s for one in strikes(drill.record(RunFolder(rough))) if not one.is_over]
    noticed = [(one["time"] - one["after_s"]["rejoined"], one["time"]) for one in recoveries]
    parts = split(times, noticed, strikes_s, usual_s)
    lost_s = sum(parts["lost"])
    samples: dict[tuple[str, str], list[float]] = {
        ("effective training time", "1"): [1 - lost_s / total_s],
        ("time from the first step to the last", "s"): [total_s],
        ("usual step", "s"): [usual_s],
        ("faults", "1"): [len(struck)],
        **{(part, "s"): taken for part, taken in parts.items()},
        **{(f"share of the time: {part}", "1"): [sum(taken) / total_s] for part, taken in parts.items()},
        ("share of the time: slower steps", "1"): [(total_s - lost_s - usual_s * (len(times) - 1)) / total_s],
    }
    for kind in sorted({fault.kind for fault in struck}):
        samples[f"faults of kind {kind}", "1"] = [sum(fault.kind == kind for fault in struck)]
    # What was ordered for a step behind the last one cannot strike.
    missed = [line for line in ordered if Fault(**json.loads(line)) not in struck]
    late = [line for line in missed if json.loads(line)["step"] > max(times)]
    gates = _gates(calm, rough, start["config"]["steps"])
    gates += [
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


def _gates(calm: Path, rough: Path, num_steps: int) -> list[dict[str, Any]]:
    """Return how the disturbed run is unlike the undisturbed one, as far as there are two."""
    expected, found = _losses(calm), _losses(rough)
    compared = expected.keys() & found.keys()
    different = [step for step in compared if expected[step] != found[step]]
    gates: list[dict[str, Any]] = [
        {"name": "steps whose loss was not compared", "value": num_steps - len(compared), "limit": 0},
        {"name": "steps whose loss differs from the undisturbed run's", "value": len(different), "limit": 0},
    ]
    if _is_complete(calm) and _is_complete(rough):
        models = [(run / "model" / "model.safetensors").read_bytes() for run in (calm, rough)]
        gates.append({"name": "models that differ at the end", "value": int(models[0] != models[1]), "limit": 0})
    return gates


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
