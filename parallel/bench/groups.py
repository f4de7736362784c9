"""Making all process groups of a mesh costs a rank its own groups, not those of everybody.

    python -m parallel.bench.groups [--ranks 8,16,32] [--repeats N] [--json FILE] [--smoke]

Ranks on this machine (gloo) make the usual groups of a mesh with as many axes of 2 as fit. `ours` is `prepare`, and
`torch` torch.distributed.new_group for every group of every axis on all ranks, which is what it asks for without
use_local_synchronization. Both connect every rank to the others in its groups; time is that of the slowest rank.
Gate: a rank makes one group for each set of axes at most.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from parallel.bench import Gate, Report, arguments, spawn
from parallel.config import ParallelConfig
from parallel.groups import USUAL, MeshGroups
from parallel.mesh import Mesh


def main(words: list[str]) -> int:
    """Run the benchmark and print its table."""
    parser = arguments(__doc__)
    parser.add_argument("--ranks", default="8,16,32", help="numbers of ranks (default: %(default)s)")
    options = parser.parse_args(words)
    sizes = [4] if options.smoke else [int(word) for word in options.ranks.split(",")]
    repeats = 1 if options.smoke else options.repeats
    report = Report("parallel.groups", {"ranks": sizes, "sets_of_axes": len(USUAL), "backend": "gloo"})
    for num_ranks in sizes:
        results = spawn(_measure, num_ranks, "gloo", repeats)
        assert results is not None, "not a benchmark for torchrun"
        times, num_made = results[0]
        for case, values in times.items():
            report.add(f"{num_ranks} ranks", case, "s", *values)
        most = max(made for _, made in results)
        report.add(f"{num_ranks} ranks", "groups of a rank, ours", "1", num_made)
        report.gates.append(Gate(f"groups of a rank, {num_ranks} ranks", most, len(USUAL), most <= len(USUAL)))
    return report.finish(options)


def degrees_of(num_ranks: int) -> ParallelConfig:
    """Return degrees of 2 along as many axes as a power of two has factors; shard takes what is left."""
    left, chosen = num_ranks, {"tensor": 1, "replicate": 1, "pipeline": 1, "context": 1}
    for axis in chosen:
        if left % 2 == 0 and left > 2:
            chosen[axis], left = 2, left // 2
    return ParallelConfig(
        tensor=chosen["tensor"],
        replicate=chosen["replicate"],
        pipeline=chosen["pipeline"],
        context=chosen["context"],
        shard=left,
        expert=chosen["replicate"],
    )


def _measure(rank: int, world_size: int, repeats: int) -> tuple[dict[str, list[float]], int]:
    mesh = Mesh(degrees_of(world_size), world_size)
    times: dict[str, list[float]] = {"ours": [], "torch": []}
    num_made = 0
    for _ in range(repeats):
        num_before = len(dist.distributed_c10d._world.pg_map)
        groups = MeshGroups(mesh)
        times["ours"].append(_slowest(groups.prepare))
        num_made = len(dist.distributed_c10d._world.pg_map) - num_before
        theirs: list[dist.ProcessGroup] = []
        times["torch"].append(_slowest(functools.partial(_make_all, mesh, theirs)))
        dist.barrier()
        groups.close()
        for group in theirs:
            dist.destroy_process_group(group)
    return times, num_made


def _make_all(mesh: Mesh, made: list[dist.ProcessGroup]) -> None:
    """Make every group of the mesh once, as a program does that has only new_group."""
    lists = {tuple(group) for axes in USUAL for group in mesh.groups(*axes) if len(group) < mesh.world_size}
    for members in sorted(lists):
        group = dist.new_group(list(members))
        if dist.get_rank() in members:
            made.append(group)


def _slowest(action: Callable[[], None]) -> float:
    dist.barrier()
    begun_s = time.perf_counter()
    action()
    taken_s = torch.tensor(time.perf_counter() - begun_s, dtype=torch.float64)
    dist.all_reduce(taken_s, op=dist.ReduceOp.MAX)
    return taken_s.item()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
