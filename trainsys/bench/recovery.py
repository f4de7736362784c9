"""A lost rank is replaced by a warm spare, and training goes on, within 2 s, restored bytes aside.

    python -m trainsys.bench.recovery [--ranks N] [--repeats N] [--arms …] [--minutes M] [--json FILE] [--smoke]

A small DistributedDataParallel job trains under a supervisor; from outside, one of its ranks (each in turn) gets
SIGKILL or SIGSTOP. Timed, from the signal on:

    found          the supervisor knows
    formed         all ranks are in a new group and have finished a collective of it, counted from `found`
    first step     all ranks have finished a step, counted from `formed`, without restoring
    restoring      the slowest rank's reading of its state
    whole          from the signal to the first step, without restoring

Arms, alternating, each with a job of its own that is struck by both signals, the same ranks, steps and state:

    warm spare       `launch.run` with recovery and one spare
    restart of all   baseline: `launch.run` without; when it says that a rank failed, it is called again. It takes a
                     rank for frozen after --frozen-s, 30 s by default in use
    Ray alone        baseline: one actor a rank, started anew when Ray says that one failed, in a Ray that runs already.
                     Of a stopped process it hears nothing: `not found` counts those of which it had not in --patience-s

Bound: forming the group at the start, when all ranks are there.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import launch
from faulttol.bench import Bound, Gate, Report, arguments
from faulttol.config import HealthConfig, PolicyConfig
from launch import ray_cluster

LIMIT_S = 2.0
_WIDTH, _ROWS, _SAVE_STEPS = 256, 32, 5
_STEPS_BEFORE = 20
_START_S, _AGAIN_S = 120.0, 60.0
_POLL_S = 0.002
_Strike = tuple[int, str]
"""Rank, key of _SIGNALS."""
_SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGSTOP": signal.SIGSTOP}


# ---- the ranks


@dataclass(frozen=True, slots=True)
class _Seat:
    """A rank's place in one generation, and what connects it to whoever started it."""

    folder: Path
    rank: int
    generation: int
    join: Callable[[], None]
    beat: Callable[[int], None] = lambda step: None


def work(context: launch.RankContext, payload: Mapping[str, Any]) -> int:
    """What `launch` calls in every rank."""
    folder = Path(payload["folder"])
    _warm(folder)

    def seat() -> _Seat:
        return _Seat(
            folder,
            context.env.rank,
            context.generation + payload["attempt"],
            lambda: context.init_process_group("gloo", _START_S),
            lambda step: context.heartbeat.beat(step=step, phase="train"),
        )

    return context.run(lambda: _train(seat())) or 0


class _Worker:
    """What Ray makes an actor of."""

    def train(self, folder: str, rank: int, num_ranks: int, attempt: int) -> int:
        _warm(Path(folder))
        store = dist.FileStore(f"{folder}/store{attempt}", num_ranks)  # type: ignore[attr-defined]

        def join() -> None:
            dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks)

        return _train(_Seat(Path(folder), rank, attempt, join))


def _warm(folder: Path) -> None:
    """Do what a first step would."""
    torch.set_num_threads(1)
    model, optimizer = _model()
    _step(model, optimizer)
    _note(folder, "warm", rank=-1, generation=-1)


def _train(seat: _Seat) -> int:
    """Train from the last state until told to stop; return the number of steps."""
    note = {"rank": seat.rank, "generation": seat.generation}
    _note(seat.folder, "begun", **note)
    seat.join()
    is_over = torch.zeros(1)
    dist.all_reduce(is_over)
    _note(seat.folder, "formed", **note)
    model, optimizer = _model()
    begin_s = time.monotonic()
    first = 0
    if (seat.folder / "state").exists():
        state = torch.load(seat.folder / "state")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"] + 1
    restoring_s = time.monotonic() - begin_s
    replicated = nn.parallel.DistributedDataParallel(model)
    for step in itertools.count(first):
        seat.beat(step)
        _step(replicated, optimizer)
        if step in (first, first + _STEPS_BEFORE):
            _note(seat.folder, "stepped", step=step, first=first, restoring_s=restoring_s, **note)
        if step % _SAVE_STEPS == 0 and seat.rank == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            torch.save(state, seat.folder / "unfinished")
            (seat.folder / "unfinished").rename(seat.folder / "state")
        is_over.fill_((seat.folder / "over").exists())
        dist.all_reduce(is_over)
        if is_over.item():
            break
    return step


