"""One training iteration with the optimizer's state off the device: ours against DeepSpeed's, FSDP2's and no offload.

Claim: at few tokens a step, where the optimizer weighs most, an iteration takes at most 1/2.5 of DeepSpeed ZeRO-2 CPU
offload's without clipping and 1/1.9 with; at 32,768 tokens at most 1.10 of the resident iteration, at 65,536 at most
1.05; within 2 GiB of DeepSpeed's device memory; and the performance model predicts it within 15 %.

Engines alternate in one process, a block of iterations each, for every number of tokens; an iteration is the time
between the ends of two backwards on the device, with nothing that stops the host in between. `forward` and `backward`
are parts of it on the device, with what they wait for; `rest` is what remains. `memory` is the most that was
allocated on the device, without what the engines beside it hold.

Without a GPU the device is the CPU, and `--link 0.1 --modes sync,defer,stream` emulates a link of 0.1 GB/s: `hidden` is
then the share of what the host waits in `sync` that it does not wait in another mode.

Before anything is timed, kernels on both sides are compared to the bit, and so are parameters after steps of a small
model under every mode and several schedules.

Groups run in processes of their own, each with a limit on its time: `main` (ours, DeepSpeed ZeRO-2, resident), `spec`
(ours, which needs twice the states), `zero3`, `superoffload`, `fsdp` (one rival each, beside ours).
"""

from __future__ import annotations

import faulthandler
import gc
import itertools
import json
import subprocess
import sys
import threading
import time
from argparse import BooleanOptionalAction, Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from offload.bench import Bound, Gate, Report, arguments
from offload.bench.cases import engines
from offload.bench.cases.checks import differences, too_large
from offload.bench.cases.engines import Engine
from offload.bench.cases.judge import judge
from offload.bench.cases.transformer import Shape
from offload.kernels import KernelName
from offload.machine import default_threads
from offload.optimizer import Tiering
from offload.schedule import Budget, Mode, predict

GROUPS = ("main", "spec", "zero3", "superoffload", "fsdp")
CLIP = 1.0
_TAG = "RESULT "


def main() -> int:
    """Run the groups, or one of them as a child; 1 if a result is wrong."""
    options = _options()
    if options.child:
        faulthandler.dump_traceback_later(options.case_limit_s, exit=True)
        for line in _measure(options.child, options):
            print(_TAG + json.dumps(line), flush=True)
            faulthandler.dump_traceback_later(options.case_limit_s, exit=True)
        faulthandler.cancel_dump_traceback_later()
        return 0
    report = Report("offload.iteration", _parameters(options))
    for group in options.groups:
        for line in _run_child(group, options):
            _add(report, line)
    if not report.samples:
        print("no group gave a result")
        return 1
    judge(report, options.tokens)
    return report.finish(options)


