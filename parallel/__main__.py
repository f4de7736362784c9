"""`python -m parallel mesh`: print how ranks are laid out. Exit code 2: the degrees do not fit."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import get_args

from parallel.config import ParallelConfig
from parallel.errors import ParallelError
from parallel.mesh import Axis, Mesh


def main(arguments: Sequence[str]) -> int:
    """Run the command line; return its exit code."""
    options = _parser().parse_args(arguments)
    degrees = ParallelConfig(**{axis: getattr(options, axis) for axis in get_args(Axis)})
    try:
        mesh = Mesh(degrees, options.world)
    except ParallelError as error:
        print(error, file=sys.stderr)
        return 2
    print(mesh.describe())
    if options.groups:
        for axis in get_args(Axis):
            if mesh.size(axis) > 1:
                print(f"{axis}: {' '.join(str(group) for group in mesh.groups(axis))}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m parallel", description="Layouts of ranks.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    mesh = commands.add_parser("mesh", help="print the ranks of a mesh", description="Print the ranks of a mesh.")
    mesh.add_argument("--world", type=int, required=True, metavar="N", help="number of ranks")
    for axis in get_args(Axis):
        mesh.add_argument(f"--{axis}", type=int, default=1, metavar="N", help=f"degree of {axis}; default 1")
    mesh.add_argument("--groups", action="store_true", help="also print the groups of each axis")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
