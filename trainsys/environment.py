"""What this machine and installation are: versions, devices, and the file each package came from."""

from __future__ import annotations

import importlib
import os
import platform

from trainsys.folder import versions

_PACKAGES = ("trainsys", "parallel", "checkpoint", "offload", "faulttol", "launch")


def describe() -> str:
    """Return a report of a line a fact, for a bug report."""
    import torch

    from faulttol.compiled import built
    from trainsys.precision import ability_of

    lines = [f"{name:<13}{version}" for name, version in versions().items()]
    lines.append(f"{'machine':<13}{platform.machine()}, {os.cpu_count()} CPUs, {_memory_gib():.1f} GiB memory")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        lines.append(f"{f'cuda:{index}':<13}{properties.name}, {properties.total_memory / 2**30:.1f} GiB")
    if not torch.cuda.device_count():
        lines.append(f"{'cuda':<13}none")
    does = "multiplies" if ability_of(torch.device("cpu")).multiplies_bf16 else "does not multiply"
    lines.append(f"{'cpu':<13}{does} bf16 in hardware")
    path = built()
    recorder = f"in C++, {path}" if path else "in Python; python -m faulttol build makes it cheaper on CPUs"
    lines.append(f"{'recorder':<13}{recorder}")
    lines += [f"{name:<13}{importlib.import_module(name).__file__}" for name in _PACKAGES]
    return "\n".join(lines)


def _memory_gib() -> float:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
