"""Replicas that stream the same layers take the steps of one process, and hold the same bits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.test_trainsys.layouts import Layout
from tests.test_trainsys.test_native import check, layout, move

MOE = ("--model.moe.num_experts=4", "--model.moe.ffn_dim=32", "--model.moe.balance_weight=0")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The reference is small: a second thread of torch's only waits for the ranks."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def streamed(*settings: str, **layout_of: Any) -> Layout:
    small = ("--model.num_layers=2", "--offload.window_layers=1")
    return layout(0, "--offload.parameters=streamed", *small, *settings, **layout_of)


def test_streamed_replicas_take_the_steps_of_one_process_and_hold_equal_bits() -> None:
    """In float64 within 1e-12, with two micro-batches a rank, with and without clipping, and with unused experts."""
    check(
        2,
        [
            streamed("--engine.gradient_clip_norm=0", "--engine.recompute=full", replicate=2),
            streamed(*MOE, replicate=2),
        ],
    )


def test_streamed_replicas_go_on_with_any_other_number_of_ranks(tmp_path: Path) -> None:
    move(tmp_path, streamed(replicate=2), [streamed(), layout(3, "--model.num_layers=2", shard=2)], 1e-12)
