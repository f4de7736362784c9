"""Which tests run here: those whose GPUs this machine has."""

from __future__ import annotations

import pytest
import torch


def needs_gpus(count: int) -> list[pytest.MarkDecorator]:
    """Marks of a test that takes `count` GPUs."""
    found = torch.cuda.device_count()
    return [
        pytest.mark.gpu,
        pytest.mark.skipif(found < count, reason=f"needs {count} CUDA device(s), this machine shows {found}"),
    ]