def _options() -> Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--tokens", default="8192,32768,65536", help="tokens a step, N,N,… (default: %(default)s)")
    parser.add_argument("--groups", default="main", help=f"of {','.join(GROUPS)} (default: %(default)s)")
    parser.add_argument("--limit-s", type=float, default=285, help="time that a group may take (default: %(default)s)")
    parser.add_argument("--case-limit-s", type=float, default=150, help="between two results (default: %(default)s)")
    for name, default in (("layers", 24), ("width", 2560), ("heads", 20), ("vocabulary", 32768), ("sequence", 2048)):
        parser.add_argument(f"--{name}", type=int, default=default, help="(default: %(default)s)")
    parser.add_argument("--modes", default="", help="of ours: defer,stream,sync; with +clip for clipping")
    parser.add_argument("--interleave", default="auto", help="auto, cpu or a number (default: %(default)s)")
    parser.add_argument("--subgroup", type=int, default=1 << 24, help="parameters of a subgroup (default: %(default)s)")
    parser.add_argument("--device-mib", type=int, default=1900, help="device memory for states (default: %(default)s)")
    parser.add_argument("--slots", type=int, default=3, help="subgroups in the device at once (default: %(default)s)")
    parser.add_argument("--prefetch", action=BooleanOptionalAction, help="of ours: states to the device under backward")
    parser.add_argument("--link", type=float, metavar="GB/S", help="without a GPU: emulate a link of this rate")
    parser.add_argument("--threads", type=int, default=default_threads(), help="of the CPU's updates")
    parser.add_argument("--kernel", choices=("native", "torch"), default="native")
    parser.add_argument("--prepare", action="store_true", help="only build DeepSpeed's CPU optimizer and our kernels")
    parser.add_argument("--child", choices=(*GROUPS, "prepare"), help="(internal) the group that this process runs")
    options = parser.parse_args()
    options.arguments = [word for word in sys.argv[1:] if not word.startswith("--json")]
    if options.smoke:
        options.layers, options.width, options.heads, options.vocabulary, options.sequence = 2, 32, 2, 64, 16
        options.tokens, options.repeats, options.subgroup, options.device_mib = "32", 1, 4096, 1
        options.threads, options.interleave = 1, "2"
    options.tokens = [int(word) for word in str(options.tokens).split(",")]
    options.groups = ["prepare"] if options.prepare else options.groups.split(",")
    if options.link and torch.cuda.is_available():
        parser.error("--link: it emulates what this machine has; only without a GPU")
    shape = Shape(options.layers, options.width, options.heads, options.vocabulary)
    if not torch.cuda.is_available() and (problem := too_large(shape)):
        parser.error(f"--layers, --width: {problem}; give smaller ones, or --smoke")
    unknown = [group for group in options.groups if group not in (*GROUPS, "prepare")]
    if unknown:
        parser.error(f"--groups: {', '.join(unknown)}; allowed: {', '.join(GROUPS)}")
    if options.interleave not in ("auto", "cpu"):
        options.interleave = int(options.interleave)
    return options


def _parameters(options: Namespace) -> dict[str, Any]:
    names = ("tokens", "groups", "layers", "width", "heads", "vocabulary", "sequence", "modes", "interleave")
    found = {
        name: getattr(options, name)
        for name in (*names, "subgroup", "device_mib", "threads", "kernel", "link", "prefetch")
    }
    return {**found, "repeats": options.repeats, "clip": CLIP}


def _run_child(group: str, options: Namespace) -> Iterator[dict[str, Any]]:
    """Run a group in a process of its own; yield its results as they come."""
    command = [sys.executable, "-m", "offload.bench.iteration", "--child", group, *_passed_on(options.arguments)]
    start_s = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    watch = threading.Timer(options.limit_s, child.kill)
    watch.start()
    try:
        for line in child.stdout:
            if line.startswith(_TAG):
                found = json.loads(line.removeprefix(_TAG))
                print(f"[{time.perf_counter() - start_s:6.1f} s] {group}: {_shown(found)}", flush=True)
                yield found
            else:
                print(line, end="", flush=True)
        code = child.wait(timeout=60)
    finally:
        watch.cancel()
        child.kill()
    if code:
        print(f"{group} ended with code {code}: what it gave before counts", flush=True)


def _passed_on(words: list[str]) -> list[str]:
    found: list[str] = []
    skip = False
    for word in words:
        if skip or word == "--groups":
            skip = word == "--groups"
            continue
        found.append(word)
    return [word for word in found if not word.endswith(".json") and word != "--prepare"]


def _shown(found: dict[str, Any]) -> str:
    if "note" in found:
        return str(found["note"])
    values = found["values"]
    return f"{found['case']}: {found['metric']} {median(values):.4g} {found['unit']}"


def _add(report: Report, line: dict[str, Any]) -> None:
    if "note" in line:
        report.parameters.setdefault("notes", []).append(line["note"])
    elif line["metric"] == "bound":
        report.bounds.append(Bound(line["case"], line["values"][0], line["unit"], line["how"]))
    elif line["metric"] == "different":
        report.gates.append(Gate(line["case"], line["values"][0], 0, ok=line["values"][0] == 0))
    else:
        report.add(line["case"], line["metric"], line["unit"], *line["values"])


def _result(case: str, metric: str, unit: str, *values: float, how: str = "") -> dict[str, Any]:
    return {"case": case, "metric": metric, "unit": unit, "values": list(values), "how": how}


