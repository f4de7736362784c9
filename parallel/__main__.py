"""`python -m parallel mesh` prints how ranks are laid out, `table` what runs on which engine, `bench-collectives` how
fast ranks talk.

Exit code 2: what was asked for does not fit.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
from collections.abc import Sequence
from typing import get_args

from parallel import legal, picture, recipes
from parallel.errors import ParallelError
from parallel.mesh import Along, Axis, Mesh

_MESH = """Print which rank stands where: stages as columns, data ranks as rows, tensor ranks side by side, context
ranks divided by |, hosts by a double line. Degrees come from the recipes, left to right, then from the flags."""


def main(arguments: Sequence[str]) -> int:
    """Run the command line; return its exit code."""
    if arguments[:1] == ["bench-collectives"]:
        from parallel.bench import collectives  # needs torch, which takes a second

        return collectives.main(arguments[1:])
    options = _parser().parse_args(arguments)
    if options.command == "table":
        print(legal.table())
        return 0
    try:
        mesh = _mesh(options)
    except ParallelError as error:
        print(error, file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(_document(mesh, options.ranks_per_host)))
        return 0
    print(picture.draw(mesh, options.ranks_per_host, options.width or shutil.get_terminal_size((120, 50)).columns))
    if options.groups:
        for axis in _axes(mesh):
            print(f"{axis}: {' '.join(str(group) for group in mesh.groups(axis))}")
    return 0


def _mesh(options: argparse.Namespace) -> Mesh:
    degrees = recipes.load_degrees(options.recipes)
    given = {axis: getattr(options, axis) for axis in get_args(Axis) if getattr(options, axis) is not None}
    degrees = dataclasses.replace(degrees, **given)
    num_ranks = Mesh.product(degrees)
    if options.fill and options.world:
        degrees = Mesh.fill(degrees, options.fill, options.world)
    return Mesh(degrees, num_ranks if options.world is None else options.world)


def _document(mesh: Mesh, ranks_per_host: int) -> dict[str, object]:
    """Return everything about the mesh as JSON values."""
    ranks = [
        {"rank": rank, **mesh.coordinates(rank)._asdict(), "data": mesh.data_rank(rank)}
        | ({"host": rank // ranks_per_host} if ranks_per_host else {})
        for rank in range(mesh.world_size)
    ]
    return {
        "world_size": mesh.world_size,
        "degrees": {axis: mesh.size(axis) for axis in get_args(Axis)},
        "ranks": ranks,
        "groups": {axis: mesh.groups(axis) for axis in _axes(mesh)},
    }


def _axes(mesh: Mesh) -> list[Along]:
    """Return what has groups of several ranks; `expert_data` where there are experts to share."""
    axes: tuple[Along, ...] = get_args(Along)
    return [a for a in axes if mesh.size(a) > 1 and (a != "expert_data" or mesh.degrees.expert > 1)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m parallel", description="Layouts of ranks, and how fast they talk.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    mesh = commands.add_parser("mesh", help="draw the ranks of a mesh", description=_MESH)
    mesh.add_argument("recipes", nargs="*", metavar="RECIPE", help="TOML files, or names of recipes that ship")
    mesh.add_argument("--world", type=int, metavar="N", help="number of ranks (default: the product of the degrees)")
    for axis in get_args(Axis):
        mesh.add_argument(f"--{axis}", type=int, metavar="N", help=f"degree of {axis} (default: the recipe's, else 1)")
    mesh.add_argument(
        "--fill", choices=("replicate", "shard"), help="multiply this degree until the product is --world"
    )
    mesh.add_argument("--ranks-per-host", type=int, default=0, metavar="N", help="mark hosts of N ranks")
    mesh.add_argument("--groups", action="store_true", help="also list the groups of each axis")
    mesh.add_argument("--json", action="store_true", help="print ranks and groups as JSON instead")
    mesh.add_argument("--width", type=int, metavar="N", help="columns to draw in (default: the terminal's)")
    commands.add_parser(
        "table", help="which layouts run on which engine", description="Which layouts run on which engine."
    )
    commands.add_parser("bench-collectives", help="measure collectives", add_help=False)
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
