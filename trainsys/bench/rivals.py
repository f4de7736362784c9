"""What others make of the labelled benchmark's faults, each really run: a group's timeout, Ray alone, show_straggler.

    python -m trainsys.bench.rivals [--rivals …] [--jobs ddp,fsdp,pipeline] [--ranks 4] [--kinds …] [--seeds 6,7,…]
        [--minutes M] [--json FILE] [--smoke]

The jobs, faults and targets are those of `faulttol.bench.labelled`, whose figures stand beside these. Each sample is
a job of its own:

    group timeout    torch.distributed with a timeout of --timeout-s instead of 30 minutes, nothing beside it. What is
                     told is the first error of a rank that lives: timed out is a hang, a connection that was closed is
                     a crash, other words of the group are a desync. It names no rank, at most an address
    Ray alone        one actor a rank, watched by `ray.wait` for --patience-s: the first actor that fails is accused
    show_straggler   DeepSpeed's communication log over 60 steps whose gradients go through `deepspeed.comm`. It prints
                     milliseconds and judges nothing; here it accuses the rank that waits least, where the others wait
                     for more than a fifth of the time

NVIDIA's section score is not among them, since its package measures GPUs: `faulttol.bench.labelled` applies its rule to
our records.

The JSON is written after every trial, and holds what there is where a run is ended early. The whole takes an hour; the
results beside this file, one kind or two of every class, about five minutes:

    python -m trainsys.bench.rivals --jobs ddp --kinds clean,slow,freeze,hang,kill,raise,wrong_kind,skip --minutes 5
        --json trainsys/bench/results/rivals-cpu.json
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from multiprocessing import get_context
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from torch import nn

from faulttol.bench import Gate, Report, arguments
from faulttol.bench.labels.grid import ENDING, HELD_OUT_SEEDS, STANDING, Case, fault_of
from faulttol.bench.labels.jobs import JobSpec, serve
from faulttol.bench.labels.rivals import NOTHING, Said
from faulttol.bench.labels.trial import TrialError, running, settle
from faulttol.bench.parts.ranks import Rank, store_folder, together
from faulttol.history import Follower
from faulttol.inject import Fault, Injector, strikes
from launch import ray_cluster

_SPAN_S = 0.045
"""Of a step, about: what slow faults are measured by where nobody has measured the job's."""
_LOCAL_S = 0.035
"""... and of what a rank works in it by itself."""
_STEPS_BEFORE, _STEPS = 20, 60
_WAITING = 0.2
_OTHERS_S = 0.3
_START_S = 60.0
_POLL_S = 0.02
_STOPS = (*STANDING, *ENDING)
_SPEEDS = ("slow", "slow_jitter", "uneven", "imbalance")
Answer = tuple[Said, float]
"""What was said, and how many seconds after the fault."""


# ---- a group's timeout


def _group_timeout(case: Case, options: Any) -> Answer:
    with running(case.job, case.num_ranks, timeout_s=options.timeout_s) as job:
        if not settle(job):
            raise TrialError(f"{case.name}: the job does not settle")
        fault, _ = fault_of(case, _SPAN_S, _LOCAL_S)
        begun_s = time.monotonic()
        if fault is not None:
            job.order(fault)
            begun_s = _struck_s(job.spec.directory)
        while time.monotonic() < begun_s + options.timeout_s + 3.0:
            time.sleep(_POLL_S)
            if _told(job.spec.directory, job.ended):
                after_s = time.monotonic() - begun_s
                time.sleep(_OTHERS_S)  # whose error comes first is chance: the one that says most counts
                told = _told(job.spec.directory, job.ended)
                return (next(name for name in ("desync", "hang", "crash") if name in told), ""), after_s
    return NOTHING, 0.0


def _told(directory: Path, ranks: Iterable[int]) -> set[str]:
    logs = ((directory / f"log{rank}").read_text(errors="replace") for rank in ranks)
    return {name for log in logs if (name := told_class(log)) is not None}


def told_class(log: str) -> str | None:
    """Return what the last error in a rank's log says of the group; None where it is none of a process group."""
    line = next((line for line in reversed(log.splitlines()) if "Error" in line), "").lower()
    if not any(word in line for word in ("gloo", "connection", "timed out", "collective", "distbackend")):
        return None
    if "timed out" in line or "timeout" in line:
        return "hang"
    if "connection" in line or "broken pipe" in line:
        return "crash"
    return "desync"


# ---- Ray alone


class _RayRank:
    """What Ray makes an actor of."""

    def pid(self) -> int:
        return os.getpid()

    def train(self, rank: int, spec: Mapping[str, Any], address: str) -> None:
        orders = Client(address)
        assert isinstance(orders, Connection)
        serve(rank, JobSpec(**spec), orders)


