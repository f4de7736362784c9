"""A run goes on in another layout from what it saved in this one, as if it had never stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist

import checkpoint as ck
from parallel.config import ParallelConfig, StagesConfig
from tests.ranks import run_ranks
from tests.test_trainsys.layouts import Layout, open_layout, reference, take_steps

HALF, STEPS = 5, 10
EXPERTS = ("--model.moe.num_experts=4", "--model.moe.ffn_dim=16", "--model.moe.balance_weight=0")
"""Without the balancing loss, which depends on what is in a micro-batch together."""
TORCH = "--engine.backend=torch"


def layout(stage: int, *settings: str, **degrees: Any) -> Layout:
    settings = (f"--engine.zero_stage={stage}", "--model.num_layers=2", *settings)
    return Layout(ParallelConfig(**degrees), settings, torch.float32)


def save_rank(rank: int, world_size: int, saves: list[tuple[Layout, str]]) -> None:
    """Train the first half in each layout and save it."""
    for each, folder in saves:
        engine, part = open_layout(each)
        take_steps(engine, each, part, range(1, HALF + 1))
        with ck.Checkpointer(Path(folder), rank=rank, world_size=world_size, run_id="run") as checkpointer:
            checkpointer.save(HALF, engine.slices(), shared=engine.counters()).result()
        _close(engine, part)


def load_rank(rank: int, world_size: int, loads: list[tuple[Layout, str]]) -> list[list[float]]:
    """Load what was saved and train the second half in each layout; losses."""
    found = []
    for each, folder in loads:
        engine, part = open_layout(each)
        with ck.Checkpointer(Path(folder), rank=rank, world_size=world_size, run_id="run") as checkpointer:
            info = checkpointer.latest()
            assert info is not None
            engine.after_load(checkpointer.load(info, engine.slices(), fresh=True).shared)
        losses, _ = take_steps(engine, each, part, range(HALF + 1, STEPS + 1))
        found.append(losses)
        _close(engine, part)
    return found


def _close(engine: Any, part: Any) -> None:
    dist.barrier()
    engine.close()
    part.close()
    part.groups.close()


MOVES = [
    (layout(0, tensor=2), layout(1, pipeline=2)),
    (layout(1, pipeline=2, stages=StagesConfig(schedule="zb-h1")), layout(1, replicate=2)),
    (layout(0, *EXPERTS, replicate=2, expert=2), layout(0, *EXPERTS)),
    (layout(2, *EXPERTS, replicate=2), layout(1, *EXPERTS, replicate=2, expert=2)),
    (layout(1, tensor=2, context=2), layout(2, replicate=4)),
    (layout(3, TORCH, shard=2), layout(1, replicate=2)),
    (layout(1, replicate=2), layout(3, TORCH, pipeline=2, shard=2)),
    (layout(3, shard=2), layout(1, tensor=4)),
]
"""To and from 1, 2 and 4 ranks: heads copied to 4 ranks, a tied embedding on two stages, flat ranges of all of them."""


@pytest.mark.slow
def test_a_run_goes_on_in_another_layout(tmp_path: Path) -> None:
    """fp32, whose losses after 10 steps differ by 1e-6 between layouts at most."""
    folders = [str(tmp_path / str(index)) for index in range(len(MOVES))]
    for world_size in sorted({before.world_size for before, _ in MOVES}):
        saves = [(b, f) for (b, _), f in zip(MOVES, folders, strict=True) if b.world_size == world_size]
        run_ranks(save_rank, world_size, saves, timeout_s=240)
    expected = {experts: reference(layout(0, *(EXPERTS if experts else ()))).losses for experts in (False, True)}
    for world_size in sorted({after.world_size for _, after in MOVES}):
        loads = [(a, f) for (_, a), f in zip(MOVES, folders, strict=True) if a.world_size == world_size]
        reports = run_ranks(load_rank, world_size, loads, timeout_s=240)
        for index, (each, _) in enumerate(loads):
            like = expected["--model.moe.num_experts=4" in each.settings][HALF:]
            for report in reports:
                assert report[index] == pytest.approx(like, rel=2e-6), f"to {each.degrees} {each.settings}"