def _model() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(_WIDTH, _WIDTH) for _ in range(4)))
    return model, torch.optim.AdamW(model.parameters())


def _step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    torch.autograd.backward(model(torch.ones(_ROWS, _WIDTH)).square().mean())
    optimizer.step()
    optimizer.zero_grad()


# ---- what they tell


def _note(folder: Path, what: str, **more: float) -> None:
    line = json.dumps({"what": what, "pid": os.getpid(), "at_s": time.monotonic()} | more) + "\n"
    file = os.open(folder / "notes", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        os.write(file, line.encode())  # one write: lines of several ranks do not mix
    finally:
        os.close(file)


def _notes(folder: Path, what: str, generation: int) -> list[dict[str, Any]]:
    path = folder / "notes"
    lines = path.read_text().splitlines() if path.exists() else []
    notes = map(json.loads, lines)
    return [note for note in notes if note["what"] == what and note["generation"] == generation]


class _Striker:
    """Strikes ranks of a job, the next once it runs again, and then ends it; in a thread of its own."""

    def __init__(
        self, folder: Path, num_ranks: int, strikes: Sequence[_Strike], num_warm: Callable[[int], int]
    ) -> None:
        """`num_warm`: how many processes have to have been ready, before the strike of this index."""
        self.struck_s: list[float] = []
        self.victims: list[int] = []
        self._error: OSError | None = None
        self._folder, self._num_ranks, self._strikes, self._num_warm = folder, num_ranks, strikes, num_warm
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="striker")
        self._thread.start()

    def end(self) -> None:
        """Strike no more: the job has ended, or will not run again."""
        self._is_over.set()
        self._thread.join()

    def check(self) -> None:
        """Raises: OSError where the job did not begin, or not again, or a rank was gone before it was struck."""
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            for index, (rank, name) in enumerate(self._strikes):
                has_begun = self._await("warm", -1, self._num_warm(index), _START_S)
                if not has_begun or not self._await("stepped", index, 2 * self._num_ranks, _START_S):
                    return
                begun = _notes(self._folder, "begun", index)
                victim = next(int(note["pid"]) for note in begun if note["rank"] == rank)
                self.victims.append(victim)
                self.struck_s.append(time.monotonic())
                os.kill(victim, _SIGNALS[name])
                if not self._await("stepped", index + 1, self._num_ranks, _AGAIN_S):
                    return
        except OSError as error:
            self._error = error
        finally:
            (self._folder / "over").touch()

    def _await(self, what: str, generation: int, count: int, timeout_s: float) -> bool:
        """Whether it came to that before the job was given up. Raises: TimeoutError."""
        until_s = time.monotonic() + timeout_s
        while len(_notes(self._folder, what, generation)) < count:
            if self._is_over.is_set():
                return False
            if time.monotonic() > until_s:
                raise TimeoutError(f"{self._folder}: not {what} {count} times in {timeout_s:g} s")
            time.sleep(_POLL_S)
        return True


# ---- the arms: each makes a job, has it struck, and returns when each strike was found, on the clock of the notes


def _with_spare(folder: Path, striker: _Striker, num_ranks: int, frozen_s: float) -> list[float | None]:
    recovery = launch.Recovery(
        fence=folder / "fence",
        record=folder / "recoveries",
        health=HealthConfig(),
        policy=PolicyConfig(shrink=False, restarts_per_hour=1000),
    )
    _launch(folder, num_ranks, 0, launch.LaunchConfig(spares=1, frozen_timeout_s=frozen_s), recovery)
    since_s = time.time() - time.monotonic()
    lines = [json.loads(line) for line in (folder / "recoveries").read_text().splitlines()]
    return [float(line["time"] - since_s - line["after_s"]["rejoined"]) for line in lines]


