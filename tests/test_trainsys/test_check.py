"""Conflicts between settings, and the exact words for each."""

from __future__ import annotations

import pytest

from trainsys import ConfigError, recipe
from trainsys.check import accumulation_steps, check, num_ranks


def problems(*overrides: str, world_size: int | None = None) -> list[str]:
    resolved = recipe.load(["tiny"], overrides)
    try:
        check(resolved.config, world_size=world_size, sources=resolved.sources)
    except ConfigError as error:
        return error.problems
    return []


@pytest.mark.parametrize("name", sorted(recipe.shipped()))
def test_every_shipped_recipe_holds_together(name: str) -> None:
    check(recipe.load([name]).config)


def test_ranks_and_accumulation_follow_from_the_degrees() -> None:
    config = recipe.load(
        ["tiny"], ["--parallel.replicate=2", "--batch.global_sequences=24", "--batch.micro_sequences=4"]
    ).config
    assert num_ranks(config.parallel) == 2
    assert accumulation_steps(config) == 3


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["--engine.device=cuda"],
            "command line: engine.device: 'cuda' under Ray needs GPUs reserved for every rank: "
            "--launch.gpus_per_rank=1",
        ),
        (
            ["--checkpoint.staging_bytes=1000"],
            "command line: checkpoint.staging_bytes: 1000 is out of range; allowed: 'auto', or 67108864 (64 MiB) "
            "or more",
        ),
        (
            ["--checkpoint.every=10", "--checkpoint.remote.url=s3://b/r", "--checkpoint.remote.every=25"],
            "command line: checkpoint.remote.every: 25 is not a multiple of checkpoint.every (10); only what was saved "
            "is copied",
        ),
        (
            ["--batch.global_sequences=20"],
            "command line: batch.global_sequences: 20 is not a multiple of micro_sequences x data ranks (4 x 2 = 8)",
        ),
        (
            ["--engine.zero_stage=0", "--engine.precision=bf16", "--engine.backend=deepspeed"],
            "command line: engine.backend: DP with ZeRO 0 does not run on deepspeed: its ZeRO 0 is numerically wrong "
            "in bf16; allowed: torch",
        ),
        (
            ["--engine.precision=fp16", "--engine.device=cpu"],
            "command line: engine.precision: fp16 does not train on CPU; use bf16 or fp32",
        ),
        (
            ["--parallel.tensor=2"],
            "tiny.toml: optim.kind: muon orthogonalises whole matrices, which parallel.tensor shares out; allowed: "
            "adamw",
        ),
        (["--parallel.tensor=4"], "tiny.toml: model.num_heads: 6 is not a multiple of parallel.tensor (4)"),
        (
            ["--parallel.tensor=2", "--data.sequence_length=255"],
            "command line: data.sequence_length: 255 is not a multiple of context x tensor ranks (1 x 2), which share "
            "it with parallel.sequence",
        ),
        (
            ["--parallel.context=3", "--data.sequence_length=256"],
            "command line: data.sequence_length: 256 is not a multiple of 2 x parallel.context (6)",
        ),
        (
            ["--parallel.context=4", "--parallel.attention=ulysses"],
            "command line: parallel.attention: ulysses cannot share 6 query and 2 key and value heads among context x "
            "tensor ranks (4 x 1), which must divide the query heads, and divide or be a multiple of the others; "
            "allowed: ring",
        ),
        (
            ["--parallel.expert=2"],
            "command line: parallel.expert: 2: the model has no experts; allowed: 1",
        ),
        (
            ["--parallel.expert=2", "--parallel.node_size=3", "--model.moe.num_experts=4"],
            "command line: parallel.node_size: 3 of the 2 ranks that share experts; "
            "allowed: with expert > 1 a divisor, or 0",
        ),
        (
            ["--parallel.expert=2", "--model.moe.num_experts=3"],
            "command line: model.moe.num_experts: 3 is not a multiple of expert x tensor ranks (2 x 1)",
        ),
        (["--parallel.expert=4"], "command line: parallel.expert: 4 does not divide replicate x shard (2)"),
        (
            ["--parallel.pipeline=8"],
            "command line: parallel.pipeline: 8 stages for 6 layers (model.num_layers); one each",
        ),
        (
            ["--parallel.pipeline=2", "--parallel.stages.layers=[4, 1]"],
            "command line: parallel.stages.layers: [4, 1] is not 2 stages with 6 layers together",
        ),
        (
            ["--parallel.pipeline=2", "--engine.backend=deepspeed"],
            "command line: engine.backend: PP x DP with ZeRO 2 does not run on deepspeed: it reduces gradients in each "
            "backward under ZeRO 2 and 3, many times a step with a pipeline; allowed: torch",
        ),
        (
            ["--parallel.pipeline=2", "--offload.optimizer=deepspeed_cpu"],
            "tiny.toml: engine.zero_stage: PP x DP with ZeRO 2 does not run on deepspeed: it reduces gradients in each "
            "backward under ZeRO 2 and 3, many times a step with a pipeline; torch: DeepSpeed's offload is DeepSpeed's",
        ),
        (
            ["--parallel.replicate=2", "--parallel.shard=2", "--engine.backend=deepspeed"],
            "command line: engine.backend: hybrid-sharded DP with ZeRO 2 does not run on deepspeed: its ZeRO shards "
            "over all data ranks, not over shard alone; allowed: torch",
        ),
        (
            ["--model.dim=100"],
            "command line: model.dim: 100 is not a multiple of 2 x num_heads (6); or set head_dim",
        ),
        (
            ["--model.num_kv_heads=4"],
            "command line: model.num_kv_heads: 4 does not divide num_heads (6)",
        ),
        (
            ["--model.moe.num_experts=2", "--model.moe.top_k=3"],
            "command line: model.moe.top_k: 3 is out of range; allowed: 1 to num_experts (2)",
        ),
        (
            ["--model.kind=hf"],
            "default: model.path: missing; kind = 'hf' needs a folder with config.json",
        ),
        (["--steps=0"], "command line: steps: 0 is out of range; allowed: 1 or more"),
        (["--optim.beta1=1.5"], "command line: optim.beta1: 1.5 is out of range; allowed: 0 to 1"),
        (["--optim.lr=inf"], "command line: optim.lr: infinity is no setting; give a number"),
        (["--optim.lr=nan"], "command line: optim.lr: nan is out of range; allowed: 0 or more"),
        (["--name=a/b"], "command line: name: 'a/b' cannot name a folder; give a text without '/'"),
        (["--name=.."], "command line: name: '..' cannot name a folder; give a text without '/'"),
        (
            ["--seed=9223372036854775808"],
            "command line: seed: 9223372036854775808 is out of range; allowed: 0 to 2^63 - 1",
        ),
        (
            ["--data.validation_fraction=0"],
            "command line: data.validation_fraction: 0 holds nothing out to evaluate on; set evaluation.sequences = 0 "
            "as well",
        ),
        (
            ["--schedule.warmup_steps=500"],
            "command line: schedule.warmup_steps: 500 does not fit a cosine run of 100 steps; allowed: 0 to 99",
        ),
        (
            ["--profile.start_step=500"],
            "command line: profile.start_step: 500 lies behind the last step (100)",
        ),
        (
            ["--launch.frozen_timeout_s=1"],
            "command line: launch.frozen_timeout_s: 1 s is under four heartbeats (faulttol.heartbeat_interval_s = "
            "0.5 s)",
        ),
    ],
)
def test_a_conflict_gets_one_line(overrides: list[str], expected: str) -> None:
    found = problems(*overrides, "--steps=100") if "--steps=0" not in overrides else problems(*overrides)
    assert expected in found


