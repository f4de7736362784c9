"""What launch raises.

LaunchError
├── RankFailed          a rank raised, died, froze, hung or never joined; the run is over, every rank is gone
├── PlacementError      the cluster cannot hold the ranks
├── ClusterError        no Ray answers at an address, or it cannot be used from here
│   └── TokenError      Ray's authentication token is missing or wrong
└── JobNotFound         the cluster knows no job of that id
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

Reason = Literal["raised", "died", "frozen", "hung", "never joined"]

_LINES = 80  # of its log that a report shows of the rank at fault
_OTHER_LINES = 12  # and of each other rank


class LaunchError(RuntimeError):
    """Base of every error of this package."""


class PlacementError(LaunchError):
    """The cluster cannot hold the ranks; the message has the demand and what there is."""


class ClusterError(LaunchError):
    """No Ray answers at an address, or it cannot be used from here."""


class TokenError(ClusterError):
    """Ray's authentication token is missing or wrong; the message says how to provide it."""


class JobNotFound(LaunchError):
    """The cluster knows no job of that id."""


@dataclass(frozen=True, slots=True)
class RankNote:
    """What a failure report says of one rank."""

    rank: int
    summary: str
    """One line: where it was, or how it ended."""
    traceback: str
    """Empty unless it raised."""
    log: str
    """Path of its log file."""
    log_tail: str


class RankFailed(LaunchError):
    """A rank raised, died, froze, hung or never joined; by now every rank is gone.

    `str()` has that rank first, with its traceback and the end of its log, then all others.
    """

    def __init__(
        self,
        *,
        job_name: str,
        rank: int,
        reason: Reason,
        exit_code: int | None,
        signal: int | None,
        notes: Sequence[RankNote],
    ) -> None:
        first = next(note for note in notes if note.rank == rank)
        self.rank = rank
        self.reason: Reason = reason
        self.exit_code = exit_code
        """Of the process, where it ended by itself and its launcher could see it."""
        self.signal = signal
        """That killed the process, likewise."""
        self.traceback = first.traceback
        self.log = first.log
        """Path of its log file, which has the traceback too."""
        self.log_tails: Mapping[int, str] = {note.rank: note.log_tail for note in notes}
        lines = [f"{job_name}: rank {rank} of {len(notes)}: {first.summary}", *_tell(first)]
        for note in notes:
            if note is not first:
                lines += [f"rank {note.rank}: {note.summary}", *_excerpt(note, _OTHER_LINES)]
        super().__init__("\n".join(lines))


def _tell(note: RankNote) -> list[str]:
    """The traceback and the end of the log, which holds the traceback once more and is spared it here."""
    told = note.traceback.rstrip()
    if not told:
        return _excerpt(note, _LINES)
    rest = replace(note, log_tail=note.log_tail.replace(told, "(the traceback above)"))
    return [told, *_excerpt(rest, _LINES)]


def _excerpt(note: RankNote, num_lines: int) -> list[str]:
    if not note.log_tail.strip():
        return [f"  ({note.log} is empty)"]
    lines = note.log_tail.rstrip().splitlines()[-num_lines:]
    return [f"  --- end of {note.log}", *(f"  | {line}" for line in lines)]
