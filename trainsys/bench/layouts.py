"""What each kind of parallelism costs on two ranks, beside the same model in plain FSDP2.

    python -m trainsys.bench.layouts [--repeats N] [--json FILE] [--smoke] [--cases NAME;…] [--shares]

or the same under torchrun with two ranks. Claim: the hybrid path trains a decoder under tensor, pipeline, context and
data parallelism at no less than 0.98 x the tokens/s of FSDP2 as torch has it; tensor parallelism with overlap is
at least 1.10 x as fast as without; a pipeline's bubble is within 10 % of what its schedule predicts.

Baselines: a plain loop over torch's `fully_shard` (bf16 compute, fp32 masters, fused AdamW, clipping), and DeepSpeed's
ZeRO 3 where DeepSpeed is installed. All cases train on the same tokens, the same number of them a step, in one job:
each round runs every case, model and optimizer made anew, a few steps to warm up and then the steps that count. Ranks
that share the tokens or the features of a micro-batch have one of as many times the sequences: each rank computes as
much at a time, and keeps as much for backward, as a rank of the baseline does. A step takes as long as its slowest
rank; MFU is tokens/s x operations per token over the peak of both devices; memory is the most that the allocator of a
rank has given out.

Long cases have sequences of 32,768 tokens, as many tokens a step, and a baseline of their own: sharing a sequence of
4,096 among ranks is measured too, and is nothing that a recipe should do. The decoder has 25 blocks, so that a stage
with the head and 12 costs what one with 13 does.

Bubble: with m micro-batches a step takes T(m), with 2 m T(2 m); what a micro-batch costs without any waiting is
c = (T(2 m) - T(m)) / m, and the bubble of m is 1 - m c / T(m). The update is part of T and of both its terms.

`--shares` records one more step of every case with the profiler and says how rank 0's device shared it out, as
`trainsys.bench.utilisation` does: `communication` is what nothing hides, `idle` waits for the host or for other ranks.

On GPUs where there are two (NCCL, bf16, 1.7 B parameters, 4,096 tokens), else on CPU (gloo, fp32, a minute model: its
figures say what the path costs there, nothing about GPUs).
"""

from __future__ import annotations

import faulthandler
import hashlib
import importlib.util
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from parallel import Mesh, MeshGroups, hybrid
from parallel.bench import Backend, Bound, Gate, Report, arguments, device_of, spawn
from parallel.config import ParallelConfig, StagesConfig
from parallel.pipeline import build as build_schedule
from parallel.pipeline import predict
from parallel.pipeline.replay import Costs
from parallel.shards import shards_of
from trainsys import meter, models
from trainsys.bench.utilisation import shares
from trainsys.check import accumulation_steps, data_ranks
from trainsys.config import BatchConfig, DataConfig, EngineConfig, ModelConfig, OptimConfig, RunConfig
from trainsys.data import MicroBatch, StepBatch
from trainsys.engines import DTYPES, open_engine
from trainsys.models.initialisation import fill
from trainsys.optim import build_optimizer, plan_of
from trainsys.step import train_step

BASELINE = "plain FSDP2"
LONG_BASELINE = "plain FSDP2, long"
_WARM_UP = 2
_CASE_TIMEOUT_S = 120.0
_LR = 3e-4


@dataclass(frozen=True)
class Size:
    """What is trained, and how much of it."""

    model: ModelConfig
    length: int
    global_sequences: int
    micro_sequences: int
    steps: int
    """That count, in every round."""
    precision: Any
    is_compiled: bool


LARGE = Size(
    ModelConfig(num_layers=25, dim=2048, num_heads=16, num_kv_heads=8, ffn_dim=8192, vocab_size=32768),
    length=4096,
    global_sequences=64,
    micro_sequences=8,
    steps=2,
    precision="bf16",
    is_compiled=True,
)
SMALL = Size(
    ModelConfig(num_layers=4, dim=128, num_heads=4, num_kv_heads=2, ffn_dim=384, vocab_size=512),
    length=128,
    global_sequences=16,
    micro_sequences=1,
    steps=5,
    precision="fp32",
    is_compiled=False,
)
SMOKE = replace(SMALL, model=replace(SMALL.model, dim=32, ffn_dim=64, vocab_size=64), length=32, steps=1)


