"""Where training state lives when it does not fit on the device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class OffloadConfig:
    """Who keeps optimizer states, parameters and activations away from the device, and how much it keeps."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = {"extra": "forbid", "strict": True}

    optimizer: Literal["none", "deepspeed_cpu", "deepspeed_nvme", "tiered"] = "none"
    """fp32 master weights and AdamW's moments: on the device; in CPU memory or on a disk by DeepSpeed (which updates
    them after backward); `tiered`: in CPU memory and what it does not hold on a disk, updated on whichever of CPU and
    GPU is sooner done, under the next forward."""
    parameters: Literal["none", "deepspeed_cpu", "deepspeed_nvme", "streamed"] = "none"
    """Weights: on the device; in CPU memory or on a disk by DeepSpeed's ZeRO 3; `streamed`: in CPU memory with their
    gradients and optimizer states, a window of layers on the device."""
    activations: Literal["none", "recompute", "swap", "auto"] = "none"
    """What blocks save for backward: kept as engine.recompute says; computed again (engine.recompute = full); swapped
    to CPU memory; `auto`: each block one of these three, by measured times."""
    nvme_dir: str = ""
    """Folder on the disk for what goes there; needed by the deepspeed_nvme values, and by optimizer = tiered with
    host_bytes."""
    host_bytes: int = 0
    """optimizer = tiered: CPU memory for states, the rest goes to nvme_dir; 0: all of them in CPU memory."""
    device_bytes: int = 0
    """optimizer = tiered: GPU memory for states that stay or pass through. parameters = streamed: GPU memory for
    everything but activations, which decides the window. 0: 2 GiB, and a window of `window_layers`."""
    window_layers: int = 3
    """parameters = streamed without device_bytes: layers on the device at once; two or more hide transfers."""
