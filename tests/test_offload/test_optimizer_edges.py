"""What is rare around a TieredAdamW: gradients that are missing, steps that are skipped, copies, loads, failures."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from offload.optimizer import TieredAdamW, Tiering
from offload.schedule import Budget, Mode


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


def test_a_skipped_speculative_step_leaves_no_weight_changed_later() -> None:
    parameters = [nn.Parameter(torch.randn(1024)) for _ in range(6)]
    before = [parameter.detach().clone() for parameter in parameters]
    settings = tiering(
        accumulation_steps=1, interleave=1, budget=Budget(device_bytes=3 * 12 * 1024), link_bytes_per_s=2e5
    )
    with TieredAdamW(parameters, mode="spec", lr=0.1, max_norm=1.0, tiering=settings) as optimizer:
        weights = torch.ones(1024)
        weights[0] = float("nan")
        torch.stack([(parameter * weights).sum() for parameter in parameters]).sum().backward()
        optimizer.step()
        optimizer.wait()
        time.sleep(0.3)  # what was given up would have been written by then
        assert optimizer.num_skipped == 1
        assert all(torch.equal(a, b) for a, b in zip(parameters, before, strict=True))
