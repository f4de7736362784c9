"""The outer limits of a file, a function and a signature, and a few things that no file of ours does."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.sources import PACKAGES, ROOT, python_files

MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 100
MAX_PARAMETERS = 8
"""Without self and cls. The options of a command line (functions under a `@….command` decorator) do not count."""

_Function = ast.FunctionDef | ast.AsyncFunctionDef


def too_large(root: Path, *folders: str) -> list[str]:
    """Return files, functions and signatures beyond the limits."""
    found = []
    for path, tree, text in python_files(root, *folders):
        num_lines = text.count("\n")
        if num_lines > MAX_FILE_LINES:
            found.append(f"{path}: {num_lines} lines, at most {MAX_FILE_LINES}")
        for function in _functions(tree):
            place = f"{path}:{function.lineno}: {function.name}"
            num_lines = (function.end_lineno or 0) - function.lineno + 1
            if num_lines > MAX_FUNCTION_LINES:
                found.append(f"{place} has {num_lines} lines, at most {MAX_FUNCTION_LINES}")
            if (num_parameters := _num_parameters(function)) > MAX_PARAMETERS:
                found.append(f"{place} has {num_parameters} parameters, at most {MAX_PARAMETERS}")
    return found


def unannotated(root: Path, *folders: str) -> list[str]:
    """Return public functions with a parameter or a result without a type."""
    found = []
    for path, tree, _ in python_files(root, *folders):
        for function in _functions(tree):
            if function.name.startswith("_") and not function.name.endswith("__"):
                continue
            bare = [a.arg for a in _all_parameters(function) if a.annotation is None]
            if function.returns is None:
                bare.append("result")
            if bare:
                found.append(f"{path}:{function.lineno}: {function.name}: no type for {', '.join(bare)}")
    return found


def refused(root: Path, *folders: str) -> list[str]:
    """Return uses of what no file of ours does: global, import *, bare except and Exception, print, exit.

    Commands print and exit: `__main__`, the CLI, benchmarks, what stands under `if __name__ == "__main__"`.
    """
    found = []
    for path, tree, _ in python_files(root, *folders):
        is_command = path.endswith(("/__main__.py", "/cli.py")) or "/bench/" in path
        script = {inner for node in tree.body if _is_main_guard(node) for inner in ast.walk(node)}
        found += [
            f"{path}:{getattr(node, 'lineno', 0)}: {what}"
            for node in ast.walk(tree)
            if (what := _refused(node, is_command or node in script))
        ]
    return found


def _refused(node: ast.AST, is_command: bool) -> str:
    match node:
        case ast.Global():
            return "global"
        case ast.ImportFrom(names=[ast.alias(name="*")]):
            return "import *"
        case ast.ExceptHandler(type=None):
            return "except without a type"
        case ast.Raise(exc=ast.Name(id=name) | ast.Call(func=ast.Name(id=name))):
            return f"raise {name}" if name in ("Exception", "BaseException") else ""
        case ast.Call(func=ast.Name(id="print"), keywords=keywords) if not is_command:
            return "" if any(k.arg == "file" for k in keywords) else "print() outside a command"
        case ast.Call(func=ast.Name(id="exit" | "quit" as name)) if not is_command:
            return f"{name}() outside a command"
        case ast.Call(func=ast.Attribute(value=ast.Name(id="sys"), attr="exit")) if not is_command:
            return "sys.exit() outside a command"
    return ""


def _is_main_guard(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def _functions(tree: ast.Module) -> Iterator[_Function]:
    return (node for node in ast.walk(tree) if isinstance(node, _Function))


def _all_parameters(function: _Function) -> list[ast.arg]:
    a = function.args
    named = [*a.posonlyargs, *a.args, *a.kwonlyargs]
    if named and named[0].arg in ("self", "cls"):
        named = named[1:]
    return named + [extra for extra in (a.vararg, a.kwarg) if extra]


def _num_parameters(function: _Function) -> int:
    decorators = [d.func if isinstance(d, ast.Call) else d for d in function.decorator_list]
    if any(isinstance(d, ast.Attribute) and d.attr == "command" for d in decorators):
        return 0
    return len(_all_parameters(function))


def test_nothing_is_larger_than_the_limits() -> None:
    assert not too_large(ROOT, *PACKAGES, "tests")


def test_every_public_function_is_annotated() -> None:
    assert not unannotated(ROOT, *PACKAGES)


def test_nothing_refused_is_used() -> None:
    assert not refused(ROOT, *PACKAGES)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\n" * 601, "a.py: 601 lines, at most 600"),
        ("def f():\n" + "    pass\n" * 100, "f has 101 lines, at most 100"),
        ("def f(a, b, c, d, e, *, f, g, h, i): ...\n", "f has 9 parameters, at most 8"),
        ("class A:\n    def f(self, a, b, c, d, e, f, g, *h, **i): ...\n", "f has 9 parameters"),
    ],
)
def test_what_is_too_large_is_found(tmp_path: Path, text: str, message: str) -> None:
    _write(tmp_path, text)
    (found,) = too_large(tmp_path, "trainsys")
    assert message in found


@pytest.mark.parametrize(
    "text",
    [
        "class A:\n    def __init__(self, *, a, b, c, d, e, f, g, h): ...\n",
        "@app.command()\ndef train(a, b, c, d, e, f, g, h, i): ...\n",
        "class A:\n    def f(self, a, b, c, d, e, f, g, h): ...\n",
    ],
)
def test_what_reads_well_is_not_too_large(tmp_path: Path, text: str) -> None:
    _write(tmp_path, text)
    assert not too_large(tmp_path, "trainsys")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def f(a, b: int) -> int: ...", "f: no type for a"),
        ("class A:\n    def f(self, *args: int): ...", "f: no type for result"),
        ("class A:\n    def __init__(self, x): ...", "__init__: no type for x, result"),
    ],
)
def test_a_missing_annotation_is_found(tmp_path: Path, text: str, message: str) -> None:
    _write(tmp_path, text)
    (found,) = unannotated(tmp_path, "trainsys")
    assert message in found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def f():\n    global x", "2: global"),
        ("from os import *", "1: import *"),
        ("try:\n    f()\nexcept:\n    pass", "3: except without a type"),
        ("raise Exception('no')", "1: raise Exception"),
        ("print(1)", "1: print() outside a command"),
        ("import sys\nsys.exit(1)", "2: sys.exit() outside a command"),
    ],
)
def test_what_is_refused_is_found(tmp_path: Path, text: str, message: str) -> None:
    _write(tmp_path, text)
    assert refused(tmp_path, "trainsys") == [f"trainsys/a.py:{message}"]


@pytest.mark.parametrize("name", ["__main__.py", "cli.py", "bench/stall.py"])
def test_commands_may_print_and_exit(tmp_path: Path, name: str) -> None:
    _write(tmp_path, "print(1)\nsys.exit(1)", name)
    assert not refused(tmp_path, "trainsys")


@pytest.mark.parametrize("text", ["if __name__ == '__main__':\n    sys.exit(1)", "print(1, file=stream)"])
def test_a_script_may_exit_and_a_stream_may_be_printed_to(tmp_path: Path, text: str) -> None:
    _write(tmp_path, text)
    assert not refused(tmp_path, "trainsys")


def _write(root: Path, text: str, name: str = "a.py") -> None:
    path = root / "trainsys" / name
    path.parent.mkdir(parents=True)
    path.write_text(text)
