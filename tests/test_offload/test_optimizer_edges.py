"""What is rare around a TieredAdamW: gradients that are missing, steps that are skipped, copies, loads, failures."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from offload.optimizer import TieredAdamW, Tiering
from offload.schedule import Mode


def tiering(**more: object) -> Tiering:
    """Return small settings that need no compiler."""
    return Tiering(kernel="torch", subgroup_numel=1024, num_threads=1, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["stream", "spec"])
def test_an_incomplete_window_is_stepped(mode: Mode) -> None:
    both, once = nn.Parameter(torch.randn(1024)), nn.Parameter(torch.randn(1024))
    expected = [nn.Parameter(parameter.detach().clone()) for parameter in (both, once)]
    plain = torch.optim.AdamW(expected)
    with TieredAdamW([both, once], mode=mode, tiering=tiering(accumulation_steps=2)) as optimizer:
        (both * once).sum().backward()
        (both * both).sum().backward()
        optimizer.step()
        (both * once).sum().backward()  # the last window ends early
        optimizer.step()
        optimizer.wait()
    (expected[0] * expected[1]).sum().backward()
    (expected[0] * expected[0]).sum().backward()
    plain.step()
    plain.zero_grad()
    (expected[0] * expected[1]).sum().backward()
    plain.step()
    torch.testing.assert_close([both.data, once.data], [parameter.data for parameter in expected])
