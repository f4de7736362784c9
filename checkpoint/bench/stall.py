"""What saving costs a training loop: the time it blocks, the time its steps lose, when the state is durable.

Claim: `save` and the fence keep a loop for milliseconds, a save in every step slows training by less than a tenth
where forward and backward outlast the copy, and the state is durable as soon as the disk allows.

Baselines: `torch.save`, with and without fsync; safetensors; `torch.distributed.checkpoint`, blocking, asynchronous by
thread and by process, and on a GPU with pinned shared memory that is staged asynchronously. All save the tensors of one
model that really trains (forward, backward, AdamW), in one process, by turns; next to each turn stands one without a
saver. This package and the bound take a turn after every two rivals: what they cost is less than turns of one machine
differ by, so that it takes more of them. A turn begins with nothing pending and gives:

- `blocked`: seconds that one save keeps the loop: in the call, and in the fence before the next update; `in the call`
  is the first part of it.
- `slowdown`: steps with a save before each, or before every Nth, over the same steps without.
- `held on GPU`: by how long a fence delays the stream, from events around it; the host does not wait for it.
- `durable`: from the call until the bytes are synced: `in loop`, while training goes on, and `idle`, while it does not.
- `extra memory`: the peak of the PSS of this process and its children (shared memory included, page cache not) over
  that of a turn without a saver. The saver's first turn gives it, and nothing else but `first save`, the time that its
  call takes, and `prepare`, in which this package gets its memory (and pins it for a GPU).

`raw` is the bound, and takes turns as a saver: as many bytes, by a thread, past the page cache where the file system
lets one, and one fsync.

Training computes with one thread, as ranks do where a host has several; `--threads` says otherwise. On the CPU it is
in fp32, 12 bytes a parameter; forward and backward last 1.5 times the raw write, so that the
disk can follow a save in every step. On a GPU parameters are bf16, masters and moments fp32, 14 bytes a parameter. No
disk follows that in every 0.2 s step: a GPU's turns with a save in every step show what is left when saves wait for
each other. There each saver has one round, of two sparse turns and one of those, as far as `--budget-s` goes, and
leaves its memory and its disk space to the next one.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from checkpoint.bench import Bound, Gate, Report, arguments
from checkpoint.bench.loop.memory import PeakMemory
from checkpoint.bench.loop.savers import SAVERS, Durable, Saver, WithCheckpoint
from checkpoint.bench.loop.training import Training

_OURS, _RAW = "checkpoint", "raw"
_DEFAULT_SAVERS = {
    "cpu": "raw,checkpoint,torch,torch+fsync,safetensors,dcp,dcp-thread,dcp-process",
    "cuda": "raw,checkpoint,dcp-pinned",
    "smoke": "raw,checkpoint,torch+fsync,dcp-thread",
}


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured."""

    device: str
    params: int
    width: int
    step_s: float | None
    """Length of forward and backward; None: 1.5 raw writes."""
    savers: tuple[str, ...]
    cadences: tuple[tuple[int, int], ...]
    """Turns as (steps, steps from one save to the next)."""
    repeats: int
    deadline_s: float
    """By perf_counter; no turn starts later."""

    @property
    def order(self) -> list[str]:
        """The turns of one round: those that the gates are about before every two of their rivals."""
        judged = [name for name in self.savers if name in (_RAW, _OURS)]
        rivals = [name for name in self.savers if name not in judged]
        if self.device == "cuda":  # each has its memory and its disk space once, and gives them back
            return [*judged, *rivals]
        pairs = [rivals[i : i + 2] for i in range(0, len(rivals), 2)] or [[]]
        return [name for pair in pairs for name in (*judged, *pair)]


@dataclass(frozen=True, slots=True)
class Turn:
    """What a turn of the loop took."""

    seconds: float
    blocked_s: float
    """All of its saves together."""
    in_calls_s: float
    """The part of it that is not the fence's."""
    first_call_s: float
    held_s: float
    """On the GPU."""
    called_s: Sequence[float]
    """When the saves began."""
    durable: Sequence[Durable]


