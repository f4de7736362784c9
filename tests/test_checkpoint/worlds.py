"""Worlds for the tests: states spread over ranks, and ranks that are threads of this process."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from checkpoint import BoxSlice, CheckpointConfig, Checkpointer, FlatSlice, RankLocal
from checkpoint.layout import Layout, blocks

SHAPE = (60, 7)
"""Shape of the sliced tensors of `state`."""


def ranks(world_size: int, fn: Callable[[int], Any]) -> list[Any]:
    """Return `[fn(rank) for every rank]`, run at once on threads; raise the first rank's error."""
    with ThreadPoolExecutor(world_size) as pool:
        futures = [pool.submit(fn, rank) for rank in range(world_size)]
        return [future.result(60) for future in futures]


def values(seed: int = 0) -> dict[str, torch.Tensor]:
    """Return the whole tensors behind `state`."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "flat": torch.randn(SHAPE, generator=generator),
        "box": torch.randn(SHAPE, generator=generator).to(torch.bfloat16),
        "whole": torch.randn(5, 3, generator=generator, dtype=torch.float64),
        "scalar": torch.tensor(seed),
        "empty": torch.empty(0, 3),
    }


def bounds(total: int, rank: int, world_size: int) -> tuple[int, int]:
    """Return rank's share [start, stop) of `total`, uneven where it does not divide."""
    return total * rank // world_size, total * (rank + 1) // world_size


def state(whole: Mapping[str, torch.Tensor], rank: int, world_size: int) -> dict[str, Any]:
    """Return rank's part: `flat` split by elements, `box` by columns, the rest replicated, `rng` its own."""
    start, stop = bounds(whole["flat"].numel(), rank, world_size)
    left, right = bounds(SHAPE[1], rank, world_size)
    return {
        "flat": FlatSlice(whole["flat"].flatten()[start:stop].clone(), SHAPE, start),
        "box": BoxSlice(whole["box"][:, left:right], SHAPE, (0, left)),
        "whole": whole["whole"].clone(),
        "scalar": whole["scalar"].clone(),
        "empty": whole["empty"].clone(),
        "rng": RankLocal(torch.full((4,), rank, dtype=torch.uint8)),
    }


def local_part(whole: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Return the local tensor of a layout, -7 where it is padding."""
    found = torch.full([dim.local_size for dim in layout], -7, dtype=whole.dtype)
    for block in blocks(layout):
        here = tuple(slice(o, o + n) for o, n in zip(block.local, block.shape, strict=True))
        there = tuple(slice(o, o + n) for o, n in zip(block.offset, block.shape, strict=True))
        found[here] = whole[there]
    return found


def blank(rank: int, world_size: int) -> dict[str, Any]:
    """Return destinations for `state`, filled with what no state holds."""
    return state({name: torch.full_like(tensor, -9) for name, tensor in values().items()}, rank, world_size)


def saved_by(root: Path | str, world_size: int, step: int = 1, *, seed: int = 0, run_id: str = "run") -> None:
    """Save `state(values(seed))` once."""

    def save(rank: int) -> None:
        config = CheckpointConfig(commit_timeout_s=20, keep_last=9)
        with Checkpointer(root, config=config, rank=rank, world_size=world_size, run_id=run_id) as ck:
            whole = values(seed)
            ck.save(step, state(whole, rank, world_size), {"rank": rank}, shared={"seed": seed})

    ranks(world_size, save)


def tensor_of(value: Any) -> torch.Tensor:
    """Return the tensor inside an entry of a state."""
    return value if isinstance(value, torch.Tensor) else value.tensor


def same(left: Mapping[str, Any], right: Mapping[str, Any]) -> bool:
    """Whether two parts hold bit-equal tensors under the same names."""
    return left.keys() == right.keys() and all(
        torch.equal(tensor_of(left[name]), tensor_of(right[name])) for name in left
    )


def wait_until(true: Callable[[], bool], timeout_s: float = 20) -> None:
    """Return when `true()` is, looking often."""
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.001)
