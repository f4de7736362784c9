"""The note in a run's folder that checkpoints after a step are not to be gone on from, until a new start heeds it.

The launcher writes and reads it as well, which starts no rank before it has imported this: nothing here needs torch.
"""

from __future__ import annotations

import json
import math
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from faulttol.durable import write_whole
from trainsys.errors import RunError

if TYPE_CHECKING:
    import checkpoint as ck
    from trainsys.folder import RunFolder


def distrust(folder: RunFolder, after_step: int, why: str) -> None:
    """Write down, durably, that no checkpoint of a later step is to be gone on from.

    Raises: RunError where an earlier note cannot be read; OSError.
    """
    path = _mark(folder)
    known = _read(path)
    if known is not None:
        after_step = min(after_step, known[0])
    note = json.dumps({"after_step": after_step, "why": why}).encode()
    write_whole(path, note, mark=uuid.uuid4().hex)  # rank 0 and the launcher may both write it


def heed(folder: RunFolder, checkpointer: ck.Checkpointer) -> int:
    """Mark the checkpoints that a `distrust` was about, before any is loaded; return how many there were.

    One rank calls it, when no older generation can commit any more.
    """
    known = _read(_mark(folder))
    if known is None:
        return 0
    count = checkpointer.distrust(*known)
    _mark(folder).unlink()
    return count


def right_until(folder: RunFolder) -> float:
    """Return the last step whose checkpoint may be gone on from, by a `distrust` that nobody has heeded yet."""
    known = _read(_mark(folder))
    return math.inf if known is None else known[0]


def _mark(folder: RunFolder) -> Path:
    return folder.path / "distrusted.json"


def _read(path: Path) -> tuple[int, str] | None:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        return int(known["after_step"]), str(known["why"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{path}: cannot tell from which step on checkpoints are distrusted: {error!r}; remove those that are not "
            "to be gone on from, and this file"
        ) from error