def main() -> int:
    """Run the benchmark; return 1 if a checkpoint is not the state at its call."""
    plan, options = _arguments()
    torch.set_num_threads(options.threads)
    report = Report("checkpoint.stall", {"device": plan.device, "threads": torch.get_num_threads()})
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="stall-") as folder:
        wrong = Run(plan, report, Path(folder)).measure()
    judge(report, plan, wrong)
    report.show()
    if options.json:
        report.write(options.json)
    return int(wrong > 0)


class Run:
    """One run of the benchmark."""

    def __init__(self, plan: Plan, report: Report, folder: Path) -> None:
        self._plan = plan
        self._report = report
        self._folder = folder
        self._savers: dict[str, Saver] = {}
        self._training = Training(plan.device, plan.params, plan.width)
        self._state = self._training.state()
        self._wrong = 0

    def measure(self) -> int:
        """Let the savers take turns; return how many tensors were not saved as they were at the call."""
        plan = self._plan
        nbytes = sum(tensor.nbytes for tensor in self._state.values())
        # Several: the first writes of a disk that was idle can be half as long as those that follow.
        num_writes = 1 if self._training.is_on_gpu else 5
        first_raw_s = statistics.median(self._idle(self._saver(_RAW)) for _ in range(num_writes))
        if self._training.is_on_gpu:  # where time is scarce the first one counts
            self._report.add(_RAW, "durable, idle", "s", first_raw_s)
            self._end(_RAW)
        step_s = self._training.last(1.5 * first_raw_s if plan.step_s is None else plan.step_s)
        _say(f"{nbytes / 1e9:.3g} GB in {len(self._state)} tensors; forward and backward {step_s:.3g} s")
        self._report.parameters |= {
            "state_bytes": nbytes,
            "tensors": len(self._state),
            "repeats": plan.repeats,
            "forward_backward_s": step_s,
            "turns": [list(cadence) for cadence in plan.cadences],
        }
        failed: dict[str, str] = {}
        with contextlib.ExitStack() as stack:
            stack.callback(self._close)
            for repeat in range(plan.repeats):
                for name in plan.order:
                    if name not in failed and not (name == _RAW and self._training.is_on_gpu):
                        try:
                            self._measure_saver(name, repeat)
                            if self._training.is_on_gpu:
                                self._end(name)
                        except Exception as error:  # of a rival: told in the results
                            if name in (_OURS, _RAW):
                                raise
                            failed[name] = f"{type(error).__name__}: {error}"
                            _say(f"{name}: {failed[name]}")
        self._report.parameters["failed"] = failed
        return self._wrong

    def _measure_saver(self, name: str, repeat: int) -> None:
        report, is_first = self._report, name not in self._savers
        if is_first and not self._is_over(f"{name}, first save"):
            self._first(name)
        for num_steps, every in self._plan.cadences:
            what = "every step" if every == 1 else f"every {every} steps"
            if name not in self._savers or self._is_over(f"{name}, a save {what}, {repeat + 1}"):
                continue
            alone = self._turn(None, num_steps, every)
            turn = self._turn(self._savers[name], num_steps, every)
            self._tell(name, what, alone, turn)
        if name in (_OURS, _RAW) and not self._is_over(f"{name}, idle, {repeat + 1}"):
            report.add(name, "durable, idle", "s", self._idle(self._savers[name]))

    def _tell(self, name: str, what: str, alone: Turn, turn: Turn) -> None:
        report = self._report
        report.add(name, f"slowdown, {what}", "", turn.seconds / alone.seconds)
        num_saves = len(turn.called_s)
        report.add(name, f"blocked, {what}", "s", turn.blocked_s / num_saves)
        report.add(name, f"blocked in the call, {what}", "s", turn.in_calls_s / num_saves)
        if self._plan.device == "cuda":
            report.add(name, f"held on GPU, {what}", "s", turn.held_s / num_saves)
        times = [durable() for durable in turn.durable]
        # The loop ends before the last one does, unless it is the only one.
        pairs = list(zip(turn.called_s, times, strict=True))[: max(1, num_saves - 1)]
        for called_s, synced_s in pairs:
            if synced_s is not None:
                report.add(name, f"durable, in loop, {what}", "s", synced_s - called_s)
        per_save = f"{turn.blocked_s / num_saves * 1e3:.3g} ms blocked"
        _say(f"{name}, a save {what}: {per_save}, slowdown {turn.seconds / alone.seconds:.3f}")

    def _first(self, name: str) -> None:
        """Let a saver make its memory; see what it takes, and whether what it saves is the state at its call."""
        gc.collect()
        saver = self._saver(name)
        sampled = dict(list(self._state.items())[:: max(1, len(self._state) // 6)])
        with PeakMemory() as alone:
            self._turn(None, 1, 1)
        before = {key: tensor.detach().cpu().clone() for key, tensor in sampled.items()}
        with PeakMemory() as memory:
            if isinstance(saver, WithCheckpoint):
                begun_s = time.perf_counter()
                saver.prepare(self._state)
                self._report.add(name, "prepare", "s", time.perf_counter() - begun_s)
            turn = self._turn(saver, 1, 1)
            for durable in turn.durable:
                durable()
        self._report.add(name, "first save", "s", turn.first_call_s)
        self._report.add(name, "first save and its fence", "s", turn.blocked_s)
        extra_gb = max(0, memory.extra_bytes - alone.extra_bytes) / 1e9
        self._report.add(name, "extra memory", "GB", extra_gb)
        _say(f"{name}: {extra_gb:.3g} GB more memory; the first call took {turn.first_call_s:.3g} s")
        if isinstance(saver, WithCheckpoint):
            found = saver.read(list(before))
            self._wrong += sum(not torch.equal(found[key], tensor) for key, tensor in before.items())

    def _turn(self, saver: Saver | None, num_steps: int, every: int) -> Turn:
        """Train for some steps, with a save before every `every`-th."""
        training, events, called_s, durable = self._training, [], [], []
        in_calls_s = in_fences_s = first_call_s = 0.0
        training.synchronize()
        begun_s = time.perf_counter()
        for i in range(num_steps):
            if saver and i % every == 0:
                called_s.append(time.perf_counter())
                durable.append(saver.save(self._state))
                took_s = time.perf_counter() - called_s[-1]
                in_calls_s += took_s
                first_call_s = first_call_s or took_s
            training.forward_backward()
            if saver:
                events.append(_event(training))
                fenced_s = time.perf_counter()
                saver.fence()
                in_fences_s += time.perf_counter() - fenced_s
                events.append(_event(training))
            training.update()
        training.synchronize()
        seconds = time.perf_counter() - begun_s
        pairs = zip(events[::2], events[1::2], strict=True)
        held_s = sum(a.elapsed_time(b) / 1e3 for a, b in pairs if a is not None and b is not None)
        blocked_s = in_calls_s + in_fences_s
        return Turn(seconds, blocked_s, in_calls_s, first_call_s, held_s, called_s, durable)

    def _idle(self, saver: Saver) -> float:
        """Return how long a save takes to be durable while nothing else runs."""
        self._training.synchronize()
        begun_s = time.perf_counter()
        synced_s = saver.save(self._state)()
        assert synced_s is not None
        saver.fence()
        return synced_s - begun_s

    def _saver(self, name: str) -> Saver:
        if name not in self._savers:
            folder = self._folder / name
            folder.mkdir()
            self._savers[name] = SAVERS[name](folder)
        return self._savers[name]

    def _end(self, name: str) -> None:
        """Give back the memory and the disk space of a saver that has had its turns."""
        if name in self._savers:
            self._savers.pop(name).close()
        shutil.rmtree(self._folder / name, ignore_errors=True)
        gc.collect()

    def _close(self) -> None:
        for saver in self._savers.values():
            saver.close()

    def _is_over(self, what: str) -> bool:
        if time.perf_counter() < self._plan.deadline_s:
            return False
        _say(f"no time left for: {what}")
        return True


def judge(report: Report, plan: Plan, wrong: int) -> None:
    """Add the bound and the gates."""
    report.gates.append(Gate("tensors that differ from the state at the call", wrong, 0, wrong == 0))
    found = {(case, metric): values for (case, metric, _), values in report.samples.items()}
    raw_s = report.median(_RAW, "durable, idle")
    rate = report.parameters["state_bytes"] / raw_s / 1e9
    report.bounds.append(Bound("raw write", rate, "GB/s", "8 MiB pieces, direct where possible, one fsync"))
    if (_OURS, "durable, idle") in found:
        _gate(report, "durable over the raw write, idle", report.median(_OURS, "durable, idle") / raw_s, 1.15)
    if plan.device == "cpu":
        rivals = {name: v for (name, metric), v in found.items() if metric == "blocked, every step"}
        ours = statistics.median(rivals.pop(_OURS))
        rivals.pop(_RAW, None)
        if rivals:
            best = min(statistics.median(values) for values in rivals.values())
            _gate(report, "blocked over the best rival's", ours / best, 1 / 20)
        _gate(report, "slowdown, a save every step", report.median(_OURS, "slowdown, every step"), 1.10)
        return
    for (name, metric), values in found.items():
        if name == _OURS and metric.startswith("blocked, every ") and metric != "blocked, every step":
            _gate(report, f"{metric} (ms)", statistics.median(values) * 1e3, 20)
        if name == _OURS and metric.startswith("slowdown, every ") and metric != "slowdown, every step":
            _gate(report, metric, statistics.median(values), 1.05)
    if (_OURS, "extra memory") in found:
        arena = report.parameters["state_bytes"] / 1e9
        _gate(report, "extra memory over the arena", report.median(_OURS, "extra memory") / arena, 1.10)


def _gate(report: Report, name: str, value: float, limit: float) -> None:
    report.gates.append(Gate(name, value, limit, value <= limit))


def _event(training: Training) -> torch.cuda.Event | None:
    if not training.is_on_gpu:
        return None
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _arguments() -> tuple[Plan, argparse.Namespace]:
    parser = arguments(__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where training runs")
    parser.add_argument("--params", type=int, help="parameters (default: 125 million, on a GPU 1 billion)")
    parser.add_argument("--step-s", type=float, help="length of forward and backward (default: see above; GPU 0.2)")
    parser.add_argument("--threads", type=int, default=1, help="that training computes with (default: %(default)s)")
    parser.add_argument("--savers", help=f"by commas, of {','.join(SAVERS)}")
    parser.add_argument("--every", type=int, default=20, help="steps of a GPU's sparse turn (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="on the disk to be measured (default: the temporary folder)")
    parser.add_argument("--budget-s", type=float, help="start no turn after this long (default: on a GPU 95)")
    options = parser.parse_args()
    on_gpu = options.device == "cuda"
    names = tuple((options.savers or _DEFAULT_SAVERS["smoke" if options.smoke else options.device]).split(","))
    unknown = sorted(set(names) - set(SAVERS))
    if unknown or options.repeats < 1 or options.every < 1:
        parser.error(f"--savers: unknown {unknown}" if unknown else "--repeats, --every: at least 1")
    params = options.params or (1_000_000_000 if on_gpu else 125_000_000)
    budget_s = options.budget_s or (95.0 if on_gpu else float("inf"))
    plan = Plan(
        device=options.device,
        params=200_000 if options.smoke else params,
        width=128 if options.smoke else 4096 if on_gpu else 1024,
        step_s=0.0 if options.smoke else 0.2 if on_gpu and options.step_s is None else options.step_s,
        savers=names,
        cadences=((options.every, options.every),) * 2 + ((2, 1),) if on_gpu else ((3, 1),),
        repeats=1 if options.smoke or on_gpu else options.repeats,
        deadline_s=time.perf_counter() + budget_s,
    )
    return plan, options


if __name__ == "__main__":
    sys.exit(main())