def _ray_alone(case: Case, options: Any) -> Answer:
    import ray

    make: Any = ray.remote(num_cpus=0, max_restarts=0, max_concurrency=2)(_RayRank)
    directory = Path(tempfile.mkdtemp(prefix="rivals-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    actors = [make.remote() for _ in range(case.num_ranks)]
    pids = ray.get([actor.pid.remote() for actor in actors])
    try:
        with Listener(str(directory / "orders")) as listener, Follower(directory, range(case.num_ranks)) as follower:
            spec = JobSpec(name=case.job, num_ranks=case.num_ranks, directory=directory)
            fields = asdict(spec)
            works = [actor.train.remote(rank, fields, listener.address) for rank, actor in enumerate(actors)]
            orders = [listener.accept() for _ in actors]
            _await_steps(follower, case)
            fault, _ = fault_of(case, _SPAN_S, _LOCAL_S)
            begun_s = time.monotonic()
            if fault is not None:
                for line in orders:
                    line.send(fault)
                begun_s = _struck_s(directory)
            done, _ = ray.wait(works, timeout=max(0.0, begun_s + options.patience_s - time.monotonic()))
            after_s = time.monotonic() - begun_s
            return (("crash", f"rank {works.index(done[0])}"), after_s) if done else (NOTHING, 0.0)
    finally:
        for pid in pids:  # Ray takes 5 s to kill one that is stopped
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(directory, ignore_errors=True)


def _await_steps(follower: Follower, case: Case) -> None:
    until_s = time.monotonic() + _START_S
    while time.monotonic() < until_s:
        time.sleep(_POLL_S)
        records = follower.look().records
        if len(records) == case.num_ranks and all(
            record.marks and record.marks[-1].step >= _STEPS_BEFORE for record in records.values()
        ):
            return
    raise TrialError(f"{case.name}: the job has not trained in {_START_S:g} s")


def _struck_s(directory: Path) -> float:
    until_s = time.monotonic() + 10.0
    while time.monotonic() < until_s:
        if lines := strikes(directory / "strikes"):
            return lines[0].at_ns / 1e9
        time.sleep(_POLL_S)
    raise TrialError(f"{directory}: the fault did not strike")


# ---- DeepSpeed's show_straggler


def _show_straggler(case: Case, options: Any) -> Answer:
    fault, _ = fault_of(case, _SPAN_S, _LOCAL_S)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(store_folder())
        ranks = [stack.enter_context(Rank("cpu", index)) for index in range(case.num_ranks)]
        answers = together(ranks, _logged, folder, fault, timeout_s=2 * _START_S)
    waits = dict(enumerate(wait_s for wait_s, _ in answers))
    taken_s = max(taken for _, taken in answers)
    first = min(waits, key=lambda rank: waits[rank])
    others_s = median(wait for rank, wait in waits.items() if rank != first)
    is_slow = others_s - waits[first] > _WAITING * taken_s
    return (("slow", f"rank {first}") if is_slow else NOTHING), taken_s


def _logged(rank: int, num_ranks: int, folder: str, fault: Fault | None) -> tuple[float, float]:
    """Train with DeepSpeed's communication log; return this rank's straggler time and the whole, in seconds."""
    import torch.distributed as dist

    from trainsys.deepspeed_setup import import_deepspeed

    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", num_ranks)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks)
    logged = import_deepspeed("cpu").comm
    logged.init_distributed("gloo", verbose=False)
    logged.configure(enabled=True, prof_all=True, verbose=False)
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(3)))
    x = torch.ones(64, 256)
    injector = Injector([], rank=rank, record=Path(folder) / "strikes")
    begun_s = 0.0
    for step in range(_STEPS_BEFORE + _STEPS):
        if step == _STEPS_BEFORE:
            if fault is not None:
                injector.add(Fault(**(asdict(fault) | {"step": step})))
            logged.comm.comms_logger.comms_dict.clear()
            begun_s = time.monotonic()
        injector.at(step)
        torch.autograd.backward(model(x).square().mean())
        time.sleep(0.012)
        for parameter in model.parameters():
            logged.all_reduce(parameter.grad)
            parameter.grad = None
    taken_s = time.monotonic() - begun_s
    with contextlib.redirect_stdout(io.StringIO()):
        summary = logged.log_summary(show_straggler=True, return_dict=True)
    sizes = [size for kinds in summary["straggler_analysis"].values() for size in kinds.values()]
    dist.destroy_process_group()
    return sum(size["total_straggler_ms"] for size in sizes) / 1e3, taken_s


# ---- the measurement


_MAGNITUDE = 2.0
"""How many times longer steps are meant to become."""


