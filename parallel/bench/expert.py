"""Experts spread over ranks: what dispatch, experts and combination take, and what one node's copy of a token saves.

Claims: a layer whose experts are spread over the ranks costs little more than the same products without any
communication, and less than DeepSpeed's layer; a token that goes once to each node sends fewer bytes, and fewer still
when its experts are limited to some nodes.

Cases, in turn in one job, each with the same tokens, routes (2 a token, none dropped) and weights on every rank:

    ours        parallel.expert.MoE with a part of the experts on every rank
    loop        all experts on every rank, one after the other, nothing sent
    local       ours with all experts on every rank, nothing sent: the bound
    deepspeed   deepspeed.moe.layer.MoE with the same experts on the same rank, no token dropped (not with
                --without-deepspeed, for machines that have none)

`forward` and `backward` are the seconds of the slowest rank. Bytes are activations that dispatch sends to other nodes,
one way, of all ranks, where every rank is a node: `per route` sends each route by itself, `per node` a token once to a
node; `limited` chooses as many experts from half of the nodes.

Gates: outputs and input gradients of all agree; DeepSpeed's time over ours is at least 1 (a speed).
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
from torch.nn import functional

from parallel.bench import Bound, Gate, Report, arguments, device_of, spawn
from parallel.config import ParallelConfig
from parallel.expert import ExpertGroups, MoE, dispatch_stats, parallelize
from parallel.groups import MeshGroups
from parallel.mesh import Mesh
from parallel.moe_config import Routing
from parallel.ranks import Backend

TOP_K = 2
OURS, LOOP, LOCAL, DEEPSPEED = "ours", "loop", "local", "deepspeed"


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of the layer, and of what one rank feeds it."""

    tokens: int
    dim: int
    ffn_dim: int
    experts: int


@dataclass(slots=True)
class Measured:
    """What one rank found."""

    seconds: dict[tuple[str, str], list[float]]
    difference: float
    """The largest between a case and the loop, over the largest value."""
    sent: dict[str, tuple[int, int]]
    """Routing -> bytes (per route, per node)."""


def main() -> int:
    """Run the benchmark; return 1 if results differ."""
    parser = arguments(__doc__)
    gpus = torch.cuda.device_count()
    parser.add_argument("--ranks", type=int, default=gpus if gpus > 1 else 2, help="ranks (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=16384 if gpus > 1 else 2048, help="a rank's (%(default)s)")
    parser.add_argument("--dim", type=int, default=2048 if gpus > 1 else 256, help="width (%(default)s)")
    parser.add_argument("--ffn-dim", type=int, default=1408 if gpus > 1 else 256, help="of an expert (%(default)s)")
    parser.add_argument("--experts", type=int, default=32, help="in all (%(default)s)")
    parser.add_argument("--without-deepspeed", action="store_true", help="leave that case out")
    options = parser.parse_args()
    sizes = Sizes(options.tokens, options.dim, options.ffn_dim, options.experts)
    repeats = options.repeats
    if options.smoke:
        sizes, repeats = Sizes(32, 16, 16, 4), 1
    backend: Backend = "nccl" if gpus >= options.ranks else "gloo"
    cases = (LOOP, LOCAL, OURS) if options.without_deepspeed else (LOOP, LOCAL, DEEPSPEED, OURS)
    ranks = spawn(measure, options.ranks, backend, sizes, repeats, backend, cases)
    if ranks is None:
        return 0
    parameters = {"ranks": options.ranks, "backend": backend, "top_k": TOP_K, "repeats": repeats, "threads": 1}
    report = Report("parallel.expert", parameters | {name: getattr(sizes, name) for name in Sizes.__slots__})
    judge(report, ranks, 1e-5 if backend == "gloo" else 2**-5)
    return report.finish(options)


def judge(report: Report, ranks: list[Measured], tolerance: float) -> None:
    """Fill the report with what all ranks found."""
    cases = {case for case, _ in ranks[0].seconds}
    for case, phase in ranks[0].seconds:
        samples = zip(*(rank.seconds[case, phase] for rank in ranks), strict=True)
        report.add(case, phase, "s", *map(max, samples))
    sent: dict[str, list[int]] = {}
    for name in ranks[0].sent:
        sent[name] = [sum(rank.sent[name][way] for rank in ranks) for way in (0, 1)]
        report.add(name, "sent per route", "MB", sent[name][0] / 1e6)
        report.add(name, "sent per node", "MB", sent[name][1] / 1e6)
    totals = {case: sum(report.median(case, phase) for phase in ("forward", "backward")) for case in cases}
    report.bounds.append(Bound("forward and backward", totals[LOCAL], "s", "the same layer with all experts here"))
    worst = max(rank.difference for rank in ranks)
    report.gates.append(Gate("largest difference over largest value", worst, tolerance, worst <= tolerance))
    plain, limited = sent["anywhere"][0], sent["limited"][1]
    report.gates.append(Gate("limited per node over anywhere per route", limited / plain, 1.0, limited < plain))
    if DEEPSPEED in totals:
        ratio = totals[DEEPSPEED] / totals[OURS]
        report.gates.append(Gate("DeepSpeed's time over ours", ratio, 1.0, ratio >= 1, is_speed=True))


def measure(
    rank: int, world_size: int, sizes: Sizes, repeats: int, backend: Backend, cases: tuple[str, ...]
) -> Measured:
    """Time the cases by turns on this rank."""
    torch.set_num_threads(1)
    device = device_of(backend)
    dtype = torch.bfloat16 if backend == "nccl" else torch.float32
    mesh = Mesh(ParallelConfig(replicate=world_size, expert=world_size), world_size)
    with MeshGroups(mesh) as groups:
        whole = _layer(sizes, Routing(num_experts=sizes.experts, top_k=TOP_K, balance="none")).to(device, dtype)
        ours = _layer(sizes, whole.routing).to(device, dtype)
        parallelize(ours, ExpertGroups.of(groups))
        maps: dict[str, Callable[[Tensor], Tensor]] = {
            LOOP: lambda x: _loop(whole, x),
            LOCAL: lambda x: whole(x[None])[0][0],
            OURS: lambda x: ours(x[None])[0][0],
        }
        if DEEPSPEED in cases:
            maps[DEEPSPEED] = _deepspeed(whole, rank, world_size, backend)
        generator = torch.Generator().manual_seed(rank)
        x, grad = (torch.randn(sizes.tokens, sizes.dim, generator=generator).to(device, dtype) for _ in range(2))
        x.requires_grad_()
        found = Measured({(c, p): [] for c in cases for p in ("forward", "backward")}, 0.0, {})
        for repeat in range(repeats + 1):  # the first warms up
            outcomes = {}
            for case in cases:
                outcomes[case], seconds = _timed(maps[case], x, grad)
                for phase, value in seconds.items():
                    if repeat:
                        found.seconds[case, phase].append(value)
            found.difference = max(found.difference, *(_difference(outcomes[c], outcomes[LOOP]) for c in cases))
        found.sent = _sent(sizes, groups, x.detach())
    return found


def _layer(sizes: Sizes, routing: Routing) -> MoE:
    layer = MoE(sizes.dim, sizes.ffn_dim, routing)
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5, generator=generator)
    return layer