def _measure(group: str, options: Namespace) -> Iterator[dict[str, Any]]:
    """Yield the results of a group."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16
    if group == "prepare":
        yield from _prepare(device, options.kernel)
        return
    start_s = time.perf_counter()
    for name, count in differences(device, options.kernel):
        yield _result(f"{group}: {name}", "different", "", count)
    shape = Shape(options.layers, options.width, options.heads, options.vocabulary)
    yield {"note": f"checked in {time.perf_counter() - start_s:.1f} s"}
    mode: Mode = "spec" if group == "spec" else "defer"
    found = [_built(lambda: engines.tiered(shape, device, dtype, mode, _tiering(options)), device)]
    ours = found[0]
    yield from _about(ours, time.perf_counter() - start_s)
    makers: list[Callable[[], Engine]] = []
    if group == "main":
        makers.append(lambda: engines.resident(shape, device, dtype))
    rival = {"main": "zero2"}.get(group, group)
    if rival == "fsdp":
        makers.append(lambda: engines.fsdp(shape, device, dtype))
    elif rival != "spec" and device.type == "cuda":
        makers.append(lambda: engines.deepspeed_engine(rival, shape, device, dtype, engines.ZERO[rival]))
    for make in makers:
        begin_s = time.perf_counter()
        found.append(_built(make, device))
        yield {"note": f"{found[-1].name} is ready after {time.perf_counter() - begin_s:.1f} s"}
    for tokens in options.tokens:
        yield from _at(tokens, found, options, device)
    for engine in found:
        engine.close()


def _prepare(device: torch.device, kernel: KernelName) -> Iterator[dict[str, Any]]:
    start_s = time.perf_counter()
    for name, count in differences(device, kernel):
        yield _result(f"prepare: {name}", "different", "", count)
    yield _result("prepare", "our kernels and checks", "s", time.perf_counter() - start_s)
    start_s = time.perf_counter()
    engines.build_deepspeed_ops()
    yield _result("prepare", "DeepSpeed's CPU optimizer", "s", time.perf_counter() - start_s)


def _tiering(options: Namespace) -> Tiering:
    return Tiering(
        accumulation_steps=1,
        subgroup_numel=options.subgroup,
        interleave=options.interleave,
        budget=Budget(device_bytes=options.device_mib << 20, num_slots=options.slots),
        kernel=options.kernel,
        num_threads=options.threads,
        prefetch=options.prefetch,
        link_bytes_per_s=options.link and options.link * 1e9,
    )


def _built(make: Callable[[], Engine], device: torch.device) -> Engine:
    before = _allocated(device)
    engine = make()
    gc.collect()
    engine.resting_bytes = _allocated(device) - before
    return engine


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0


def _about(ours: Engine, seconds: float) -> Iterator[dict[str, Any]]:
    machine = ours.optimizer.machine
    count = engines.parameters_of(ours.model)
    yield {"note": f"{count / 1e9:.4g}G parameters; {machine.plan.reason}; ready after {seconds:.1f} s"}
    rates = machine.rates
    if rates is not None:
        for name in ("cpu", "device", "cpu_beside", "stream_beside"):
            yield _result(name, "bound", "parameters/s", getattr(rates, name) or 0.0, how="calibration")
        for name in ("up", "down", "both"):
            yield _result(name, "bound", "B/s", getattr(rates, name), how="calibration, pinned copies of states")


@dataclass(frozen=True, slots=True)
class _Variant:
    """An engine in one of its settings."""

    name: str
    engine: Engine
    mode: Mode | None
    clips: bool


def _variants(found: list[Engine], options: Namespace) -> list[_Variant]:
    variants = []
    for engine in found:
        if not engine.name.startswith("tiered"):
            variants += [
                _Variant(engine.name + (" clip" if clips else ""), engine, None, clips) for clips in (True, False)
            ]
            continue
        default = (
            "spec+clip"
            if engine.optimizer.mode == "spec"
            else "defer+clip,stream" + (",defer" if len(found) > 1 and found[1].name == "resident" else "")
        )
        for word in (options.modes or default).split(","):
            mode, _, clip = word.partition("+")
            variants.append(_Variant(f"tiered {mode}" + (" clip" if clip else ""), engine, mode, bool(clip)))  # type: ignore[arg-type]
    return variants


def _at(tokens: int, found: list[Engine], options: Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    """Yield the results for one number of tokens a step."""
    sequences = max(1, tokens // options.sequence)
    batch = torch.randint(options.vocabulary, (sequences, options.sequence), device=device)
    phases: tuple[float, float] | None = None
    waits: dict[str, float] = {}
    variants = _variants(found, options)
    repeats, warmup = options.repeats, 2
    if tokens != options.tokens[0]:  # long iterations: those that the gates look at, fewer of each
        variants = [v for v in variants if v.clips or v.mode == "stream"]
        repeats, warmup = min(3, repeats), 1
    # Without offload first: the model needs its forward and backward.
    variants.sort(key=lambda variant: variant.engine.name != "resident")
    for variant in variants:
        engine = variant.engine
        if variant.mode is not None:
            engine.optimizer.switch(variant.mode, CLIP if variant.clips else None)
        else:
            engine.clip(CLIP if variant.clips else None)
        label = f"{variant.name} {tokens}"
        before = _allocated(device)
        samples, peak, loss = _block(engine, batch, (warmup, repeats), device)
        engine.resting_bytes += _allocated(device) - before  # what it made at its first step, such as buckets
        for name, values in samples.items():
            yield _result(label, name, "s", *values)
        yield _result(label, "memory", "GB", (peak - sum(e.resting_bytes for e in found if e is not engine)) / 1e9)
        yield _result(label, "loss", "", loss)
        if variant.mode is not None and "host waits" in samples:
            waits[variant.name] = median(samples["host waits"])
        if engine.name == "resident":
            phases = median(samples["forward"]), median(samples["backward"])
        if variant.mode is not None and phases is not None and engine.optimizer.machine.rates is not None:
            machine = engine.optimizer.machine
            counts = [group.count for group in machine.subgroups]
            told = predict(
                counts,
                machine.plan.paths,
                machine.rates,
                forward_s=phases[0],
                backward_s=phases[1],
                mode=variant.mode,
                prefetched=machine.prefetched,
            )
            yield _result(label, "predicted", "s", told.step_s)
            if machine.room is not None:
                early = sum(counts[index] for index in machine.prefetched)
                yield _result(label, "came early", "parameters", early)
    for name, wait_s in waits.items():
        if waits.get("tiered sync"):
            hidden = 1 - wait_s / waits["tiered sync"]
            link = f" (emulated link of {options.link} GB/s)" if options.link else ""
            yield _result(f"{name} {tokens}{link}", "hidden", "of what sync waits", hidden)


def _block(
    engine: Engine, batch: torch.Tensor, counts: tuple[int, int], device: torch.device
) -> tuple[dict[str, list[float]], int, float]:
    """Run a block of iterations, some to warm up; return their times, the device's peak memory, and the last loss."""
    warmup, repeats = counts
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    marks: list[list[Any]] = []
    stalls: list[float] = []
    loss = torch.zeros(())
    for _ in range(warmup + repeats + 1):
        row = [_mark(device)]
        loss = engine.forward(batch)
        row.append(_mark(device))
        engine.backward(loss)
        row.append(_mark(device))
        engine.step()
        marks.append(row)
        stalls.append(getattr(engine.optimizer, "stall_s", 0.0))
    last = float(loss.detach())
    engine.wait()
    if device.type == "cuda":
        torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    samples: dict[str, list[float]] = {"iteration": [], "forward": [], "backward": [], "rest": []}
    for before, row in list(itertools.pairwise(marks))[warmup:]:
        whole, forward, backward = _apart(before[2], row[2]), _apart(row[0], row[1]), _apart(row[1], row[2])
        samples["iteration"].append(whole)
        samples["forward"].append(forward)
        samples["backward"].append(backward)
        samples["rest"].append(max(0.0, whole - forward - backward))
    if any(stalls):
        samples["host waits"] = [b - a for a, b in itertools.pairwise(stalls)][warmup:]
    return samples, peak, last


def _mark(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def _apart(first: Any, second: Any) -> float:
    """Return the seconds between two marks."""
    if isinstance(first, float):
        return float(second - first)
    return float(first.elapsed_time(second)) / 1e3


if __name__ == "__main__":
    sys.exit(main())