def test_ulysses_takes_fewer_key_heads_than_ranks() -> None:
    heads = ("--model.num_heads=8", "--model.num_kv_heads=2", "--optim.kind=adamw", "--parallel.attention=ulysses")
    assert problems(*heads, "--parallel.context=4") == []
    assert problems(*heads, "--parallel.context=2", "--parallel.tensor=4") == []
    assert any(
        "ulysses cannot share" in line for line in problems(*heads, "--parallel.context=8", "--parallel.tensor=2")
    )


def test_an_embedding_tied_inside_a_rank_is_left_to_deepspeed() -> None:
    """The V schedules put the first and the last stage on one rank."""
    v = ("--parallel.pipeline=2", "--parallel.stages.schedule=zbv", "--optim.kind=adamw")
    assert problems(*v, "--engine.zero_stage=1", "--model.tied_head=true") == []
    (found,) = problems(*v, "--engine.zero_stage=2", "--model.tied_head=true")
    assert "torch: FSDP2 cannot shard an embedding that is the head" in found
    assert problems(*v, "--engine.zero_stage=2", "--model.tied_head=false") == []


def test_the_number_of_ranks_must_be_the_product_of_the_degrees() -> None:
    assert problems(world_size=1) == [
        "config: parallel: degrees multiply to 2 but there is 1 rank; set --parallel.replicate=1, or start the ranks "
        "with `trainsys launch`"
    ]
    assert problems("--parallel.replicate=1", world_size=1) == []


def test_all_conflicts_are_reported_at_once() -> None:
    assert len(problems("--model.dim=100", "--batch.global_sequences=20", "--optim.beta2=2")) == 3


def test_offload_needs_sharded_state() -> None:
    found = problems("--offload.optimizer=deepspeed_cpu", "--engine.zero_stage=0")
    assert any("offload.optimizer" in line for line in found)
    assert not problems("--offload.optimizer=deepspeed_cpu", "--engine.zero_stage=1")