@dataclass(frozen=True)
class Case:
    """One way to train on two ranks."""

    degrees: ParallelConfig
    zero_stage: Any = 0
    backend: Any = "torch"
    scale: int = 1
    """Times as many sequences a step, to tell the bubble."""
    micro_sequences: int | None = None
    """Of a micro-batch of ranks that share none; None: what the size says. Few, for a pipeline: a bubble is as long as
    a micro-batch."""
    stretch: int = 1
    """Times as long sequences, and as many times fewer of them."""


_PIPELINE = ParallelConfig(pipeline=2, stages=StagesConfig(schedule="interleaved", per_rank=2))
_ZERO_BUBBLE = ParallelConfig(pipeline=2, stages=StagesConfig(schedule="zbv", per_rank=2))
_LONG = 8
CASES = {
    "ZeRO 3": Case(ParallelConfig(shard=2), 3),
    "replicate": Case(ParallelConfig(replicate=2)),
    "tensor": Case(ParallelConfig(tensor=2)),
    "tensor, no overlap": Case(ParallelConfig(tensor=2, overlap=False)),
    "pipeline": Case(_PIPELINE, micro_sequences=2),
    "pipeline, zero bubble": Case(_ZERO_BUBBLE, micro_sequences=2),
    "pipeline, zero bubble, 4 at a time": Case(_ZERO_BUBBLE, micro_sequences=4),
    "pipeline, 2 m": Case(_PIPELINE, scale=2, micro_sequences=2),
    "context": Case(ParallelConfig(context=2)),
    "context, long": Case(ParallelConfig(context=2), micro_sequences=1, stretch=_LONG),
    "context, long, all-to-all": Case(ParallelConfig(context=2, attention="ulysses"), micro_sequences=1, stretch=_LONG),
}
PLAIN = {
    BASELINE: Case(ParallelConfig(shard=2)),
    LONG_BASELINE: Case(ParallelConfig(shard=2), micro_sequences=1, stretch=_LONG),
}
DEEPSPEED = {"DeepSpeed ZeRO 3": Case(ParallelConfig(replicate=2), 3, "deepspeed")}
_ALL = PLAIN | CASES | DEEPSPEED


def configure(case: Case, size: Size) -> RunConfig:
    """Return the run of a case."""
    return RunConfig(
        name="layouts",
        steps=1000,
        model=size.model,
        data=DataConfig(sequence_length=size.length * case.stretch),
        batch=BatchConfig(
            global_sequences=size.global_sequences * case.scale // case.stretch,
            micro_sequences=(case.micro_sequences or size.micro_sequences) * case.degrees.tensor * case.degrees.context,
        ),
        optim=OptimConfig(kind="adamw", lr=_LR),
        engine=EngineConfig(backend=case.backend, zero_stage=case.zero_stage, precision=size.precision),
        parallel=case.degrees,
    )


def batch_of(config: RunConfig, data_rank: int, index: int) -> StepBatch:
    """Return a rank's micro-batches of a step: its rows of what all cases train on."""
    random = torch.Generator().manual_seed(index)
    shape = (config.batch.global_sequences, config.data.sequence_length + 1)
    tokens = torch.randint(config.model.vocab_size, shape, generator=random)
    share, size = shape[0] // data_ranks(config.parallel), config.batch.micro_sequences
    assert share, "each rank trains on something"
    mine = tokens[data_rank * share : (data_rank + 1) * share]
    micros = [
        MicroBatch(part[:, :-1].contiguous(), part[:, 1:].contiguous(), None, None, part[:, 1:].numel())
        for part in torch.split(mine, size)
    ]
    return StepBatch(0, micros, sum(micro.num_targets for micro in micros))


Step = Callable[[int], float]
"""Takes the step of an index and returns its loss."""


