"""What must hold between the values of a RunConfig: ranges, and conflicts across sections."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import get_args

from faulttol.config import CorruptionConfig
from parallel import legal
from parallel.config import ParallelConfig
from parallel.errors import ParallelError
from parallel.mesh import Axis
from parallel.moe_config import size_problems
from parallel.pipeline import build, num_stages
from trainsys import offloading, schedule
from trainsys.config import RunConfig
from trainsys.errors import ConfigError
from trainsys.offloading import engine_refusals
from trainsys.precision import outcomes
from trainsys.rl.check import problems as rl_problems

Problem = tuple[str, str]
"""(dotted key, what is wrong; what is allowed)."""

_MIN_STAGING_BYTES = 64 << 20


def check(config: RunConfig, *, world_size: int | None = None, sources: Mapping[str, str] | None = None) -> None:
    """Raise if values contradict each other, or the number of ranks when `world_size` is given: ranks already run.

    Raises:
        ConfigError: every problem at once, each with the source of the value it names.
    """
    found = dict.fromkeys(problem for one in outcomes(config) for problem in _problems(one, world_size))
    known = sources or {}
    if found:
        raise ConfigError(f"{known.get(key, 'config')}: {key}: {message}" for key, message in found)


def _problems(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    yield from _ranges(config)
    yield from _model(config)
    yield from _parallel(config, world_size)
    yield from _batch(config)
    yield from _engine(config)
    yield from _checkpoint(config)
    yield from rl_problems(config)
    yield from _faulttol(config)
    yield from _corruption(config)
    if world_size is None:
        yield from _launch(config)
    yield from (_split(problem) for problem in schedule.check(config.schedule, config.steps))


def _split(problem: str) -> Problem:
    key, _, message = problem.partition(": ")
    return key, message


def num_ranks(config: ParallelConfig) -> int:
    """Return the number of ranks that the degrees describe (experts add none)."""
    return config.pipeline * config.replicate * config.shard * config.context * config.tensor


def data_ranks(config: ParallelConfig) -> int:
    """Return the number of ranks that each see their own part of a batch."""
    return config.replicate * config.shard


def accumulation_steps(config: RunConfig) -> int:
    """Return the micro-batches per rank and optimizer step."""
    return config.batch.global_sequences // (config.batch.micro_sequences * data_ranks(config.parallel))


_AT_LEAST_ONE = (
    "steps",
    "model.num_layers",
    "model.dim",
    "model.num_heads",
    "model.moe.num_groups",
    "model.moe.top_groups",
    "model.moe.top_k",
    "data.sequence_length",
    "batch.global_sequences",
    "batch.micro_sequences",
    "engine.bucket_numel",
    "checkpoint.keep_last",
    "checkpoint.writer_threads",
    "checkpoint.memory.keep_last",
    "checkpoint.remote.every",
    "checkpoint.remote.keep_last",
    "metrics.every",
    "profile.num_steps",
    "faulttol.health.patience",
    "faulttol.policy.failed_starts_limit",
    "faulttol.policy.no_progress_limit",
    "faulttol.policy.same_error_limit",
    *(f"parallel.{axis}" for axis in get_args(Axis)),
    "parallel.stages.per_rank",
    "offload.window_layers",
)
_AT_LEAST_ZERO = (
    "model.num_kv_heads",
    "model.head_dim",
    "model.ffn_dim",
    "model.vocab_size",
    "model.moe.num_experts",
    "parallel.node_size",
    "model.moe.num_shared_experts",
    "model.moe.balance_weight",
    "model.moe.bias_rate",
    "model.moe.capacity_factor",
    "model.moe.z_weight",
    "model.moe.first_dense_layers",
    "optim.lr",
    "optim.muon_lr",
    "optim.weight_decay",
    "engine.gradient_clip_norm",
    "evaluation.every",
    "evaluation.sequences",
    "evaluation.sample_tokens",
    "evaluation.sample_temperature",
    "checkpoint.every",
    "checkpoint.keep_every",
    "checkpoint.load_buffer_bytes",
    "checkpoint.memory.every",
    "checkpoint.memory.limit_bytes",
    "checkpoint.memory.peers",
    "checkpoint.remote.keep_every",
    "metrics.peak_flops_per_s",
    "profile.start_step",
    "launch.gpus_per_rank",
    "launch.spares",
    "faulttol.corruption.replicas_every",
    "faulttol.corruption.products_every",
    "faulttol.policy.restarts_per_hour",
    "faulttol.policy.backoff_s",
    "faulttol.policy.spare_wait_s",
    "faulttol.policy.recovery_cost_s",
    "offload.host_bytes",
    "offload.device_bytes",
    "seed",
)
_ABOVE_ZERO = (
    "model.moe.routed_scaling",
    "model.rope_theta",
    "model.norm_eps",
    "optim.eps",
    "engine.timeout_s",
    "checkpoint.commit_timeout_s",
    "checkpoint.urgent_deadline_s",
    "checkpoint.remote.retry_s",
    "faulttol.heartbeat_interval_s",
    "faulttol.health.lost_after_s",
    "faulttol.health.frozen_after_s",
    "faulttol.health.stuck_after_s",
    "faulttol.health.stalled_after_s",
    "faulttol.policy.abort_timeout_s",
    "faulttol.policy.backoff_limit_s",
    "launch.cpus_per_rank",
    "launch.start_timeout_s",
    "launch.frozen_timeout_s",
    "launch.hang_timeout_s",
    "launch.stop_grace_s",
)
_FRACTIONS = {
    "model.dropout": 1.0,
    "data.validation_fraction": 0.5,
    "optim.beta1": 1.0,
    "optim.beta2": 1.0,
    "optim.muon_momentum": 1.0,
}


def _ranges(config: RunConfig) -> Iterator[Problem]:
    for key in _AT_LEAST_ONE:
        if _value(config, key) < 1:
            yield key, f"{_value(config, key)} is out of range; allowed: 1 or more"
    for key in _AT_LEAST_ZERO:
        if not _value(config, key) >= 0:
            yield key, f"{_value(config, key)} is out of range; allowed: 0 or more"
    for key in _ABOVE_ZERO:
        if not _value(config, key) > 0:
            yield key, f"{_value(config, key)} is out of range; allowed: above 0"
    for key, limit in _FRACTIONS.items():
        if not 0 <= _value(config, key) <= limit:
            yield key, f"{_value(config, key)} is out of range; allowed: 0 to {limit:g}"
    for key in (*_AT_LEAST_ZERO, *_ABOVE_ZERO):
        if math.isinf(_value(config, key)):
            yield key, "infinity is no setting; give a number"
    if config.name in ("", ".", "..") or "/" in config.name:
        yield "name", f"{config.name!r} cannot name a folder; give a text without '/'"
    if config.seed >= 2**63:
        yield "seed", f"{config.seed} is out of range; allowed: 0 to 2^63 - 1"
    if not config.data.validation_fraction and not config.data.validation_path and config.evaluation.sequences:
        yield "data.validation_fraction", "0 holds nothing out to evaluate on; set evaluation.sequences = 0 as well"


def _value(config: RunConfig, key: str) -> float:
    node: object = config
    for part in key.split("."):
        node = getattr(node, part)
    assert isinstance(node, (int, float))
    return node


def _model(config: RunConfig) -> Iterator[Problem]:
    model = config.model
    if model.kind == "hf":
        if not model.path:
            yield "model.path", "missing; kind = 'hf' needs a folder with config.json"
        return
    if model.num_heads < 1:
        return
    if not model.head_dim and model.dim % (2 * model.num_heads):
        yield (
            "model.dim",
            f"{model.dim} is not a multiple of 2 x num_heads ({model.num_heads}); or set head_dim",
        )
    if model.head_dim % 2:
        yield "model.head_dim", f"{model.head_dim} is odd; rotary embeddings need an even width"
    if model.num_kv_heads and model.num_heads % model.num_kv_heads:
        yield "model.num_kv_heads", f"{model.num_kv_heads} does not divide num_heads ({model.num_heads})"
    moe = model.moe
    if moe.num_experts and moe.top_k >= 1 and min(moe.num_groups, moe.top_groups) >= 1:
        fields = (moe.num_experts, moe.top_k, moe.num_groups, moe.top_groups)
        yield from ((f"model.moe.{key}", problem) for key, problem in size_problems(*fields))
    if moe.num_experts and moe.first_dense_layers >= model.num_layers:
        yield "model.moe.first_dense_layers", f"{moe.first_dense_layers} leaves no layer with experts"


def backend_of(config: RunConfig) -> legal.Backend:
    """Return the engine that trains the run, in a precision that is no longer `auto`.

    Raises:
        parallel.ParallelError: the one that is asked for cannot, or none can.
    """
    engine, others = config.engine, dict[legal.Backend, str]()
    if engine.precision != "fp32" and engine.zero_stage == 0:
        # DeepSpeed 0.19.8 takes an Adam step on zero gradients while it builds this combination's optimizer,
        # so every later step has the wrong bias correction (losses off by 1e-2).
        others["deepspeed"] = f"its ZeRO 0 is numerically wrong in {engine.precision}"
    if engine.precision == "fp16":
        others["torch"] = "it does not scale losses, which fp16 needs"
    if engine.zero_stage and _ties_stages_of_a_rank(config):
        others["torch"] = "FSDP2 cannot shard an embedding that is the head (model.tied_head) of a rank's second stage"
    others |= engine_refusals(config)
    return legal.choose(config.parallel, engine.zero_stage, engine.backend, others)


def _ties_stages_of_a_rank(config: RunConfig) -> bool:
    """Return whether the embedding and the head are one parameter in two stages of one rank; of folders unknown."""
    degrees, model = config.parallel, config.model
    is_v = degrees.pipeline > 1 and degrees.stages.schedule in ("zbv", "dualpipev")
    return is_v and model.kind == "decoder" and model.tied_head


def _parallel(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    degrees = config.parallel
    ranks = num_ranks(degrees)
    if world_size is not None and ranks != world_size:
        yield (
            "parallel",
            f"degrees multiply to {ranks} but there {_are(world_size)}; set --parallel.replicate={world_size}, or "
            "start the ranks with `trainsys launch`",
        )
    if any(getattr(degrees, axis) < 1 for axis in get_args(Axis)):
        return
    try:
        backend_of(config)
    except ParallelError as error:
        yield "engine.zero_stage" if config.engine.backend == "auto" else "engine.backend", str(error)
    yield from _experts(config)
    yield from _tensor(config)
    yield from _context(config)
    if degrees.pipeline > 1:
        yield from _pipeline(config)


def _experts(config: RunConfig) -> Iterator[Problem]:
    degrees, moe = config.parallel, config.model.moe
    if data_ranks(degrees) % degrees.expert:
        yield "parallel.expert", f"{degrees.expert} does not divide replicate x shard ({data_ranks(degrees)})"
    num_ranks = degrees.expert * degrees.tensor
    if degrees.node_size and (degrees.expert == 1 or num_ranks % degrees.node_size):
        found = f"{degrees.node_size} of the {num_ranks} ranks that share experts"
        yield "parallel.node_size", f"{found}; allowed: with expert > 1 a divisor, or 0"
    if config.model.kind == "hf":
        return  # the number of experts is the checkpoint's, which parallel.expert looks at
    if degrees.expert > 1 and not moe.num_experts:
        yield "parallel.expert", f"{degrees.expert}: the model has no experts; allowed: 1"
    elif moe.num_experts % num_ranks:
        yield (
            "model.moe.num_experts",
            f"{moe.num_experts} is not a multiple of expert x tensor ranks ({degrees.expert} x {degrees.tensor})",
        )


def _tensor(config: RunConfig) -> Iterator[Problem]:
    degrees, model = config.parallel, config.model
    if degrees.tensor == 1:
        return
    if config.optim.kind == "muon":
        yield "optim.kind", "muon orthogonalises whole matrices, which parallel.tensor shares out; allowed: adamw"
    if degrees.sequence and config.data.sequence_length % (degrees.context * degrees.tensor):
        yield (
            "data.sequence_length",
            f"{config.data.sequence_length} is not a multiple of context x tensor ranks "
            f"({degrees.context} x {degrees.tensor}), which share it with parallel.sequence",
        )
    if model.kind == "decoder" and model.num_heads >= 1:
        kv_heads = model.num_kv_heads or model.num_heads
        if model.num_heads % degrees.tensor:
            yield "model.num_heads", f"{model.num_heads} is not a multiple of parallel.tensor ({degrees.tensor})"
        if kv_heads % degrees.tensor and degrees.tensor % kv_heads:
            yield (
                "model.num_kv_heads",
                f"{kv_heads} and parallel.tensor ({degrees.tensor}): one must be a multiple of the other",
            )


def _context(config: RunConfig) -> Iterator[Problem]:
    degrees, model = config.parallel, config.model
    if degrees.context == 1:
        return
    if config.data.sequence_length % (2 * degrees.context):
        yield (
            "data.sequence_length",
            f"{config.data.sequence_length} is not a multiple of 2 x parallel.context ({2 * degrees.context})",
        )
    if degrees.attention == "ulysses" and model.kind == "decoder" and model.num_heads >= 1:
        kv_heads = model.num_kv_heads or model.num_heads
        own_heads, own_kv_heads = model.num_heads // degrees.tensor, max(1, kv_heads // degrees.tensor)
        if own_heads % degrees.context or (own_kv_heads % degrees.context and degrees.context % own_kv_heads):
            yield (
                "parallel.attention",
                f"ulysses cannot share {model.num_heads} query and {kv_heads} key and value heads among context x "
                f"tensor ranks ({degrees.context} x {degrees.tensor}), which must divide the query heads, and divide "
                "or be a multiple of the others; allowed: ring",
            )


def _pipeline(config: RunConfig) -> Iterator[Problem]:
    degrees, stages = config.parallel, config.parallel.stages
    number = num_stages(stages.schedule, degrees.pipeline, stages.per_rank)
    if config.model.kind == "hf" and degrees.tensor > 1 and degrees.sequence:
        yield "parallel.sequence", "true: not in pipelines of Hugging Face models; allowed: false"
    is_known = config.model.kind == "decoder"  # a folder has its own number of layers
    layers = config.model.num_layers if is_known else number
    if number > layers:
        yield (
            "parallel.pipeline",
            f"{number} stages for {layers} layers (model.num_layers); one each",
        )
    if stages.layers and (len(stages.layers) != number or (is_known and sum(stages.layers) != layers)):
        yield (
            "parallel.stages.layers",
            f"{stages.layers} is not {number} stages with {layers} layers together",
        )
    if min(config.batch.micro_sequences, config.batch.global_sequences) >= 1 and stages.per_rank >= 1:
        try:
            build(stages.schedule, degrees.pipeline, max(1, accumulation_steps(config)), per_rank=stages.per_rank)
        except ParallelError as error:
            yield "parallel.stages.schedule", str(error).replace("\n", "; ")


def _are(world_size: int) -> str:
    return "is 1 rank" if world_size == 1 else f"are {world_size} ranks"


def _batch(config: RunConfig) -> Iterator[Problem]:
    batch, ranks = config.batch, data_ranks(config.parallel)
    if min(batch.global_sequences, batch.micro_sequences, ranks) >= 1:
        unit = batch.micro_sequences * ranks
        if batch.global_sequences % unit:
            yield (
                "batch.global_sequences",
                f"{batch.global_sequences} is not a multiple of micro_sequences x data ranks "
                f"({batch.micro_sequences} x {ranks} = {unit})",
            )


def _engine(config: RunConfig) -> Iterator[Problem]:
    engine = config.engine
    if engine.precision == "fp16" and engine.device == "cpu":
        yield "engine.precision", "fp16 does not train on CPU; use bf16 or fp32"
    yield from offloading.problems(config)
    if config.profile.start_step > config.steps:
        yield "profile.start_step", f"{config.profile.start_step} lies behind the last step ({config.steps})"
    if config.faulttol.heartbeat_interval_s * 4 > config.launch.frozen_timeout_s:
        yield (
            "launch.frozen_timeout_s",
            f"{config.launch.frozen_timeout_s:g} s is under four heartbeats "
            f"(faulttol.heartbeat_interval_s = {config.faulttol.heartbeat_interval_s:g} s)",
        )


def _checkpoint(config: RunConfig) -> Iterator[Problem]:
    saving, remote = config.checkpoint, config.checkpoint.remote
    if isinstance(saving.staging_bytes, int) and saving.staging_bytes < _MIN_STAGING_BYTES:
        yield (
            "checkpoint.staging_bytes",
            f"{saving.staging_bytes} is out of range; allowed: 'auto', or {_MIN_STAGING_BYTES} (64 MiB) or more",
        )
    if remote.url and saving.every and remote.every % saving.every:
        yield (
            "checkpoint.remote.every",
            f"{remote.every} is not a multiple of checkpoint.every ({saving.every}); only what was saved is copied",
        )


def _faulttol(config: RunConfig) -> Iterator[Problem]:
    watching, saving = config.faulttol, config.checkpoint
    if config.launch.spares and watching.mode != "act":
        yield "launch.spares", f"{config.launch.spares} would never step in; set faulttol.mode = 'act'"
    if watching.ship_to:
        from faulttol.errors import ShipError
        from faulttol.ship import file_system

        if watching.mode == "off":
            yield "faulttol.ship_to", "nothing is recorded; set faulttol.mode = 'observe' or 'act'"
        try:
            file_system(watching.ship_to)
        except ShipError as error:
            yield "faulttol.ship_to", str(error)
    if watching.mode != "act":
        return
    if not saving.every and not saving.memory.every:
        yield "faulttol.mode", "'act' has nothing to go on from; set checkpoint.every or checkpoint.memory.every"
    if watching.heartbeat_interval_s * 4 > watching.health.stuck_after_s:
        yield (
            "faulttol.health.stuck_after_s",
            f"{watching.health.stuck_after_s:g} s is under four heartbeats "
            f"(faulttol.heartbeat_interval_s = {watching.heartbeat_interval_s:g} s)",
        )


def _corruption(config: RunConfig) -> Iterator[Problem]:
    looked_for, saving, degrees = config.faulttol.corruption, config.checkpoint, config.parallel
    if looked_for == CorruptionConfig():
        return
    if config.faulttol.mode == "off":
        yield "faulttol.corruption", "nothing is looked for; set faulttol.mode = 'observe' or 'act'"
    if config.rl.tasks:
        yield "faulttol.corruption", "is for runs on text, not for rl.tasks"
    if config.offload.parameters != "none":
        yield "faulttol.corruption", "cannot see parameters that are elsewhere; allowed: offload.parameters = 'none'"
    limit = 0 if _is_torch(config) else 2
    if looked_for.gradient_norms and config.engine.zero_stage > limit:
        yield (
            "faulttol.corruption.gradient_norms",
            f"sees no gradient of a rank alone at engine.zero_stage = {config.engine.zero_stage}; allowed: 0 with "
            "engine.backend = 'torch', to 2 with 'deepspeed'",
        )
    every = looked_for.replicas_every
    if not every:
        return
    if degrees.replicate < 2:
        yield "faulttol.corruption.replicas_every", f"{every}: there are no replicas; needs parallel.replicate above 1"
    if degrees.expert > 1:
        yield "faulttol.corruption.replicas_every", f"{every}: replicas have experts of their own; allowed: 0"
    if config.engine.zero_stage > limit:
        yield (
            "faulttol.corruption.replicas_every",
            f"{every}: no rank keeps a replica of all parameters at engine.zero_stage = {config.engine.zero_stage}; "
            "allowed: 0 with engine.backend = 'torch', to 2 with 'deepspeed'",
        )
    newer = math.ceil(every / saving.every) if saving.every else 0
    if config.faulttol.mode == "act" and saving.keep_last <= newer:
        yield (
            "faulttol.corruption.replicas_every",
            f"{every}: no checkpoint of before what is found would be left; needs checkpoint.keep_last (now "
            f"{saving.keep_last}) above {newer}, or another checkpoint.every",
        )


def _is_torch(config: RunConfig) -> bool:
    try:
        return backend_of(config) == "torch"
    except ParallelError:  # told elsewhere
        return False


def _launch(config: RunConfig) -> Iterator[Problem]:
    if config.engine.device == "cuda" and config.launch.kind == "ray" and not config.launch.gpus_per_rank:
        yield "engine.device", "'cuda' under Ray needs GPUs reserved for every rank: --launch.gpus_per_rank=1"
