"""What folders and files of a checkpoint are called; who looks for them on a disk needs neither torch nor pyarrow."""

from __future__ import annotations

import re
from dataclasses import dataclass

import xxhash

COMMIT = "COMMIT.json"
ABORT = "ABORT.json"
TABLE = "slices.arrow"
PARTS = "parts"
REMOVAL = "REMOVAL.json"
"""In a folder: it is being removed, or much of it, by somebody who has looked for references to it; none may follow."""
MARK = "BAD.json"
"""Written beside a commit record by a rank that found the checkpoint damaged, or learned that it is wrong."""
ATTEMPT_NAME = re.compile(r"step-([0-9]{8,18})\.a([0-9]{1,9})\.([0-9a-f]{16})")
"""A folder of an attempt: step, ordinal, digest of the launch's run_id."""


@dataclass(frozen=True, slots=True)
class AttemptName:
    """Names one attempt at saving one step."""

    step: int
    ordinal: int
    launch: str
    """Digest of the launch's run_id."""

    @classmethod
    def of(cls, step: int, ordinal: int, run_id: str) -> AttemptName:
        return cls(step, ordinal, xxhash.xxh3_64_hexdigest(run_id.encode()))

    @classmethod
    def parse(cls, folder: str) -> AttemptName | None:
        """Return the attempt a folder's name stands for; None if it is no attempt's."""
        match = ATTEMPT_NAME.fullmatch(folder)
        return cls(int(match[1]), int(match[2]), match[3]) if match else None

    @property
    def folder(self) -> str:
        return f"step-{self.step:08d}.a{self.ordinal}.{self.launch}"
