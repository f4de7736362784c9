"""Every row of the table of layouts takes the steps of one process, on DeepSpeed's engine.

Two micro-batches a step, packed documents of uneven length, heads of keys and values that are fewer than query heads,
a tied embedding, a vocabulary and layers that do not divide evenly, dropout where ranks drop what one process drops.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.config import ParallelConfig, StagesConfig
from parallel.legal import ROWS, refusals
from parallel.shards import whole
from tests.ranks import run_ranks
from tests.test_trainsys.layouts import Layout, Report, reference, train_rank
from tests.test_trainsys.test_models_huggingface import write_config

EXPERTS = ("--model.moe.num_experts=4", "--model.moe.ffn_dim=16", "--model.tied_head=false")
"""The balancing loss looks at a whole micro-batch, on whatever ranks its tokens are."""
UNCLIPPED = "--engine.gradient_clip_norm=0"
FOUR_LAYERS = "--model.num_layers=4"


def layout(stage: int, *settings: str, **degrees: Any) -> Layout:
    """In float64 without ZeRO; DeepSpeed's ZeRO keeps fp32 masters, and so is fp32 all through."""
    experts = EXPERTS if degrees.get("expert", 1) > 1 else ()
    # Three layers do not come out even on two stages.
    layers = () if FOUR_LAYERS in settings else (f"--model.num_layers={3 if degrees.get('pipeline', 1) > 1 else 2}",)
    settings = (f"--engine.zero_stage={stage}", *experts, *layers, *settings)
    return Layout(ParallelConfig(**degrees), settings, torch.float32 if stage else torch.float64)


@cache
def expected(settings: tuple[str, ...], dtype: torch.dtype, data_ranks: int) -> Report:
    """One process in the layout's settings, with what `data_ranks` have at once as a micro-batch."""
    kept = tuple(each for each in settings if not each.startswith("--engine.zero_stage"))
    return reference(Layout(ParallelConfig(replicate=data_ranks), (*kept, "--engine.zero_stage=0"), dtype))


def check(layouts: Sequence[Layout]) -> None:
    """Run the layouts one after the other on as many ranks as each needs."""
    reports = run_ranks(train_rank, layouts[0].world_size, list(layouts), timeout_s=60 + 20 * len(layouts))
    for index, each in enumerate(layouts):
        # Only experts' balance depends on what is in a micro-batch together.
        data_ranks = each.degrees.replicate * each.degrees.shard if each.degrees.expert > 1 else 1
        like = expected(each.settings, each.dtype, data_ranks)
        try:
            compare([report[index] for report in reports], like, exact=each.dtype == torch.float64)
        except AssertionError as error:
            raise AssertionError(f"{each.degrees} {each.settings}: {error}") from error


def compare(reports: list[Report], like: Report, *, exact: bool) -> None:
    """All ranks have the same losses and norms, and each its part of the same weights.

    float64 differs by the order of sums. In fp32 that is 1e-7 of a loss and 1e-5 of a norm; AdamW's steps, divided by
    the root of a second moment of few steps, carry the rounding of a gradient into a weight undiminished.
    """
    loss_tolerance, tolerance, weight_tolerance = (1e-12, 1e-12, 1e-11) if exact else (1e-6, 1e-4, 1e-3)
    for report in reports:
        assert report.losses == reports[0].losses
        torch.testing.assert_close(report.losses, like.losses, rtol=loss_tolerance, atol=0)
        torch.testing.assert_close(report.norms, like.norms, rtol=tolerance, atol=0)
        for name, value in report.weights.items():
            shard = report.shards.get(name, whole(value.shape))
            for mine, theirs, _, _ in shard.blocks():
                torch.testing.assert_close(
                    value[mine], like.weights[name][theirs], rtol=weight_tolerance, atol=weight_tolerance, msg=name
                )
    assert set().union(*(report.weights for report in reports)) == set(like.weights)
    assert_replicas_equal(reports)


def assert_replicas_equal(reports: list[Report]) -> None:
    """What several ranks hold of a parameter has the same bits: a gradient that was not reduced shows here."""
    seen: dict[tuple[str, str], torch.Tensor] = {}
    for report in reports:
        for name, value in report.weights.items():
            for mine, theirs, _, _ in report.shards.get(name, whole(value.shape)).blocks():
                first = seen.setdefault((name, str(theirs)), value[mine])
                assert torch.equal(first, value[mine]), f"{name} differs between replicas"


