"""What summing gradients over data ranks costs beside torch's own data parallelism.

Claim: `parallel.data.Replicated` takes a step in at most 1/0.98 of the time of DistributedDataParallel, and
`parallel.zero.FullySharded` in that of plain FSDP2, though both sum where torch averages; sending buckets during
backward takes no longer than sending them after it.

Baselines: torch's DistributedDataParallel (buckets of the same size, gradients as views of them), and `fully_shard` of
the same blocks with the same mixed precision. All cases alternate in one job; a step is forward, backward and the
reduction of all gradients, and takes as long as its slowest rank. Gradients are compared, those of DDP times the ranks.

On GPUs (NCCL) where there is one for each rank, else on CPU (gloo), where a reduction takes the cores that backward
wants: there is little to hide.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from parallel.bench import Backend, Bound, Gate, Report, arguments, device_of, spawn
from parallel.config import ParallelConfig
from parallel.data import DataParallel, Replicated
from parallel.groups import MeshGroups
from parallel.mesh import Mesh
from parallel.zero import FullySharded

_SPEED = 0.98
_WARM_UP = 3
_MIB = 1 << 20


@dataclass(frozen=True)
class Size:
    """What is trained."""

    width: int
    num_blocks: int
    rows: int
    bucket_mib: int


class Block(nn.Module):
    """A feed-forward of a decoder."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.silu(self.up(self.norm(x))))  # type: ignore[no-any-return]


