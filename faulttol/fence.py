"""The fence between generations of a job: what a rank of an older generation may no longer do.

Whoever re-forms a job writes the number of the new generation into a file that all its machines see, before any
survivor goes on. A rank that comes back to life afterwards (it was stopped, swapped out, cut off) finds another number
than its own there and must not commit a checkpoint or write a record any more. Looking costs one small read.
"""

from __future__ import annotations

from pathlib import Path

from faulttol.durable import write_whole
from faulttol.errors import FaultTolError


class Fenced(FaultTolError):
    """This process belongs to a generation of the job that is over; it may write nothing."""


class Fence:
    """One generation's right to write; hand `check` to whatever must not be done by an older generation."""

    def __init__(self, path: Path, generation: int) -> None:
        self.path = path
        self.generation = generation

    def check(self) -> None:
        """Return if this generation is the current one.

        Raises: Fenced if it is not, or if nobody can tell: the file is unreadable.
        """
        try:
            current = current_generation(self.path)
        except (OSError, ValueError) as error:
            raise Fenced(f"{self.path}: cannot tell the current generation of the job: {error}") from error
        if current != self.generation:
            raise Fenced(
                f"{self.path}: generation {self.generation} is over, the job is in generation {current}; "
                "this process may write nothing any more"
            )


def publish(path: Path, generation: int) -> None:
    """Make `generation` the current one, durably; what older ones do after this returns is refused."""
    write_whole(path, f"{generation}\n".encode("ascii"))


def current_generation(path: Path) -> int:
    """Return the number that was published last. Raises: OSError, ValueError."""
    return int(path.read_text(encoding="ascii"))
