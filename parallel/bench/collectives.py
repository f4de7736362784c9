"""Collectives are correct and this fast here: time, algorithm and bus bandwidth over sizes and groups.

    python -m parallel bench-collectives [--ranks N] [--backend nccl] [--tensor N …] [--groups N,…] [--parquet FILE]

starts its own ranks on this machine, or joins the job of a torchrun that started it (`torchrun … -m parallel
bench-collectives`). The terms are those of `parallel.microbench`. Bound: copying memory. Gate: no wrong element.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import cast, get_args

from parallel.bench import Backend, RankError, add_arguments, spawn
from parallel.config import ParallelConfig
from parallel.errors import ParallelError
from parallel.mesh import Axis
from parallel.microbench import DTYPES, KINDS, Kind, Plan, copy_rate, layouts_of, measure, report_of, text_of
from parallel.microbench import write_parquet as write
from parallel.ranks import device_of

_UNITS = {"": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_DEFAULT_SIZES = {"gloo": "4B,1KiB,64KiB,1MiB,16MiB", "nccl": "4B,1KiB,64KiB,1MiB,16MiB,256MiB"}


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark and print its table; 1 where a result was wrong, 2 where what is asked for cannot be."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        plan, num_ranks = _plan(options)
        results = spawn(measure, num_ranks, plan.backend, plan)
    except (ParallelError, ValueError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    except RankError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    if results is None:
        return 0
    measurements = results[0]
    report = report_of(plan, measurements, copy_rate(max(plan.sizes), device_of(plan.backend)))
    print(text_of(measurements))
    for name, first_call_s in {m.group: m.first_call_s for m in measurements}.items():
        if first_call_s is not None:
            print(f"{name}: first call after {first_call_s * 1e3:.1f} ms, connecting included")
    for bound in report.bounds:
        print(f"bound: {bound.metric} {bound.value / 1e9:.3f} GB/s ({bound.how})")
    if options.parquet:
        write(measurements, options.parquet)
    if options.json:
        report.write(options.json)
    wrong = [gate for gate in report.gates if not gate.ok]
    for gate in wrong:
        print(f"MISSED {gate.name}: {gate.value:g}, limit {gate.limit:g}", file=sys.stderr)
    return 1 if wrong else 0


def sizes_of(text: str) -> tuple[int, ...]:
    """Return the bytes of `4B,64KiB,1MiB`."""
    found = []
    for word in text.split(","):
        match = re.fullmatch(r"(\d+)\s*([A-Za-z]*)", word.strip())
        if not match or match[2] not in _UNITS or int(match[1]) < 1:
            raise argparse.ArgumentTypeError(f"{word!r} is no size; like 4B, 64KiB, 1MiB, 1GB")
        found.append(int(match[1]) * _UNITS[match[2]])
    return tuple(found)


def _plan(options: argparse.Namespace) -> tuple[Plan, int]:
    backend = cast(Backend, options.backend)
    num_ranks = options.ranks or int(os.environ.get("WORLD_SIZE", 2))
    degrees = ParallelConfig(**{axis: getattr(options, axis) for axis in get_args(Axis)})
    group_sizes = options.groups
    if group_sizes is None:
        group_sizes = [] if degrees != ParallelConfig() else [num_ranks]
    if num_ranks < 2 or any(size < 2 or num_ranks % size for size in group_sizes):
        raise ValueError(f"--groups: {group_sizes} among {num_ranks} ranks; a size is 2 or more and divides the ranks")
    if options.repeats < 1:
        raise ValueError("--repeats: at least 1")
    plan = Plan(
        layouts=layouts_of(degrees, group_sizes, num_ranks),
        kinds=tuple(options.kinds),
        sizes=options.sizes or ((8, 4096) if options.smoke else sizes_of(_DEFAULT_SIZES[backend])),
        dtype=options.dtype,
        backend=backend,
        repeats=1 if options.smoke else options.repeats,
    )
    return plan, num_ranks


def _kinds(text: str) -> list[Kind]:
    unknown = sorted(set(text.split(",")) - set(KINDS))
    if unknown:
        raise argparse.ArgumentTypeError(f"no collective {', '.join(unknown)}; of {', '.join(KINDS)}")
    return cast(list[Kind], text.split(","))


def _numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m parallel bench-collectives",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    parser.add_argument("--ranks", type=int, metavar="N", help="ranks to start (default: torchrun's, else 2)")
    parser.add_argument("--backend", choices=get_args(Backend), default="gloo", help="default: %(default)s")
    parser.add_argument("--kinds", type=_kinds, default=list(KINDS), metavar="KIND,…", help=f"of {', '.join(KINDS)}")
    parser.add_argument("--sizes", type=sizes_of, metavar="SIZE,…", help="like 4B,64KiB,1MiB (default: up to 16MiB)")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32", help="default: %(default)s")
    parser.add_argument("--groups", type=_numbers, metavar="N,…", help="groups of N neighbours (default: all ranks)")
    for axis in get_args(Axis):
        parser.add_argument(f"--{axis}", type=int, default=1, metavar="N", help=f"degree of {axis}: measure its groups")
    parser.add_argument("--parquet", type=Path, metavar="FILE", help="also write a row a measurement, for the planner")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