class Stack(nn.Module):
    """Blocks, one after the other."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(size.width) for _ in range(size.num_blocks))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x.float().square().mean()


@dataclass
class Runner:
    """One case: a step, and its gradients by name for comparison."""

    step: Callable[[Tensor], None]
    gradients: Callable[[], dict[str, Tensor]]


def measure(rank: int, world_size: int, backend: Backend, size: Size, repeats: int) -> dict[str, Any]:
    """Return seconds of every step by case, of the parts alone, and the largest error of a gradient."""
    device = device_of(backend)
    x = torch.randn(size.rows, size.width, generator=torch.Generator().manual_seed(rank)).to(device)
    with MeshGroups(Mesh(ParallelConfig(replicate=world_size), world_size)) as groups:
        runners = {
            "DDP": _ddp(size, device, world_size),
            "replicate": _replicate(size, device, groups, overlap=True),
            "replicate, no overlap": _replicate(size, device, groups, overlap=False),
            "FSDP2": _plain_fsdp(size, device, world_size),
            "ZeRO 3": _zero(size, device, groups),
        }
        pairs = (("DDP", "replicate"), ("FSDP2", "ZeRO 3"))
        error = max(_error(runners[theirs], runners[ours], x) for theirs, ours in pairs)
        times: dict[str, list[float]] = {name: [] for name in runners}
        for index in range(_WARM_UP + repeats):
            for name, runner in runners.items():
                seconds = _timed(lambda runner=runner: runner.step(x), device)  # type: ignore[misc]
                if index >= _WARM_UP:
                    times[name].append(seconds)
        flat = torch.zeros(sum(p.numel() for p in Stack(size).parameters()), device=device)
        reduce_s = min(_timed(lambda: dist.all_reduce(flat), device) for _ in range(3))
        alone = Stack(size).to(device)
        compute_s = min(_timed(lambda: alone(x).backward(), device) for _ in range(3))
    return {"times": times, "error": error, "reduce_s": reduce_s, "compute_s": compute_s, "bytes": flat.numel() * 4}


def _ddp(size: Size, device: torch.device, world_size: int) -> Runner:
    model = Stack(size).to(device)
    wrapped = DistributedDataParallel(model, bucket_cap_mb=size.bucket_mib, gradient_as_bucket_view=True)

    def step(x: Tensor) -> None:
        wrapped.zero_grad(set_to_none=True)
        wrapped(x).backward()

    def gradients() -> dict[str, Tensor]:
        return {name: p.grad * world_size for name, p in model.named_parameters() if p.grad is not None}

    return Runner(step, gradients)


def _plain_fsdp(size: Size, device: torch.device, world_size: int) -> Runner:
    model = Stack(size).to(device)
    mesh = init_device_mesh(device.type, (world_size,))
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if device.type == "cuda" else MixedPrecisionPolicy()
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)

    def step(x: Tensor) -> None:
        model.zero_grad(set_to_none=True)
        model(x).backward()

    def gradients() -> dict[str, Tensor]:
        grads: dict[str, Any] = {name: p.grad for name, p in model.named_parameters()}
        return {name: grad.to_local().flatten() * world_size for name, grad in grads.items()}

    return Runner(step, gradients)


def _replicate(size: Size, device: torch.device, groups: MeshGroups, *, overlap: bool) -> Runner:
    model = Stack(size).to(device)
    return _runner(model, Replicated(model, groups, bucket_numel=size.bucket_mib * _MIB // 4, overlap=overlap))


def _zero(size: Size, device: torch.device, groups: MeshGroups) -> Runner:
    model = Stack(size).to(device)
    dtype = torch.bfloat16 if device.type == "cuda" else None
    return _runner(model, FullySharded(model, list(model.blocks), groups, zero_stage=3, compute_dtype=dtype))


def _runner(model: nn.Module, data: DataParallel) -> Runner:
    def step(x: Tensor) -> None:
        data.refresh()
        data.begin()
        data.micro_batch(True)
        model(x).backward()
        data.finish()

    def gradients() -> dict[str, Tensor]:
        return {master.name: master.tensor.grad for master in data.masters if master.tensor.grad is not None}

    return Runner(step, gradients)


def _error(baseline: Runner, candidate: Runner, x: Tensor) -> float:
    """Return the largest difference of a gradient, relative to the largest of its elements."""
    baseline.step(x)
    candidate.step(x)
    theirs, mine = baseline.gradients(), candidate.gradients()
    assert theirs.keys() == mine.keys()
    differences = {name: (mine[name].flatten() - theirs[name].flatten()).abs().max() for name in theirs}
    return max(float(difference / theirs[name].abs().max()) for name, difference in differences.items())


def _timed(action: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds that the slowest rank takes."""
    _settle(device)
    dist.barrier()
    started = time.perf_counter()
    action()
    _settle(device)
    seconds = torch.tensor(time.perf_counter() - started, device=device)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return float(seconds)


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> int:
    """Run the benchmark; return its exit code."""
    options = arguments(__doc__).parse_args()
    on_gpus = torch.cuda.device_count() >= 2
    size = Size(4096, 16, 8192, 100) if on_gpus else Size(512, 8, 512, 4)
    if options.smoke:
        size = Size(64, 2, 16, 1)
    backend: Backend = "nccl" if on_gpus else "gloo"
    found = spawn(measure, 2, backend, backend, size, 1 if options.smoke else options.repeats)
    if found is None:
        return 0
    result = found[0]
    report = Report("parallel.data", {"ranks": 2, "backend": backend, **vars(size)})
    for case, values in result["times"].items():
        report.add(case, "step", "s", *values)
    report.bounds.append(Bound("compute", result["compute_s"], "s", "forward and backward alone, fp32"))
    report.bounds.append(Bound("all-reduce", result["reduce_s"], "s", f"{result['bytes'] / _MIB:.0f} MiB in one"))
    limit = 1e-5 if backend == "gloo" else 2e-2
    report.gates.append(Gate("error of a gradient", result["error"], limit, ok=result["error"] <= limit))
    for ours, theirs in (("replicate", "DDP"), ("replicate", "replicate, no overlap"), ("ZeRO 3", "FSDP2")):
        ratio = report.median(theirs, "step") / report.median(ours, "step")
        report.gates.append(Gate(f"speed of {ours} over {theirs}", ratio, _SPEED, ok=ratio >= _SPEED, is_speed=True))
    return report.finish(options)


if __name__ == "__main__":
    sys.exit(main())