@contextmanager
def hybrid_case(case: Case, size: Size, device: torch.device, control: dist.ProcessGroup) -> Iterator[Step]:
    """Yield the steps of a case by our engines."""
    config = configure(case, size)
    with ExitStack() as stack:
        groups = stack.enter_context(MeshGroups(Mesh(config.parallel, dist.get_world_size())))
        groups.prepare(*hybrid.GROUPS)
        model = _model(config)
        plan = plan_of(model, config.optim)
        part = hybrid.apply(
            model,
            groups,
            models.Anatomy(config.data.sequence_length),
            num_micro_batches=accumulation_steps(config),
            place=lambda module: _place(module, device, DTYPES[size.precision]),
        )
        stack.callback(part.close)
        if size.is_compiled:
            models.compile_parts(part.module)
        engine = open_engine(part, config, lambda module: build_optimizer(module, config.optim, plan))
        stack.callback(engine.close)
        phases = meter.Phases(device)

        def step(index: int) -> float:
            batch = batch_of(config, groups.mesh.data_rank(groups.rank), index)
            stats = train_step(
                engine,
                batch,
                total_targets=_tokens(config),
                data_ranks=data_ranks(config.parallel),
                lr=(1.0, _LR),
                control=control,
                phases=phases,
            )
            return stats.loss

        yield step


