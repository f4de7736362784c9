"""Offload: tiers of memory beyond the device, and what they cost on this machine."""

from offload.config import OffloadConfig
from offload.cpu import CpuTier
from offload.errors import BlockError, OffloadError, SpecError, TierError, TierFull
from offload.nvme import NvmeTier
from offload.tier import Block, Tier, TierSpec

__all__ = [
    "Block",
    "BlockError",
    "CpuTier",
    "NvmeTier",
    "OffloadConfig",
    "OffloadError",
    "SpecError",
    "Tier",
    "TierError",
    "TierFull",
    "TierSpec",
]
