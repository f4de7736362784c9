"""Each package imports only what its row of the table allows, and no file shadows another package.

The packages are six libraries that happen to share a repository: a leaf that imports a sibling, or a heavy
dependency at module level, stops being one.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.sources import PACKAGES, ROOT, python_files


@dataclass(frozen=True)
class _Row:
    """What one package may import."""

    siblings: frozenset[str]
    anywhere: frozenset[str]
    in_functions: frozenset[str]


def _row(siblings: str = "", anywhere: str = "", in_functions: str = "") -> _Row:
    return _Row(frozenset(siblings.split()), frozenset(anywhere.split()), frozenset(in_functions.split()))


TABLE = {
    "checkpoint": _row(anywhere="torch numpy pyarrow fsspec xxhash", in_functions="rich deepspeed safetensors ray"),
    "parallel": _row(anywhere="torch", in_functions="deepspeed pyarrow"),
    "offload": _row(anywhere="torch numpy", in_functions="deepspeed"),
    "faulttol": _row(anywhere="torch pyarrow"),
    "launch": _row(siblings="faulttol", anywhere="torch", in_functions="ray"),
    "trainsys": _row(
        siblings="checkpoint parallel offload faulttol launch",
        anywhere="torch numpy pyarrow fsspec xxhash pydantic rich typer",
        in_functions="deepspeed ray wandb transformers tokenizers safetensors psutil cryptography reasoning_gym",
    ),
}
"""`in_functions`: extras of the distribution, or what would make `import` slow."""
DEEPSPEED_IN_TRAINSYS = {"trainsys/deepspeed_layout.py", "trainsys/deepspeed_setup.py"}
"""The adapter: the one place that knows deepspeed's shape."""


@dataclass(frozen=True)
class _Import:
    line: int
    top: str
    at_module_level: bool


def _imports(tree: ast.Module) -> Iterator[_Import]:
    """Yield every absolute import, also by `importlib.import_module("…")`.

    Module level means: executed by importing the file, so not in a function and not under TYPE_CHECKING.
    """

    def visit(node: ast.AST, executed: bool) -> Iterator[_Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield _Import(node.lineno, alias.name.partition(".")[0], executed)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            assert node.module is not None
            yield _Import(node.lineno, node.module.partition(".")[0], executed)
        elif isinstance(node, ast.Call) and _name(node.func) in ("import_module", "__import__"):
            for argument in node.args[:1]:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    yield _Import(node.lineno, argument.value.partition(".")[0], executed)
        if isinstance(node, ast.If) and _name(node.test) == "TYPE_CHECKING":
            for statement in node.body:
                yield from visit(statement, False)
            for statement in node.orelse:
                yield from visit(statement, executed)
            return
        for child in ast.iter_child_nodes(node):
            yield from visit(child, executed and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))

    yield from visit(tree, True)


def _name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def offences(root: Path) -> list[str]:
    """Return every import that the table forbids, as `file:line: package may not import x…`."""
    found = []
    for package, row in TABLE.items():
        for path, tree, _ in python_files(root, package):
            for item in _imports(tree):
                if item.top == package or item.top in sys.stdlib_module_names:
                    continue
                place = f"{path}:{item.line}: {package} may not import {item.top}"
                if item.top not in row.siblings | row.anywhere | row.in_functions:
                    found.append(place)
                elif item.top in row.in_functions and item.at_module_level:
                    found.append(f"{place} at module level")
                elif item.top == "deepspeed" and package == "trainsys" and path not in DEEPSPEED_IN_TRAINSYS:
                    found.append(f"{place} outside {', '.join(sorted(DEEPSPEED_IN_TRAINSYS))}")
    return found


def shadows(root: Path) -> list[str]:
    """Return every module, package or test folder named like a top-level package or a stdlib module.

    `python package/x.py` and test folders put their own folder first on the path: then the shadow wins.
    """
    taken = set(PACKAGES) | {name for row in TABLE.values() for name in row.anywhere | row.in_functions}
    found = []
    for folder in (*PACKAGES, "tests"):
        for path in sorted((root / folder).rglob("*")):
            name = path.stem if path.suffix == ".py" else path.name
            is_module = path.suffix == ".py" or (path.is_dir() and any(path.glob("*.py")))
            if is_module and (name in taken or name in sys.stdlib_module_names):
                found.append(f"{path.relative_to(root)} shadows {name}")
    return found