ROWS_TESTED = [
    # 2 ranks
    layout(0, replicate=2),
    layout(0, UNCLIPPED, tensor=2),
    layout(0, pipeline=2),
    layout(0, context=2),
    layout(0, replicate=2, expert=2),
    layout(1, UNCLIPPED, pipeline=2),
    layout(0, "--model.dropout=0.3", "--engine.recompute=full", tensor=2, sequence=False),
    layout(1, tensor=2, sequence=False),
    layout(3, "--model.num_kv_heads=1", context=2, attention="ulysses"),
    layout(1, "--optim.kind=muon", pipeline=2),
    layout(2, "--optim.kind=muon", replicate=2, expert=2),
    # 4 ranks
    layout(0, tensor=2, replicate=2),
    layout(0, pipeline=2, replicate=2),
    layout(0, context=2, replicate=2),
    layout(0, FOUR_LAYERS, pipeline=2, tensor=2, stages=StagesConfig(schedule="zbv")),
    layout(0, context=2, tensor=2),
    layout(0, pipeline=2, context=2),
    layout(0, replicate=4, expert=4, node_size=2),
    layout(0, tensor=2, replicate=2, expert=2),
    layout(0, context=2, replicate=2, expert=2),
    layout(0, UNCLIPPED, pipeline=2, replicate=2, expert=2),
    layout(0, replicate=2, shard=2),
    layout(1, tensor=4),
    layout(1, pipeline=2, shard=2, expert=2),
    layout(2, replicate=4, expert=2),
    layout(2, UNCLIPPED, tensor=2, shard=2),
    layout(3, tensor=2, shard=2),
    # 8 ranks
    layout(0, pipeline=2, tensor=2, replicate=2),
    layout(0, context=2, tensor=2, replicate=2),
    layout(1, pipeline=2, context=2, replicate=2),
    layout(1, pipeline=2, context=2, tensor=2),
    layout(1, pipeline=2, replicate=4, expert=2),
]


def every_cell() -> list[Layout]:
    """Every row of the table under every stage of ZeRO that DeepSpeed runs it with."""
    axes = ("pipeline", "replicate", "shard", "context", "tensor", "expert")
    cells = [(row, stage) for row in ROWS for stage in range(4) if "deepspeed" not in refusals(row, stage)]
    return [layout(stage, **{axis: getattr(row, axis) for axis in axes}) for row, stage in cells]


def huggingface_stages(folder: Path) -> list[Layout]:
    """A Qwen3 and a tied Llama in two stages a rank, the one in a V, the other in a loop."""
    found = []
    for name, kind, extra in (("qwen3", "zbv", ()), ("llama, tied", "interleaved", (UNCLIPPED,))):
        path = write_config(folder / kind, name, num_hidden_layers=5)
        settings = ("--engine.zero_stage=0", "--model.kind=hf", f"--model.path={path}", "--model.vocab_size=0", *extra)
        degrees = ParallelConfig(pipeline=2, stages=StagesConfig(schedule=kind))  # type: ignore[arg-type]
        found.append(Layout(degrees, settings))
    return found


def huggingface_experts(folder: Path) -> Layout:
    """Spread experts of a Qwen3-MoE, in fp32: transformers has no grouped product of float64.

    Its balancing loss is that of a rank's micro-batch, as in any data-parallel run, so it is left out.
    """
    write_config(folder, "qwen3 moe", router_aux_loss_coef=0.0)
    settings = ("--engine.zero_stage=0", "--model.kind=hf", f"--model.path={folder}", "--model.vocab_size=0")
    return Layout(ParallelConfig(replicate=2, expert=2), settings, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_every_row_of_the_table_takes_the_steps_of_one_process(
    world_size: int, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    """With `--every-cell` under all stages of ZeRO, without it under some of each."""
    chosen = [*ROWS_TESTED, *(every_cell() if pytestconfig.getoption("--every-cell") else ())]
    layouts = [each for each in chosen if each.world_size == world_size]
    folders = [huggingface_experts(tmp_path / "experts"), *huggingface_stages(tmp_path)] if world_size == 2 else []
    check([*layouts, *folders])


def test_every_row_of_the_table_is_tested() -> None:
    axes = ("pipeline", "context", "tensor", "expert")

    def kind(degrees: ParallelConfig) -> tuple[Any, ...]:
        data = degrees.replicate * degrees.shard
        hybrid = min(degrees.replicate, degrees.shard) > 1
        return (*(getattr(degrees, axis) for axis in axes), data // degrees.expert, hybrid)

    assert {kind(row) for row in ROWS} <= {kind(each.degrees) for each in ROWS_TESTED}
