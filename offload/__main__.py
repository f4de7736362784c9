"""`python -m offload probe`: measure what offloading can count on here. Exit code 2: it cannot be done."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import get_args

from offload.calibrate import KEPT
from offload.errors import OffloadError
from offload.movers import IoName
from offload.numa import memory_only
from offload.probe import Measurement, Report, probe
from offload.tier import TierSpec

_UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def main(arguments: Sequence[str]) -> int:
    """Run the command line; return its exit code."""
    options = _parser().parse_args(arguments)
    try:
        if not options.path.is_dir():
            raise OffloadError(f"--path: {options.path} is not a folder; name one on the disk to measure")
        report = probe(
            options.path, size_bytes=options.size, repeats=options.repeats, cxl=options.emulate_cxl, io=options.io
        )
        text = json.dumps(as_json(report), indent=1) + "\n"
        for path in (options.keep, options.json):
            if path:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
    except (OffloadError, OSError) as error:
        print(f"offload probe: {error}", file=sys.stderr)
        return 2
    print(_table(report))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m offload", description="Tiers of memory.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    about = "Measure the memory, disk, optimizer and GPU copies of this machine."
    command = commands.add_parser("probe", help=about, description=about)
    command.add_argument(
        "--path",
        type=Path,
        default=Path(),
        metavar="DIR",
        help="folder on the disk to measure; default: here",
    )
    command.add_argument("--json", type=Path, metavar="FILE", help="also write the figures with every sample there")
    command.add_argument(
        "--keep", type=Path, default=KEPT, metavar="FILE", help="where `trainsys plan` finds them; default: %(default)s"
    )
    command.add_argument(
        "--emulate-cxl",
        type=_emulated,
        metavar="SIZE,GB/s,us",
        help="without CXL memory measure a stand-in of this size, rate each way and latency, e.g. 64GiB,20,0.5",
    )
    command.add_argument(
        "--io",
        choices=get_args(IoName),
        default="auto",
        help="what moves the disk's bytes: io_uring where the kernel allows it, else threads (auto); aio is "
        "DeepSpeed's handle, which takes minutes to build at its first use",
    )
    command.add_argument(
        "--size", type=_num_bytes, default="512MiB", help="bytes moved per repeat, e.g. 1GiB; default 512MiB"
    )
    command.add_argument("--repeats", type=_positive, default=5, metavar="N", help="samples per figure; default 5")
    return parser


def _num_bytes(text: str) -> int:
    found = re.fullmatch(r"(\d+)\s*(KiB|MiB|GiB)?", text)
    size = int(found[1]) * _UNITS.get(found[2], 1) if found else 0
    if size < 1 << 20:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size of at least 1 MiB, such as 256MiB")
    return size


def _emulated(text: str) -> TierSpec:
    size, *figures = text.split(",")
    try:
        rate, latency_us = (float(figure) for figure in figures)
        return TierSpec(
            name="cxl",
            capacity_bytes=_num_bytes(size),
            read_bytes_per_s=rate * 1e9,
            write_bytes_per_s=rate * 1e9,
            latency_s=latency_us * 1e-6,
            emulated=True,
        )
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not SIZE,GB/s,us such as 64GiB,20,0.5") from error


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def as_json(report: Report) -> dict[str, object]:
    rows = [{**dataclasses.asdict(row), "value": row.value} for row in report.measurements]
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return {"date": date, **dataclasses.asdict(report), "measurements": rows}


def _table(report: Report) -> str:
    cells = [(row.metric, *_figure(row), row.how) for row in report.measurements]
    widths = [max(len(cell[column]) for cell in cells) for column in range(3)]
    lines = [
        f"{metric:<{widths[0]}}  {value:>{widths[1]}}  {spread:<{widths[2]}}  {how}"
        for metric, value, spread, how in cells
    ]
    machine = report.machine
    memory = f"{int(machine['memory_bytes']) / (1 << 30):.1f} GiB"
    lines.append(f"machine: {machine['cpus']} CPUs, {memory}, GPU {machine['gpu']}, {machine['system']}")
    lines.append(f"disk by {machine['nvme_io']}; io_uring {machine['io_uring']}")
    found = memory_only(report.numa_nodes)
    lines += [f"tier {spec.label}: {spec.capacity_bytes / 1e9:.1f} GB" for spec in report.tiers]
    nodes = ", ".join(f"node {node.index} ({node.memory_bytes / (1 << 30):.1f} GiB)" for node in found)
    lines.append(f"CXL or other memory without CPUs: {nodes or 'none'}")
    return "\n".join(lines)


def _figure(row: Measurement) -> tuple[str, str]:
    """Return the median and the range, in units that a person reads."""
    if row.value is None:
        return "not measured", ""
    scale, unit = {
        "B/s": (1e9, "GB/s"),
        "parameters/s": (1e9, "G parameters/s"),
        "s": (1e-6, "us"),
        "FLOP/s": (1e12, "TFLOP/s"),
    }[row.unit]
    low, high = min(row.samples) / scale, max(row.samples) / scale
    return f"{row.value / scale:.3g} {unit}", f"({low:.3g} to {high:.3g})"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
