"""The project's own source files, for the tests that read them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
"""The repository."""
PACKAGES = ("checkpoint", "faulttol", "launch", "offload", "parallel", "trainsys")
"""The packages of the wheel."""


def python_files(root: Path, *folders: str) -> Iterator[tuple[str, ast.Module, str]]:
    """Yield `(path relative to root, syntax tree, text)` of every Python file under the folders, sorted."""
    for folder in folders:
        for path in sorted((root / folder).rglob("*.py")):
            text = path.read_text()
            yield path.relative_to(root).as_posix(), ast.parse(text), text
