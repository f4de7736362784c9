"""A digest of code: results that other code made are no results of this."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable
from pathlib import Path


def code_digest(modules: Iterable[Path], *more: str) -> str:
    """Return the digest of modules and of more text, in every Python the same; comments and docstrings do not count."""
    parts = [*more, *(_meaning(module.read_text(encoding="utf-8")) for module in modules)]
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=8).hexdigest()


def _meaning(source: str) -> str:
    """Return a module's syntax tree as text, without its docstrings and other strings that stand alone."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            kept = [part for part in body if not (isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant))]
            node.body = kept or [ast.Pass()]  # type: ignore[attr-defined]
    return _dumped(tree)


def _dumped(node: object) -> str:
    """As `ast.dump`, without what is empty: by that versions of Python differ."""
    if isinstance(node, ast.AST):
        fields = [(name, value) for name, value in ast.iter_fields(node) if value is not None and value != []]
        return f"{type(node).__name__}({', '.join(f'{name}={_dumped(value)}' for name, value in fields)})"
    return f"[{', '.join(map(_dumped, node))}]" if isinstance(node, list) else repr(node)