def _restarted(folder: Path, striker: _Striker, num_ranks: int, frozen_s: float) -> list[float | None]:
    config = launch.LaunchConfig(frozen_timeout_s=frozen_s)
    found_s: list[float | None] = []
    while True:
        try:
            _launch(folder, num_ranks, len(found_s), config, None)
        except launch.RankFailed:
            found_s.append(time.monotonic())
            if len(found_s) > len(striker.struck_s):
                raise  # nobody struck it
        else:
            return found_s


def _launch(
    folder: Path, num_ranks: int, attempt: int, config: launch.LaunchConfig, recovery: launch.Recovery | None
) -> None:
    payload = {"folder": str(folder), "attempt": attempt}
    entry = "trainsys.bench.recovery:work"
    job = launch.Job(entry=entry, payload=payload, world_size=num_ranks, log_dir=folder / "logs", name="job")
    result = launch.run(job, config, heartbeat_interval_s=0.2, on_output=lambda _: None, recovery=recovery)
    if result.outcome == "stopped":
        raise SystemExit("stopped")


def _on_ray(folder: Path, striker: _Striker, num_ranks: int, patience_s: float) -> list[float | None]:
    import ray

    make: Any = ray.remote(num_cpus=0, max_restarts=0)(_Worker)
    found_s: list[float | None] = []
    while True:
        attempt = len(found_s)
        actors = [make.remote() for _ in range(num_ranks)]
        works = [actor.train.remote(str(folder), rank, num_ranks, attempt) for rank, actor in enumerate(actors)]
        while not (done := ray.wait(works, timeout=0.05)[0]):
            if len(striker.struck_s) > attempt and time.monotonic() > striker.struck_s[attempt] + patience_s:
                os.kill(striker.victims[attempt], signal.SIGKILL)
                break
        try:
            ray.get(done)
            if done:
                ray.get(works)
                return found_s
            found_s.append(None)
        except (ray.exceptions.RayActorError, ray.exceptions.RayTaskError):
            found_s.append(time.monotonic())
            if len(found_s) > len(striker.struck_s):
                raise  # nobody struck it
        for actor in actors:
            ray.kill(actor)


# ---- the measurement


def main(words: list[str]) -> int:
    """Measure and report."""
    parser = arguments(__doc__)
    parser.add_argument("--ranks", type=int, default=3, help="of the job, beside the spare (default: %(default)s)")
    parser.add_argument("--arms", nargs="+", choices=_ARMS, default=list(_ARMS), metavar="ARM", help=", ".join(_ARMS))
    parser.add_argument("--minutes", type=float, default=1e6, help="start no job after so long")
    parser.add_argument("--frozen-s", type=float, default=2.0, help="silence of a frozen rank (default: %(default)s)")
    parser.add_argument("--patience-s", type=float, default=10.0, help="until Ray counts as not having noticed")
    options = parser.parse_args(words)
    signals: Sequence[str] = list(_SIGNALS)
    if options.smoke:
        options.arms, options.repeats, options.ranks, signals = [_SPARE], 1, 2, ["SIGKILL"]
    report = Report(
        "trainsys.recovery",
        {
            "ranks": options.ranks,
            "frozen_s": options.frozen_s,
            "patience_s": options.patience_s,
            "load average of the last 15 minutes": round(os.getloadavg()[2], 1),
        },
    )
    not_again = 0
    with ExitStack() as stack:
        if _RAY in options.arms:
            stack.enter_context(_own_ray())
        until_s = time.monotonic() + 60 * options.minutes
        for repeat, arm in itertools.product(range(options.repeats), options.arms):
            if time.monotonic() > until_s:
                break
            strikes = [((repeat + index) % options.ranks, name) for index, name in enumerate(signals)]
            begun_s = time.monotonic()
            not_again += len(strikes) - _measure(report, arm, strikes, options)
            print(f"{arm}, round {repeat + 1} of {options.repeats}: {time.monotonic() - begun_s:.0f} s", flush=True)
            _gate(report, not_again, options.smoke)
            if options.json:
                report.write(options.json)  # what there is, should it be ended
    return report.finish(options)


