"""What of the code decides a scenario's figures, as a digest: lines that other code wrote are no results of this."""

from __future__ import annotations

import ast
import functools
import hashlib
from pathlib import Path

import torch

import trainsys

_DECIDING = (
    *(f"bench/swarms/{name}.py" for name in ("alphabet", "attack", "simulation", "stack")),
    *(f"rl/{name}.py" for name in ("advantage", "loss", "questions", "rollout", "schema", "selection", "sharing")),
    *(f"rl/{name}.py" for name in ("stores", "tasks", "validation")),
)


@functools.cache
def code_version() -> str:
    """Return the digest of the deciding modules and of torch's version; comments and docstrings do not count."""
    root = Path(trainsys.__file__).parent
    parts = [torch.__version__, *(meaning((root / name).read_text(encoding="utf-8")) for name in _DECIDING)]
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=8).hexdigest()


def meaning(source: str) -> str:
    """Return a module's syntax tree as text, without its docstrings and other strings that stand alone."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            kept = [part for part in body if not (isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant))]
            node.body = kept or [ast.Pass()]  # type: ignore[attr-defined]
    return ast.dump(tree)
