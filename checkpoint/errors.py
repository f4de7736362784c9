"""Everything this package raises, as a tree.

CheckpointError
├── InvalidState         the tensors or objects handed to save or load cannot be what they claim (also a ValueError)
├── CheckpointNotFound   nothing committed at that place (also a FileNotFoundError)
├── CorruptCheckpoint    bytes are not the bytes that were committed
├── UnsupportedFormat    written by a version of the format that this code does not know
├── StateMismatch        checkpoint and destination differ in names, shapes or dtypes (also a ValueError)
├── UntrustedPickle      reading a foreign checkpoint would run code that it names
├── StorageError         the storage refused a read or a write (carries the OSError)
└── SaveFailed           one save did not become a checkpoint; earlier checkpoints are untouched
    ├── CoverageError    the ranks' slices leave holes, overlap, or disagree about a tensor
    ├── CommitTimeout    a rank did not vote, or rank 0 did not commit, in time
    ├── TornSnapshot     tensors changed while they were being copied; names them
    ├── SaveAborted      another rank failed; names it
    └── SaveSkipped      saves before it were still under way, and on_pressure is skip
"""

from __future__ import annotations


class CheckpointError(Exception):
    """Root of the errors of this package."""


class InvalidState(CheckpointError, ValueError):
    """The tensors or objects handed over cannot be saved, or cannot be loaded into."""


class CheckpointNotFound(CheckpointError, FileNotFoundError):
    """There is no committed checkpoint at the place that was named."""

    def __str__(self) -> str:
        return str(self.args[0])


class CorruptCheckpoint(CheckpointError):
    """Bytes of a committed checkpoint are missing or are not the ones that were committed."""


class UnsupportedFormat(CheckpointError):
    """The checkpoint has a format version that this code does not know."""


class StateMismatch(CheckpointError, ValueError):
    """Names, shapes or dtypes of the checkpoint and of the destination differ."""


class UntrustedPickle(CheckpointError):
    """Reading it means to unpickle, and so to run, what it names; only the caller can say that it may be trusted."""


class StorageError(CheckpointError):
    """The storage refused a read or a write; `__cause__` is its own error."""


class SaveFailed(CheckpointError):
    """A save did not become a checkpoint; the checkpoints before it are untouched."""


class CoverageError(SaveFailed):
    """The slices of all ranks do not hold every element of every tensor exactly once."""


class CommitTimeout(SaveFailed):
    """Somebody did not vote or commit in time."""

    def __init__(self, message: str, missing_ranks: tuple[int, ...]) -> None:
        super().__init__(message)
        self.missing_ranks = missing_ranks
        """Ranks that were waited for, ascending."""


class TornSnapshot(SaveFailed):
    """Tensors were mutated before their copies were over: no fence stood before the update, or it was bypassed."""

    def __init__(self, message: str, names: tuple[str, ...]) -> None:
        super().__init__(message)
        self.names = names
        """Tensors seen to have changed, sorted."""


class SaveAborted(SaveFailed):
    """Another rank failed, so this save is not committed anywhere."""

    def __init__(self, message: str, rank: int) -> None:
        super().__init__(message)
        self.rank = rank
        """The rank that failed first."""


class SaveSkipped(SaveFailed):
    """Nothing of this step is saved: a rank still had too many saves under way, and `on_pressure` is `skip`."""