def _timed(fn: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> tuple[tuple[Tensor, Tensor], dict[str, float]]:
    x.grad = None
    dist.barrier()
    began_s = _now(x)
    y = fn(x)
    between_s = _now(x)
    y.backward(grad)  # type: ignore[no-untyped-call]
    ended_s = _now(x)
    assert x.grad is not None
    return (y.detach(), x.grad), {"forward": between_s - began_s, "backward": ended_s - between_s}


def _now(x: Tensor) -> float:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter()


def _difference(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> float:
    pairs = zip(ours, theirs, strict=True)
    return max(float((a.double() - b.double()).abs().max() / b.double().abs().max()) for a, b in pairs)


def _loop(layer: MoE, x_ND: Tensor) -> Tensor:
    """Compute one expert after the other, for the tokens that chose it."""
    _, routes = layer.router(x_ND)
    y_ND = torch.zeros_like(x_ND)
    for expert in range(layer.routing.num_experts):
        token, slot = (routes.expert_NK == expert).nonzero(as_tuple=True)
        gate, up = functional.linear(x_ND[token], layer.experts.gate_up[expert]).chunk(2, -1)
        mapped = functional.linear(functional.silu(gate) * up, layer.experts.down[expert])
        y_ND = y_ND.index_add(0, token, mapped * routes.weight_NK[token, slot, None].to(mapped.dtype))
    return y_ND


class _Expert(nn.Module):
    """One expert, as DeepSpeed copies it."""

    def __init__(self, gate_up: Tensor, down: Tensor) -> None:
        super().__init__()
        self.gate_up, self.down = nn.Parameter(gate_up.detach().clone()), nn.Parameter(down.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        gate, up = functional.linear(x, self.gate_up).chunk(2, -1)
        return functional.linear(functional.silu(gate) * up, self.down)


def _deepspeed(layer: MoE, rank: int, world_size: int, backend: Backend) -> Callable[[Tensor], Tensor]:
    """Return DeepSpeed's layer with the weights of ours."""
    import deepspeed
    from deepspeed.moe.layer import MoE as Theirs

    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    gate_up, down = layer.experts.gate_up, layer.experts.down
    theirs: Any = Theirs(
        gate_up.shape[-1],
        _Expert(gate_up[0], down[0]),
        num_experts=len(down),
        ep_size=world_size,
        k=TOP_K,
        drop_tokens=False,
        use_rts=False,
        top2_2nd_expert_sampling=False,
    ).to(down.device)
    theirs.set_deepspeed_parallelism()
    share = len(down) // world_size
    with torch.no_grad():
        theirs.deepspeed_moe.gate.wg.weight.copy_(layer.router.weight)
        for index, expert in enumerate(theirs.deepspeed_moe.experts.deepspeed_experts):
            expert.gate_up.copy_(gate_up[rank * share + index])
            expert.down.copy_(down[rank * share + index])
    return lambda x: theirs(x[None])[0][0]


def _sent(sizes: Sizes, groups: MeshGroups, x_ND: Tensor) -> dict[str, tuple[int, int]]:
    """Return what a forward sends with as many experts a token as it may choose from half of the nodes, at most 8."""
    nodes = groups.mesh.degrees.expert
    top_groups = max(1, nodes // 2)
    found = {}
    for name, limit in (("anywhere", nodes), ("limited", top_groups)):
        top_k = min(8, sizes.experts // nodes * top_groups)
        routing = Routing(num_experts=sizes.experts, top_k=top_k, num_groups=nodes, top_groups=limit, balance="none")
        layer = _layer(sizes, routing).to(x_ND.device, x_ND.dtype)
        parallelize(layer, ExpertGroups.of(groups), node_size=1)
        with torch.no_grad():
            layer(x_ND[None])
        stats = dispatch_stats(layer)
        found[name] = stats.between_bytes_per_route, stats.between_bytes
    return found


if __name__ == "__main__":
    sys.exit(main())
