"""Offload: tiers of memory beyond the device, what they cost on this machine, and what to put where."""

from offload.config import OffloadConfig
from offload.cpu import CpuTier
from offload.cxl import CxlTier
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
