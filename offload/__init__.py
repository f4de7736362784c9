"""Offload: tiers of memory beyond the device, what they cost on this machine, and what to put where."""

import importlib
from typing import TYPE_CHECKING, Any

from offload.config import OffloadConfig
from offload.errors import (
    BlockError,
    BudgetError,
    Corrupted,
    KernelError,
    OffloadError,
    OptimizerError,
    PlacementError,
    SpecError,
    TierError,
    TierFull,
)

if TYPE_CHECKING:
    from offload.cpu import CpuTier
    from offload.cxl import CxlTier
    from offload.gpu import GpuTier
    from offload.nvme import NvmeTier
    from offload.optimizer import TieredAdamW, Tiering
    from offload.schedule import Budget, Rates
    from offload.striped import StripedTier
    from offload.tier import Block, Tier, TierSpec
    from offload.tracing import Trace

__all__ = [
    "Block",
    "BlockError",
    "Budget",
    "BudgetError",
    "Corrupted",
    "CpuTier",
    "CxlTier",
    "GpuTier",
    "KernelError",
    "NvmeTier",
    "OffloadConfig",
    "OffloadError",
    "OptimizerError",
    "PlacementError",
    "Rates",
    "SpecError",
    "StripedTier",
    "Tier",
    "TierError",
    "TierFull",
    "TierSpec",
    "TieredAdamW",
    "Tiering",
    "Trace",
]

_WITH_TORCH = {
    "offload.cpu": ("CpuTier",),
    "offload.cxl": ("CxlTier",),
    "offload.gpu": ("GpuTier",),
    "offload.nvme": ("NvmeTier",),
    "offload.optimizer": ("TieredAdamW", "Tiering"),
    "offload.schedule": ("Budget", "Rates"),
    "offload.striped": ("StripedTier",),
    "offload.tier": ("Block", "Tier", "TierSpec"),
    "offload.tracing": ("Trace",),
}
"""Imported when one of them is asked for: who reads a configuration alone does not wait for torch."""

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        for module, names in _WITH_TORCH.items():
            if name in names:
                found = globals()[name] = getattr(importlib.import_module(module), name)
                return found
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