@contextmanager
def plain_case(case: Case, size: Size, device: torch.device, control: dist.ProcessGroup) -> Iterator[Step]:
    """Yield the steps of an ordinary FSDP2 loop."""
    world_size = dist.get_world_size()
    config = configure(case, size)
    model = _place(_model(config), device, torch.float32)
    if size.is_compiled:
        models.compile_parts(model)
    mesh = init_device_mesh(device.type, (world_size,))
    policy = MixedPrecisionPolicy(DTYPES[size.precision], torch.float32, cast_forward_inputs=False)
    for module in (*models.blocks(model), model):
        fully_shard(module, mesh=mesh, mp_policy=policy)
    optimizer = build_optimizer(model, config.optim)
    total = _tokens(config)

    def step(index: int) -> float:
        summed = torch.zeros((), dtype=torch.float64, device=device)
        for micro in batch_of(config, dist.get_rank(), index).micro_batches:
            loss, auxiliary = model(micro.tokens.to(device), targets_BT=micro.targets.to(device))
            ((loss / total + auxiliary) * world_size).backward()  # FSDP2 averages
            summed += loss.detach()
        nn.utils.clip_grad_norm_(model.parameters(), config.engine.gradient_clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        sums = summed.cpu()
        dist.all_reduce(sums, group=control)
        return float(sums) / total

    yield step


def _tokens(config: RunConfig) -> int:
    """Of a step."""
    return config.batch.global_sequences * config.data.sequence_length


def _model(config: RunConfig) -> nn.Module:
    """The model without memory yet."""
    with torch.device("meta"):
        return models.build(
            config.model,
            vocab_size=config.model.vocab_size,
            max_positions=config.data.sequence_length,
            recompute=config.engine.recompute,
            seed=config.seed,
        )


@torch.no_grad()
def _place(module: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Bring a module without memory to its device; weights are drawn there, by name: on a CPU that takes minutes."""
    for name, shard in shards_of(module).items():
        values = torch.ones(shard.global_shape, device=device)
        if values.ndim > 1:
            seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")
            values.normal_(0, 0.02, generator=torch.Generator(device).manual_seed(seed))
        fill(module, name, shard.take(values), device, dtype)
    return module.to(device=device, dtype=dtype)


def measure(
    rank: int, world_size: int, backend: Backend, size: Size, names: list[str], rounds: int, records: bool
) -> dict[str, Any]:
    """Return the seconds of every counted step, the first loss and the peak memory by case.

    With `records` also how a step after them was shared out, by case.
    """
    device = device_of(backend)
    control = dist.new_group(backend="gloo")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    losses: dict[str, float] = {}
    memory: dict[str, float] = {}
    shared: dict[str, dict[str, float]] = {}
    for _ in range(rounds):
        for name in names:
            begun = time.perf_counter()
            faulthandler.dump_traceback_later(_CASE_TIMEOUT_S, exit=True)  # a rank that waits for ever says where
            _forget(device)
            open_case = plain_case if name in PLAIN else hybrid_case
            opened = open_case(_ALL[name], size, device, control)
            with opened as step:
                losses[name] = step(0)
                for index in range(1, _WARM_UP):
                    step(index)
                for index in range(size.steps):
                    seconds[name].append(_timed(step, _WARM_UP + index, device, control))
                if device.type == "cuda":
                    memory[name] = _most(torch.cuda.max_memory_allocated(device), control)
                if records:
                    shared[name] = _recorded(step, _WARM_UP + size.steps, rank)
            if rank == 0:  # what a job that is ended early has found
                step_s = statistics.median(seconds[name][-size.steps :])
                print(f"{name}: {step_s:.4g} s a step; {time.perf_counter() - begun:.0f} s in all", flush=True)
    faulthandler.cancel_dump_traceback_later()
    configs = {name: configure(_ALL[name], size) for name in names}
    return {
        "seconds": seconds,
        "losses": losses,
        "memory": memory,
        "shares": shared,
        "tokens": {name: _tokens(config) for name, config in configs.items()},
        "flops_per_token": {
            name: models.flops_per_token(_model(config), config.data.sequence_length)
            for name, config in configs.items()
        },
        "num_parameters": models.num_parameters(_model(configs[names[0]])),
        "peak": meter.peak_of(device, DTYPES[size.precision], 0.0),
    }


def _forget(device: torch.device) -> None:
    torch._dynamo.reset()  # else the blocks of the ninth model would run without being compiled
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _timed(step: Step, index: int, device: torch.device, control: dist.ProcessGroup) -> float:
    """Return the seconds that the slowest rank takes for a step."""
    dist.barrier(control)
    started = time.perf_counter()
    step(index)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return _most(time.perf_counter() - started, control)


def _recorded(step: Step, index: int, rank: int) -> dict[str, float]:
    """Return how rank 0's device shared out a step; of other ranks nothing, who only take it."""
    if rank:
        step(index)
        return {}
    with torch.profiler.profile() as profile, torch.profiler.record_function("ProfilerStep#0"):
        step(index)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profile.export_chrome_trace(str(path))
        return shares(json.loads(path.read_text(encoding="utf-8"))["traceEvents"])


def _most(value: float, control: dist.ProcessGroup) -> float:
    found = torch.tensor(float(value), dtype=torch.float64)
    dist.all_reduce(found, dist.ReduceOp.MAX, group=control)
    return float(found)


def report_of(result: dict[str, Any], size: Size, backend: Backend, world_size: int) -> Report:
    """Return the figures and the gates."""
    settings = {"ranks": world_size, "backend": backend, "parameters": result["num_parameters"], "length": size.length}
    settings |= {"global_sequences": size.global_sequences, "micro_sequences": size.micro_sequences}
    settings |= {"precision": size.precision, "compiled": size.is_compiled}
    report = Report("trainsys.layouts", settings)
    peak = result["peak"]
    for name, seconds in result["seconds"].items():
        tokens, flops = result["tokens"][name], result["flops_per_token"][name]
        report.add(name, "step", "s", *seconds)
        report.add(name, "tokens/s", "1/s", *(tokens / each for each in seconds))
        rates = (tokens / each * flops / (world_size * peak.flops_per_s) for each in seconds)
        report.add(name, "MFU", "1", *rates)
        if name in result["memory"]:
            report.add(name, "peak memory of a rank", "B", result["memory"][name])
        for kind, share in result["shares"].get(name, {}).items():
            report.add(name, f"share of a step: {kind}", "1", share)
    how = f"{world_size} devices at peak ({peak.how}) by the model's operations per token"
    for name, flops in result["flops_per_token"].items():
        if name in PLAIN:
            report.bounds.append(Bound(f"tokens/s, {name}", world_size * peak.flops_per_s / flops, "1/s", how))
    _gate(report, result, size)
    return report


def _gate(report: Report, result: dict[str, Any], size: Size) -> None:
    for stretch in sorted({_ALL[name].stretch for name in result["losses"]}):
        alike = [name for name in result["losses"] if (_ALL[name].scale, _ALL[name].stretch) == (1, stretch)]
        losses = [result["losses"][name] for name in alike]
        first = statistics.median(losses)
        error = max(abs(loss / first - 1) for loss in losses)
        limit = 1e-5 if size.precision == "fp32" else 2e-3
        what = "first losses differ by" if stretch == 1 else "first losses of long sequences differ by"
        report.gates.append(Gate(what, error, limit, ok=error <= limit))

    def ratio(name: str, over: str) -> float:
        return report.median(name, "tokens/s") / report.median(over, "tokens/s")

    names = result["seconds"]
    for name in (name for name in names if name in CASES and CASES[name].scale == 1):
        baseline = BASELINE if CASES[name].stretch == 1 else LONG_BASELINE
        if "no overlap" not in name and baseline in names:
            found = ratio(name, baseline)
            report.gates.append(Gate(f"{name} over {baseline}", found, 0.98, ok=found >= 0.98, is_speed=True))
    if "tensor" in names and "tensor, no overlap" in names:
        found = ratio("tensor", "tensor, no overlap")
        report.gates.append(Gate("tensor with over without overlap", found, 1.10, ok=found >= 1.10, is_speed=True))
    if "pipeline" in names and "pipeline, 2 m" in names:
        _gate_bubble(report, size)


def _gate_bubble(report: Report, size: Size) -> None:
    num_micro_batches = size.global_sequences // (CASES["pipeline"].micro_sequences or size.micro_sequences)
    short, long = report.median("pipeline", "step"), report.median("pipeline, 2 m", "step")
    measured = 1 - (long - short) / short
    stages = _PIPELINE.stages
    schedule = build_schedule(stages.schedule, 2, num_micro_batches, per_rank=stages.per_rank)
    predicted = statistics.mean(predict(schedule, Costs.even(schedule.num_stages)).bubble)
    report.add("pipeline", "bubble", "1", measured)
    report.add("pipeline", "bubble, predicted", "1", predicted)
    off = abs(measured / predicted - 1)
    report.gates.append(Gate("bubble is off its prediction by", off, 0.10, ok=off <= 0.10, is_speed=True))


def main() -> int:
    """Run the benchmark; return its exit code."""
    has_deepspeed = importlib.util.find_spec("deepspeed") is not None
    known = [*PLAIN, *CASES, *(DEEPSPEED if has_deepspeed else ())]
    parser = arguments(__doc__)
    parser.add_argument("--cases", metavar="NAME;…", help=f"of {'; '.join(known)} (default: all)", default="")
    parser.add_argument("--shares", action="store_true", help="also record a step of each, and say what takes its time")
    options = parser.parse_args()
    on_gpus = torch.cuda.device_count() >= 2 and not options.smoke
    size = LARGE if on_gpus else SMOKE if options.smoke else SMALL
    # The smallest form tries each kind once; torch's own and DeepSpeed's are measured elsewhere too.
    default = [BASELINE, "ZeRO 3", "tensor", "pipeline", "context"] if options.smoke else known
    names = [name.strip() for name in options.cases.split(";") if name.strip()] or default
    unknown = sorted(set(names) - set(known))
    if unknown:
        parser.error(f"--cases: there is no {', '.join(unknown)}; cases are {'; '.join(known)}")
    backend: Backend = "nccl" if on_gpus else "gloo"
    rounds = 1 if options.smoke else options.repeats
    found = spawn(measure, 2, backend, backend, size, names, rounds, options.shares or options.smoke, timeout_s=3600)
    if found is None:
        return 0
    return report_of(found[0], size, backend, 2).finish(options)


if __name__ == "__main__":
    sys.exit(main())
