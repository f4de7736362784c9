"""The degrees that recipes set, for the command line: their `[parallel]` section and nothing else.

The trainer reads recipes itself, all of them; this is for looking at a mesh without it.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from parallel.config import ParallelConfig
from parallel.errors import MeshError
from parallel.mesh import Axis


def load_degrees(recipes: Sequence[str]) -> ParallelConfig:
    """Return the degrees that the recipes set, composed left to right: paths of TOML files, or names that ship.

    Raises:
        MeshError: all files that cannot be read, unknown keys of `[parallel]`, and degrees that are no numbers.
    """
    degrees: dict[str, int] = {}
    problems: list[str] = []
    for recipe in recipes:
        try:
            section = _section(recipe)
        except MeshError as error:
            problems.append(str(error))
            continue
        problems += _problems(Path(recipe).name, section)
        degrees |= {axis: section[axis] for axis in get_args(Axis) if axis in section}
    if problems:
        raise MeshError("\n".join(problems))
    return dataclasses.replace(ParallelConfig(), **degrees)  # type: ignore[arg-type]  # degrees alone, all int


def _section(recipe: str) -> Mapping[str, Any]:
    path = _path(recipe)
    try:
        section = tomllib.loads(path.read_text(encoding="utf-8")).get("parallel", {})
    except OSError as error:
        raise MeshError(f"{recipe}: cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise MeshError(f"{recipe}: not TOML: {error}") from error
    if not isinstance(section, dict):
        raise MeshError(f"{recipe}: parallel: {section!r} is no section; write [parallel]")
    return section


def _path(recipe: str) -> Path:
    if Path(recipe).suffix == ".toml":
        return Path(recipe)
    shipped = _shipped()
    if recipe not in shipped:
        known = f"; shipped: {', '.join(sorted(shipped))}" if shipped else ""
        raise MeshError(f"{recipe}: no such recipe (a file must end in .toml){known}")
    return shipped[recipe]


def _shipped() -> dict[str, Path]:
    """Return the recipes that lie beside the trainer's code, where it is installed; imports nothing of it."""
    spec = importlib.util.find_spec("trainsys")
    folders = spec.submodule_search_locations if spec else None
    return {path.stem: path for folder in folders or () for path in Path(folder, "recipes").glob("*.toml")}


def _problems(source: str, section: Mapping[str, Any]) -> Iterator[str]:
    known = [field.name for field in dataclasses.fields(ParallelConfig)]
    for key in sorted(section):
        if key not in known:
            yield f"{source}: parallel.{key}: unknown; one of {', '.join(known)}"
        elif key in get_args(Axis) and type(section[key]) is not int:
            yield f"{source}: parallel.{key}: {section[key]!r} is no number of ranks; a whole number of at least 1"
