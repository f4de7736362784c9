"""What of the code decides a trial's verdict, as a digest: lines that other rules wrote are no results of these."""

from __future__ import annotations

import ast
import functools
import hashlib
from pathlib import Path

import torch

import faulttol
from faulttol.bench.labels.trial import DETECTOR, HEALTH

_JUDGING = ("detector", "finding", "health", "history", "localize", "sdc", "view")
_MAKING = ("inject", "sockets", *(f"bench/labels/{name}" for name in ("grid", "jobs", "trial")))


@functools.cache
def code_version() -> str:
    """Return the digest of what judges a trial and of what makes it; comments and docstrings do not count."""
    root = Path(faulttol.__file__).parent
    names = [
        *(f"{name}.py" for name in (*_JUDGING, *_MAKING)),
        *(f"rules/{p.name}" for p in (root / "rules").glob("*.py")),
    ]
    meanings = [meaning((root / name).read_text(encoding="utf-8")) for name in sorted(names)]
    parts = [torch.__version__, repr(DETECTOR), repr(HEALTH), *meanings]
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
