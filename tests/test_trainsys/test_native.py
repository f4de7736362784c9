"""The engine of torch alone in every layout, against one process that takes whole micro-batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from checkpoint import Checkpointer
from checkpoint.state import pieces_of
from parallel.config import ParallelConfig, StagesConfig
from tests.ranks import RankFailed, run_ranks
from tests.test_trainsys.layouts import Layout, Report, open_layout, reference, take_steps
from tests.test_trainsys.test_models_huggingface import write_config

TORCH = "--engine.backend=torch"


def layout(stage: int, *settings: str, dtype: torch.dtype = torch.float64, **degrees: Any) -> Layout:
    """A layout on torch's engine."""
    return Layout(ParallelConfig(**degrees), (TORCH, f"--engine.zero_stage={stage}", *settings), dtype)


def engine_ranks(rank: int, world_size: int, layouts: list[Layout]) -> list[Any]:
    """Train in each layout; losses, norms and what this rank would save."""
    return [_train(each) for each in layouts]


def _train(each: Layout) -> tuple[list[float], list[float], list[tuple[str, tuple[int, ...], Any, Tensor]]]:
    engine, part = open_layout(each)
    losses, norms = take_steps(engine, each, part, range(1, 11))
    pieces = [(p.name, p.global_shape, p.region, p.tensor.clone()) for p in pieces_of(engine.slices())]
    engine.close()
    part.close()
    part.groups.close()
    return losses, norms, pieces


def whole(reports: list[Any]) -> dict[str, Tensor]:
    """Put everybody's pieces together; equal places must hold equal bits."""
    found: dict[str, Tensor] = {}
    for _, _, pieces in reports:
        for name, shape, region, tensor in pieces:
            into = found.setdefault(name, torch.full(shape, torch.nan, dtype=tensor.dtype))
            box = into[tuple(slice(o, o + n) for o, n in zip(region.offset, region.shape, strict=True))]
            flat = box.reshape(-1).clone()
            there = flat[region.start : region.stop]
            part = tensor.reshape(-1)
            assert ((there == part) | there.isnan()).all(), f"{name} differs between its copies"
            flat[region.start : region.stop] = part
            box.copy_(flat.view(box.shape))
    return found


def assert_equal(reports: list[Any], expected: Report, *, rtol: float = 1e-12) -> None:
    for losses, norms, _ in reports:
        torch.testing.assert_close(losses, expected.losses, rtol=rtol, atol=0)
        torch.testing.assert_close(norms, expected.norms, rtol=rtol, atol=0)
    found = whole(reports)
    for name, value in expected.weights.items():
        # AdamW's step divides by the root of the second moment: elements near zero carry the rounding of larger ones.
        torch.testing.assert_close(found[f"model.{name}"], value, rtol=10 * rtol, atol=10 * rtol, msg=name)


def check(world_size: int, layouts: list[Layout]) -> None:
    """Run the layouts, all of as many ranks; each must take the steps of one process."""
    reports = run_ranks(engine_ranks, world_size, layouts, timeout_s=240)
    for index, each in enumerate(layouts):
        assert_equal([report[index] for report in reports], reference(each))


def test_data_parallel_takes_the_steps_of_one_process() -> None:
    check(
        2,
        [
            layout(0, replicate=2),
            layout(1, shard=2),
            layout(2, replicate=2),
            layout(3, shard=2),
            layout(3, "--engine.recompute=full", shard=2),
            layout(3, "--engine.gradient_clip_norm=0", "--parallel.overlap=false", shard=2),
        ],
    )


def test_pipelines_shard_gradients_and_weights() -> None:
    check(
        2,
        [
            layout(2, pipeline=2),
            layout(0, "--model.tied_head=false", pipeline=2, stages=StagesConfig(schedule="zbv")),
            layout(3, "--model.tied_head=false", pipeline=2, stages=StagesConfig(schedule="zbv")),
        ],
    )