def main(words: list[str]) -> int:
    """Run the rivals and report what they said."""
    parser = arguments(__doc__)
    every = list(dict.fromkeys(("clean", *_SPEEDS, *_STOPS)))
    parser.add_argument("--rivals", nargs="+", choices=_RIVALS, default=list(_RIVALS), help=", ".join(_RIVALS))
    parser.add_argument("--jobs", type=_words, default=["ddp", "fsdp", "pipeline"])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--kinds", type=_words, default=every, help=f"of {', '.join(every)} (default: all)")
    parser.add_argument("--seeds", type=lambda text: [int(word) for word in _words(text)], default=[HELD_OUT_SEEDS[0]])
    parser.add_argument("--minutes", type=float, default=1e6, help="make no new trial after so long")
    parser.add_argument("--timeout-s", type=float, default=2.0, help="of the groups (default: %(default)s)")
    parser.add_argument("--patience-s", type=float, default=5.0, help="for Ray (default: %(default)s)")
    options = parser.parse_args(words)
    if options.smoke:
        options.rivals, options.kinds, options.jobs = [_TIMEOUT], ["kill"], ["ddp"]
    context = get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed.fsdp", "faulttol.bench.labels.jobs"])
    every_case = itertools.product(options.seeds, options.jobs, options.kinds)
    grid = [Case(job, options.ranks, kind, _MAGNITUDE, seed) for seed, job, kind in every_case]
    report = Report("trainsys.rivals", {name: getattr(options, name) for name in ("ranks", "timeout_s", "patience_s")})
    report.parameters |= {"jobs": options.jobs, "kinds": options.kinds, "seeds": options.seeds}
    _ask(report, grid, options)
    code = report.finish(options)
    print(markdown(report))
    return code


def _ask(report: Report, grid: Sequence[Case], options: Any) -> None:
    """Make the trials, all rivals of a case after one another; after each, the report is of all so far."""
    told: dict[tuple[str, str], list[tuple[Case, Answer]]] = {}
    asked = [(case, rival) for case in grid for rival in options.rivals if _takes(rival, case)]
    begun_s = time.monotonic()
    with contextlib.ExitStack() as stack:
        if _RAY in options.rivals:
            stack.enter_context(ray_cluster.joined(""))
        for index, (case, rival) in enumerate(asked):
            after_s = time.monotonic() - begun_s
            if after_s > 60 * options.minutes:
                print(f"{len(asked) - index} of {len(asked)} trials are left out: --minutes are over", flush=True)
                break
            try:
                answer = _RIVALS[rival](case, options)
            except TrialError as error:
                print(f"{error}; left out", flush=True)
                continue
            told.setdefault((rival, case.truth), []).append((case, answer))
            said = f"{' '.join(answer[0])} after {answer[1]:.2f} s"
            print(f"{index + 1} of {len(asked)}, at {after_s:.0f} s: {rival}, {case.name}: {said}", flush=True)
            report.samples, report.gates = {}, []
            report.parameters["load average of the last 15 minutes"] = round(os.getloadavg()[2], 1)
            judge(report, told)
            if options.json:
                report.write(options.json)
    if not told:
        report.gates = [Gate("trials that were made", 0, 1, ok=False)]


def judge(report: Report, told: Mapping[tuple[str, str], Sequence[tuple[Case, Answer]]]) -> None:
    """Add what each rival said of each class."""
    for (rival, truth), answers in told.items():
        case = f"{rival}, {'benign' if truth == 'none' else truth}"
        report.add(case, "trials", "1", len(answers))
        if truth == "none":
            report.add(case, "alarms", "1", sum(said != NOTHING for _, (said, _) in answers))
            continue
        report.add(case, "recall", "1", fmean(said[0] == truth for _, (said, _) in answers))
        report.add(case, "something is wrong", "1", fmean(said != NOTHING for _, (said, _) in answers))
        culprits = [fault_of(one, _SPAN_S, _LOCAL_S)[1] for one, _ in answers]
        named = fmean(said[1] == who for (_, (said, _)), who in zip(answers, culprits, strict=True))
        report.add(case, "culprit", "1", named)
        if after := [after_s for _, (said, after_s) in answers if said != NOTHING]:
            report.add(case, "told after", "s", *after)
    made = sum(map(len, told.values()))
    report.gates.append(Gate("trials that were made", made, 1, ok=made > 0))


def markdown(report: Report) -> str:
    """Return what each rival said of each class as a table for a README."""
    found: dict[str, dict[str, list[float]]] = {}
    for (case, metric, _), values in report.samples.items():
        found.setdefault(case, {})[metric] = values
    lines = ["| rival, class | trials | class right | something said | culprit named | told after, s |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for case, figures in sorted(found.items()):
        (trials,) = figures["trials"]
        if "alarms" in figures:
            cells = ["", f"{figures['alarms'][0] / trials:.2g}", ""]
        else:
            cells = [f"{figures[name][0]:.2g}" for name in ("recall", "something is wrong", "culprit")]
        after = figures.get("told after")
        cells.append(f"{median(after):.2f} ({min(after):.2f} to {max(after):.2f})" if after else "")
        lines.append(f"| {case} | {trials:.0f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _takes(rival: str, case: Case) -> bool:
    """Whether a rival can be asked of a case: the log is of one kind of job, and no job under it is ended."""
    if rival == _LOG:
        return case.job == "ddp" and case.kind in ("clean", *_SPEEDS)
    return case.kind in ("clean", "slow", *_STOPS)


def _words(text: str) -> list[str]:
    return text.split(",")


_TIMEOUT, _RAY, _LOG = "group timeout", "Ray alone", "show_straggler"
_RIVALS: Mapping[str, Callable[[Case, Any], Answer]] = {
    _TIMEOUT: _group_timeout,
    _RAY: _ray_alone,
    _LOG: _show_straggler,
}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
