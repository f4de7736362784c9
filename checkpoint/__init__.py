"""Verified, reshardable checkpoints of training state that is spread over ranks; README.md shows how.

`Checkpointer` saves and loads; `read`, `open_checkpoint`, `verify`, `export` and `import_from` need nothing but a path;
every error is a `CheckpointError`.
"""

import importlib
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from checkpoint.access import VerifyReport, read, verify
    from checkpoint.catalog import CheckpointInfo
    from checkpoint.checkpointer import Checkpointer
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

_WITH_TORCH = {
    "checkpoint.access": ("VerifyReport", "read", "verify"),
    "checkpoint.catalog": ("CheckpointInfo",),
    "checkpoint.checkpointer": ("Checkpointer",),
    "checkpoint.exporting": ("HuggingFace", "export"),
    "checkpoint.handle": ("SaveHandle", "SaveStats"),
    "checkpoint.importing": ("import_from",),
    "checkpoint.lazy": ("open_checkpoint",),
    "checkpoint.loading": ("Loaded",),
    "checkpoint.state": ("BoxSlice", "FlatSlice", "LayoutSlice", "RankLocal", "Replica"),
}
"""Imported when one of them is asked for: who reads a configuration alone waits for neither torch nor pyarrow."""

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        for module, names in _WITH_TORCH.items():
            if name in names:
                found = globals()[name] = getattr(importlib.import_module(module), name)
                return found
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