def test_what_a_folders_model_ties_on_one_rank_is_refused_on_every_rank(tmp_path: Path) -> None:
    write_config(tmp_path, "llama, tied", num_hidden_layers=4)
    folder = ("--model.kind=hf", f"--model.path={tmp_path}", "--model.vocab_size=0")
    tied = layout(1, *folder, pipeline=2, stages=StagesConfig(schedule="zbv"))
    with pytest.raises(RankFailed) as caught:
        run_ranks(engine_ranks, 2, [tied], timeout_s=120)
    assert sorted(caught.value.reports) == [0, 1]
    for report in caught.value.reports.values():
        assert "engine.zero_stage: 1: two stages of a rank share causal_lm.model.embed_tokens.weight" in report


def test_pipelines_shard_over_data_ranks() -> None:
    check(
        4,
        [
            layout(3, pipeline=2, shard=2),
            layout(2, pipeline=2, replicate=2, stages=StagesConfig(schedule="zb-h1")),
            layout(0, pipeline=2, replicate=2),
            layout(3, replicate=2, shard=2),
        ],
    )


def test_tensor_and_expert_parallel_parts_are_sharded_again() -> None:
    experts = ("--model.moe.num_experts=4", "--model.moe.ffn_dim=32", "--model.moe.balance_weight=0")
    check(
        4,
        [
            layout(3, tensor=2, shard=2),
            layout(0, tensor=2, replicate=2, sequence=False),
            layout(3, *experts, shard=4, expert=2),
            layout(3, context=2, shard=2),
        ],
    )


def test_pipelines_of_tensor_parallel_stages_are_sharded() -> None:
    check(8, [layout(3, pipeline=2, tensor=2, shard=2)])


def saving_rank(rank: int, world_size: int, each: Layout, folder: str) -> list[float]:
    """Save after step 2 and go on at once; losses of the steps behind the save."""
    engine, part = open_layout(each)
    with Checkpointer(folder, rank=rank, world_size=world_size, run_id="run") as checkpointer:
        engine.fence_with(checkpointer)
        take_steps(engine, each, part, range(1, 3))
        handle = checkpointer.save(2, engine.slices(), shared=engine.counters())
        losses, _ = take_steps(engine, each, part, range(3, 5))
        handle.result()
    return losses


def loading_rank(rank: int, world_size: int, each: Layout, folder: str) -> list[float]:
    """Load what was saved after step 2; losses of the steps behind it."""
    engine, part = open_layout(each)
    with Checkpointer(folder, rank=rank, world_size=world_size, run_id="run") as checkpointer:
        info = checkpointer.latest()
        assert info is not None
        has_all = each.degrees.pipeline == 1  # a stage has no place for what the others hold
        engine.after_load(checkpointer.load(info, engine.slices(), strict=has_all).shared)
        losses, _ = take_steps(engine, each, part, range(3, 5))
    return losses


def move(folder: Path, source: Layout, targets: list[Layout], rtol: float) -> None:
    """What goes on from the checkpoint of one layout in another takes the same steps."""
    expected = run_ranks(saving_rank, source.world_size, source, str(folder), timeout_s=120)[0]
    for target in targets:
        for losses in run_ranks(loading_rank, target.world_size, target, str(folder), timeout_s=120):
            torch.testing.assert_close(losses, expected, rtol=rtol, atol=0)


def test_checkpoints_move_between_layouts(tmp_path: Path) -> None:
    move(tmp_path, layout(3, shard=2), [layout(0), layout(2, pipeline=2)], 1e-12)


def test_checkpoints_move_between_engines(tmp_path: Path) -> None:
    """DeepSpeed keeps masters in fp32, and so all do here; the sums of a step differ in their last bits."""
    for precision, dtype, rtol in (("fp32", torch.float32, 1e-6), ("bf16", torch.bfloat16, 1e-2)):
        settings = ("--engine.backend=deepspeed", "--engine.zero_stage=2", f"--engine.precision={precision}")
        deepspeed = Layout(ParallelConfig(replicate=2), settings, dtype)
        torch_ = layout(3, f"--engine.precision={precision}", dtype=dtype, shard=2)
        move(tmp_path / precision / "there", torch_, [deepspeed], rtol)
        move(tmp_path / precision / "back", deepspeed, [torch_], rtol)
