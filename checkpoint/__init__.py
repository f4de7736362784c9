"""Verified, reshardable checkpoints of training state that is spread over ranks; README.md shows how.

`Checkpointer` saves and loads, `read`, `verify` and `export` need nothing but a path, and every error is a
`CheckpointError`.
"""

from checkpoint.access import VerifyReport, read, verify
from checkpoint.catalog import CheckpointInfo
from checkpoint.checkpointer import Checkpointer, Loaded
from checkpoint.config import CheckpointConfig
from checkpoint.errors import (
    CheckpointError,
    CheckpointNotFound,
    CommitTimeout,
    CorruptCheckpoint,
    CoverageError,
    InvalidState,
    SaveAborted,
    SaveFailed,
    StateMismatch,
    StorageError,
    UnsupportedFormat,
    UntrustedPickle,
)
from checkpoint.exporting import HuggingFace, export
from checkpoint.handle import SaveHandle, SaveStats
from checkpoint.importing import import_from
from checkpoint.state import BoxSlice, FlatSlice, RankLocal

__all__ = [
    "BoxSlice",
    "CheckpointConfig",
    "CheckpointError",
    "CheckpointInfo",
    "CheckpointNotFound",
    "Checkpointer",
    "CommitTimeout",
    "CorruptCheckpoint",
    "CoverageError",
    "FlatSlice",
    "HuggingFace",
    "InvalidState",
    "Loaded",
    "RankLocal",
    "SaveAborted",
    "SaveFailed",
    "SaveHandle",
    "SaveStats",
    "StateMismatch",
    "StorageError",
    "UnsupportedFormat",
    "UntrustedPickle",
    "VerifyReport",
    "export",
    "import_from",
    "read",
    "verify",
]
