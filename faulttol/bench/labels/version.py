"""What of the code decides a trial's verdict, as a digest: lines that other rules wrote are no results of these."""

from __future__ import annotations

import functools
from pathlib import Path

import faulttol
from faulttol.bench.labels.digest import code_digest
from faulttol.bench.labels.trial import DETECTOR, HEALTH

_JUDGING = ("agent", "detector", "finding", "health", "history", "localize", "sdc", "view")
_MAKING = ("inject", "sockets", *(f"bench/labels/{name}" for name in ("grid", "jobs", "trial")))


@functools.cache
def code_version() -> str:
    """Return the digest of what judges a trial and of what makes it."""
    root = Path(faulttol.__file__).parent
    names = [
        *(f"{name}.py" for name in (*_JUDGING, *_MAKING)),
        *(f"rules/{p.name}" for p in (root / "rules").glob("*.py")),
    ]
    return code_digest((root / name for name in sorted(names)), repr(DETECTOR), repr(HEALTH))
