"""What is to run, and what came of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One function to run on every rank."""

    entry: str
    """`package.module:function`, called as `function(context, payload)`; returns a JSON value or None."""
    payload: Mapping[str, Any] = field(default_factory=dict)
    """JSON values only; every rank gets an equal copy."""
    world_size: int = 1
    """Number of ranks; 1 or more."""
    log_dir: Path
    """Folder for `rankN.log`: what rank N printed. Made when absent; logs of an earlier run are replaced."""
    name: str
    """How messages call the job."""

    def check(self) -> None:
        """Raises: ValueError naming every field that no launcher can run."""
        wrong: list[str] = []
        module, colon, function = self.entry.partition(":")
        if not (colon and module and function):
            wrong.append(f"job.entry: {self.entry!r} is not of the form 'package.module:function'")
        if self.world_size < 1:
            wrong.append(f"job.world_size: {self.world_size} is not at least 1")
        try:
            json.dumps(self.payload)
        except (TypeError, ValueError) as error:
            wrong.append(f"job.payload: cannot be written as JSON: {error}")
        if wrong:
            raise ValueError("\n".join(sorted(wrong)))


@dataclass(frozen=True, kw_only=True, slots=True)
class JobResult:
    """How a job ended that did not fail."""

    outcome: Literal["completed", "stopped"]
    """`stopped`: asked to stop, and every rank returned or was killed after the grace period."""
    results: list[Any]
    """What each rank returned; None for a rank that was killed."""
    killed: list[int]
    """Ranks that had not left when the grace period of a stop was over."""
    duration_s: float
    """Seconds from when all ranks were started until all had ended."""
