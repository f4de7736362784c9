"""Look at a run that is recorded: `python -m faulttol COMMAND RUN`. RUN is a folder with rings or shipped events."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from faulttol.config import DetectorConfig, HealthConfig
from faulttol.errors import FaultTolError, RunError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code: 1 when a report has findings of faults, 2 for what cannot be done."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.run_command(options))
    except (FaultTolError, OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m faulttol", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: object, told: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=told, description=told)
        command.add_argument("run", metavar="RUN", help="the run's folder, or where its events were shipped to")
        command.set_defaults(run_command=run)
        return command

    watch = add("watch", _watch, "Show live where every rank is, what it waits in, and what the detector says.")
    watch.add_argument("--every", type=float, default=0.5, metavar="S", help="seconds between two pictures")
    watch.add_argument("--once", action="store_true", help="one picture, without control sequences")
    _add_threshold(watch)
    report = add("report", _report, "Say what is wrong and where the time went; exit code 1 if there is a fault.")
    _add_threshold(report)
    _add_generation(report)
    for name, run, what, told in (
        ("timeline", _timeline, "FILE", "Write a trace for ui.perfetto.dev or chrome://tracing."),
        ("heat", _heat, "FILE", "Write a page (HTML) with own and waiting time by rank and step, and link delays."),
        ("flight", _flight, "FOLDER", "Write dumps for `python -m torch.distributed.flight_recorder.fr_trace FOLDER`."),
    ):
        command = add(name, run, told)
        command.add_argument("out", metavar=what, type=Path)
        _add_generation(command)
    ship = add("ship", _ship, "Ship a run's rings to TARGET until interrupted, or once.")
    ship.add_argument("target", metavar="TARGET", help="a path, s3://…, gs://…, or fsspec+PROTOCOL://…")
    ship.add_argument("--every", type=float, default=10.0, metavar="S", help="seconds between two parts")
    ship.add_argument("--once", action="store_true")
    inject = add("inject", _inject, "Strike ranks of a recorded run on this machine with faults, as a drill.")
    inject.add_argument("--kind", action="append", required=True, metavar="KIND", help="kill, freeze, slow, …; repeat")
    inject.add_argument("--rank", action="append", type=int, metavar="R", help="one of these (default: any); repeat")
    inject.add_argument("--for", type=float, default=5.0, dest="seconds", metavar="S", help="of what passes by itself")
    inject.add_argument("--factor", type=float, default=2.0, help="by which a slow rank becomes slower")
    inject.add_argument("--count", type=int, default=1, help="faults, drawn at random (default: %(default)s)")
    inject.add_argument("--every", type=float, default=20.0, metavar="S", help="seconds from one to the next")
    inject.add_argument("--seed", type=int, default=0)
    metrics = add("metrics", _metrics, "Serve or write metrics for Prometheus until interrupted.")
    where = metrics.add_mutually_exclusive_group(required=True)
    where.add_argument("--port", type=int, help="serve http://127.0.0.1:PORT/metrics")
    where.add_argument("--file", type=Path, help="write there every --every seconds")
    metrics.add_argument("--every", type=float, default=10.0, metavar="S")
    metrics.add_argument("--once", action="store_true", help="write the file once")
    preflight = commands.add_parser("preflight", help="Check this machine: products, memory, disk; exit code 1 if bad.")
    preflight.add_argument("folder", metavar="FOLDER", nargs="?", type=Path, default=Path(), help="where a job writes")
    preflight.add_argument("--device", default="cpu", help="cpu or cuda:N (default: %(default)s)")
    preflight.set_defaults(run_command=_preflight)
    build = commands.add_parser("build", help="Build the recorder's part in C++ for this torch, once (half a minute).")
    build.set_defaults(run_command=_build)
    return parser


def _add_threshold(command: argparse.ArgumentParser) -> None:
    command.add_argument("--hang-after", type=float, metavar="S", help="a collective that is open for longer may hang")


def _add_generation(command: argparse.ArgumentParser) -> None:
    command.add_argument("--generation", type=int, help="which one (default: the newest)")


def _config(options: argparse.Namespace) -> DetectorConfig:
    config = DetectorConfig()
    return config if options.hang_after is None else dataclasses.replace(config, hang_after_s=options.hang_after)


def _watch(options: argparse.Namespace) -> int:
    from faulttol.watch import Watcher, run

    with Watcher(Path(options.run), _config(options), HealthConfig()) as watcher:
        run(watcher, sys.stdout, options.every, options.once)
    return 0


def _report(options: argparse.Namespace) -> int:
    from faulttol import report, run

    records, config, health = run.records(options.run, options.generation), _config(options), HealthConfig()
    print(report.text(records, config, health), end="")
    if recoveries := run.recoveries(options.run):
        print("", f"RECOVERIES  {len(recoveries)}, of all generations; the rest is of one (--generation)", sep="\n")
        print(*recoveries, sep="\n")
    return int(any(episode.finding.kind.is_fault for episode in report.episodes(records, config, health)))


def _timeline(options: argparse.Namespace) -> int:
    from faulttol import run, timeline

    timeline.write(run.records(options.run, options.generation), options.out)
    print(options.out)
    return 0


def _heat(options: argparse.Namespace) -> int:
    from faulttol import heat, run

    heat.write(run.records(options.run, options.generation), options.out, f"Run {options.run}")
    print(options.out)
    return 0


def _flight(options: argparse.Namespace) -> int:
    from faulttol import flight, run

    for path in flight.dump(run.records(options.run, options.generation), options.out):
        print(path)
    return 0


def _inject(options: argparse.Namespace) -> int:
    from faulttol import drill
    from faulttol.inject import Fault

    unknown = [kind for kind in options.kind if kind not in drill.KINDS]
    if unknown:
        raise ValueError(f"--kind: {unknown[0]} cannot be done from outside; one of {', '.join(drill.KINDS)} can")
    run = Path(options.run)
    ranks = options.rank or sorted(drill.targets(run))
    template = Fault(kind=options.kind[0], rank=-1, step=-1, seconds=options.seconds, factor=options.factor)
    begun_s = time.monotonic()
    for at_s, fault in drill.plan(
        options.kind, ranks, count=options.count, every_s=options.every, seed=options.seed, template=template
    ):
        time.sleep(max(0.0, begun_s + at_s - time.monotonic()))
        target = drill.targets(run).get(fault.rank)
        if target is None:
            print(f"rank {fault.rank} does not run on this machine", file=sys.stderr)
            return 2
        print(f"{fault.kind} rank {fault.rank} (process {target.pid})", flush=True)
        drill.strike(target, fault, run / "faults.jsonl")
    return 0


def _preflight(options: argparse.Namespace) -> int:
    from faulttol.preflight import check_machine, summary

    checks = check_machine(options.folder, device=options.device)
    print(summary(checks))
    return int(not all(check.ok for check in checks))


def _build(_: argparse.Namespace) -> int:
    from faulttol import compiled

    print(compiled.build())
    return 0


def _ship(options: argparse.Namespace) -> int:
    from faulttol.ship import Convoy

    _tell_if_empty(options)
    with Convoy(Path(options.run), options.target, every_s=options.every):
        if not options.once:
            threading.Event().wait()
    return 0


def _metrics(options: argparse.Namespace) -> int:
    from faulttol.metrics import Metrics, serve, write_forever

    _tell_if_empty(options)
    with Metrics(Path(options.run)) as metrics:
        if options.port is not None:
            with serve(metrics, options.port) as port:
                print(f"http://127.0.0.1:{port}/metrics", flush=True)
                threading.Event().wait()
        elif options.once:
            metrics.write(options.file)
        else:
            write_forever(metrics, options.file, options.every, threading.Event())
    return 0


def _tell_if_empty(options: argparse.Namespace) -> None:
    """Say that there are no rings yet; raise RunError where nobody would wait for them."""
    if any(Path(options.run).rglob("*.ring")):
        return
    if options.once:
        raise RunError(f"{options.run}: no rings; a folder that a recorder writes to has some")
    print(f"{options.run}: no rings yet; waiting for them", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