def _measure(report: Report, arm: str, strikes: Sequence[_Strike], options: Any) -> int:
    """Take a sample of each strike in one job; return after how many it went on."""
    shared = Path("/dev/shm")
    num, is_ray, has_spare = options.ranks, arm == _RAY, arm == _SPARE
    with tempfile.TemporaryDirectory(prefix="recovery-", dir=shared if shared.is_dir() else None) as path:
        folder = Path(path)
        striker = _Striker(folder, num, strikes, lambda index: num + 1 + index if has_spare else num * (index + 1))
        try:
            found = _ARMS[arm](folder, striker, num, options.patience_s if is_ray else options.frozen_s)
        finally:
            striker.end()
        striker.check()
        for index, ((_, name), found_s) in enumerate(zip(strikes, found, strict=True)):
            _add(report, f"{arm}, {name}", folder, index + 1, (striker.struck_s[index], found_s))
            if is_ray:
                report.add(f"{arm}, {name}", "not found", "1", float(found_s is None))
        if has_spare:
            start = [max(note["at_s"] for note in _notes(folder, what, 0)) for what in ("begun", "formed")]
            report.add("start", "forming the group", "s", start[1] - start[0])
        return sum(len(_notes(folder, "formed", index + 1)) == num for index in range(len(strikes)))


def _add(report: Report, case: str, folder: Path, generation: int, at_s: tuple[float, float | None]) -> None:
    """Add one strike's times: when it was, and when it was found, if it was."""
    struck_s, found_s = at_s
    if found_s is None:
        return
    formed_s = max(note["at_s"] for note in _notes(folder, "formed", generation))
    firsts = [note for note in _notes(folder, "stepped", generation) if note["step"] == note["first"]]
    stepped_s, restoring_s = (max(note[what] for note in firsts) for what in ("at_s", "restoring_s"))
    print(f"{case}: a step {stepped_s - struck_s:.2f} s after it", flush=True)
    report.add(case, "found", "s", found_s - struck_s)
    report.add(case, "formed", "s", formed_s - found_s)
    report.add(case, "first step", "s", stepped_s - formed_s - restoring_s)
    report.add(case, "restoring", "s", restoring_s)
    report.add(case, "whole", "s", stepped_s - struck_s - restoring_s)


def _gate(report: Report, not_again: int, is_smoke: bool) -> None:
    """Hold what there is so far to the issue's figures."""
    report.gates = [Gate("jobs that did not go on", not_again, 0, ok=not_again == 0)]
    start = report.samples.get(("start", "forming the group", "s"))
    if start:
        report.bounds = [Bound("formed", min(start), "s", "the same ranks at the start, from the last to come")]
    for name in _SIGNALS:
        whole = report.samples.get((f"{_SPARE}, {name}", "whole", "s"))
        if whole and not is_smoke:
            slowest = max(whole)
            gate = Gate(f"{_SPARE}, {name}: slowest recovery, s", slowest, LIMIT_S, slowest <= LIMIT_S, is_speed=True)
            report.gates.append(gate)


@contextmanager
def _own_ray() -> Iterator[None]:
    with ray_cluster.joined(""):
        yield


_SPARE, _RAY = "warm spare", "Ray alone"
_ARMS: Mapping[str, Callable[[Path, _Striker, int, float], list[float | None]]] = {
    _SPARE: _with_spare,
    "restart of all": _restarted,
    _RAY: _on_ray,
}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