def missing_inits(root: Path) -> list[str]:
    """Return folders of modules without `__init__.py`; pytest would import them by their bare name."""
    folders = {path.parent for top in (*PACKAGES, "tests") for path in (root / top).rglob("*.py")}
    return sorted(str(f.relative_to(root)) for f in folders if not (f / "__init__.py").exists())


def test_every_import_is_in_the_table() -> None:
    assert not offences(ROOT)


def test_no_module_shadows_a_package() -> None:
    assert not shadows(ROOT)


def test_every_folder_of_modules_is_a_package() -> None:
    assert not missing_inits(ROOT)


def test_every_top_level_package_has_a_row() -> None:
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
    assert folders == set(PACKAGES) == set(TABLE)


@pytest.mark.parametrize(
    ("path", "text", "offence"),
    [
        ("checkpoint/a.py", "import parallel.mesh", "1: checkpoint may not import parallel"),
        ("checkpoint/a.py", "def f():\n    from trainsys import x", "2: checkpoint may not import trainsys"),
        ("checkpoint/a.py", "def f():\n    import wandb", "2: checkpoint may not import wandb"),
        ("faulttol/a.py", "from launch import run", "1: faulttol may not import launch"),
        ("offload/a.py", "import deepspeed", "1: offload may not import deepspeed at module level"),
        (
            "offload/a.py",
            "class A:\n    import deepspeed",
            "2: offload may not import deepspeed at module level",
        ),
        ("parallel/a.py", "import pyarrow as pa", "1: parallel may not import pyarrow"),
        (
            "launch/a.py",
            "try:\n    import ray\nexcept ImportError:\n    ray = None",
            "2: launch may not import ray",
        ),
        ("launch/a.py", "x = importlib.import_module('ray')", "1: launch may not import ray at module level"),
        ("trainsys/a.py", "from wandb import init", "1: trainsys may not import wandb at module level"),
        ("trainsys/a.py", "def f():\n    import deepspeed", "2: trainsys may not import deepspeed outside"),
        ("trainsys/deepspeed_setup.py", "import deepspeed", "1: trainsys may not import deepspeed at module level"),
        ("trainsys/a.py", "from tests.ranks import run_ranks", "1: trainsys may not import tests"),
        ("trainsys/deep/a.py", "import requests", "1: trainsys may not import requests"),
    ],
)
def test_a_forbidden_import_is_found(tmp_path: Path, path: str, text: str, offence: str) -> None:
    _write(tmp_path / path, text)
    (found,) = offences(tmp_path)
    assert found.startswith(f"{path}:{offence}")


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("checkpoint/a.py", "import json, torch.distributed\nfrom . import b\nfrom checkpoint.c import d"),
        ("launch/a.py", "from faulttol import heartbeat\ndef f():\n    import ray"),
        ("launch/a.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import ray"),
        ("trainsys/deepspeed_setup.py", "def f():\n    import deepspeed"),
    ],
)
def test_an_allowed_import_is_not_found(tmp_path: Path, path: str, text: str) -> None:
    _write(tmp_path / path, text)
    assert not offences(tmp_path)


@pytest.mark.parametrize(
    "path", ["trainsys/queue.py", "trainsys/checkpoint.py", "launch/ray.py", "tests/checkpoint/test_a.py"]
)
def test_a_shadow_is_found(tmp_path: Path, path: str) -> None:
    _write(tmp_path / path, "")
    assert len(shadows(tmp_path)) == 1


def test_a_folder_without_init_is_found(tmp_path: Path) -> None:
    _write(tmp_path / "tests/test_x/test_a.py", "")
    assert missing_inits(tmp_path) == ["tests/test_x"]


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
