"""Verified, reshardable checkpoints of training state that is spread over ranks; README.md shows how.

`Checkpointer` saves and loads; `read`, `open_checkpoint`, `verify`, `export` and `import_from` need nothing but a path;
every error is a `CheckpointError`.
"""

from checkpoint.access import VerifyReport, read, verify
from checkpoint.catalog import CheckpointInfo
from checkpoint.checkpointer import Checkpointer
from checkpoint.config import CheckpointConfig, MemoryConfig, RemoteConfig
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
    TornSnapshot,
    UnsupportedFormat,
)
from checkpoint.exporting import HuggingFace, export
from checkpoint.handle import SaveHandle, SaveStats
from checkpoint.importing import import_from
from checkpoint.lazy import open_checkpoint
from checkpoint.loading import Loaded
from checkpoint.state import BoxSlice, FlatSlice, LayoutSlice, RankLocal, Replica

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
    "LayoutSlice",
    "Loaded",
    "MemoryConfig",
    "RankLocal",
    "RemoteConfig",
    "Replica",
    "SaveAborted",
    "SaveFailed",
    "SaveHandle",
    "SaveStats",
    "StateMismatch",
    "StorageError",
    "TornSnapshot",
    "UnsupportedFormat",
    "VerifyReport",
    "export",
    "import_from",
    "open_checkpoint",
    "read",
    "verify",
]
