"""What of the code decides a scenario's figures, as a digest: lines that other code wrote are no results of this."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

import trainsys
from faulttol.bench.labels.digest import code_digest

_DECIDING = (
    *(f"bench/swarms/{name}.py" for name in ("alphabet", "attack", "simulation", "stack")),
    *(f"rl/{name}.py" for name in ("advantage", "loss", "questions", "rollout", "schema", "selection", "sharing")),
    *(f"rl/{name}.py" for name in ("stores", "tasks", "validation")),
)


@functools.cache
def code_version() -> str:
    """Return the digest of the deciding modules."""
    root = Path(trainsys.__file__).parent
    return code_digest((root / name for name in _DECIDING), torch.__version__)
