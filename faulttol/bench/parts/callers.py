"""Everybody who starts collectives, each as a function of (rank, world size, device), to see what is recorded of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as published
from torch import Tensor, nn

import faulttol
from faulttol.operations import OPERATORS

Caller = Callable[[int, int, str], None]
functional: Any = published  # its types do not admit the default group


def called(call: Callable[[], None]) -> Counter[str]:
    """Return how often what kind of collective was called meanwhile, as torch's profiler counts the operators."""
    kinds = {f"c10d::{operation.name}": operation.kind for operation in OPERATORS}
    with torch.autograd.profiler.profile(use_device=None) as profile:
        call()
    events: Any = profile.function_events
    return Counter(kinds[event.name] for event in events if event.name in kinds)


def count(rank: int, world_size: int, device: str, callers: Mapping[str, Caller]) -> dict[str, Counter[str]]:
    """Run callers, each as a phase of its name; return by caller how often what was called."""
    counts = {}
    for step, (name, caller) in enumerate(callers.items()):
        faulttol.mark_step(step, phase=name)
        counts[name] = called(lambda caller=caller: caller(rank, world_size, device))  # type: ignore[misc]
    faulttol.mark_phase("over")
    if BARE in counts:  # no operators: counted by hand
        counts[BARE] = Counter({"recv" if rank == 0 else "send": 2, "all_reduce": 1})
    return counts


def plain(rank: int, world_size: int, device: str) -> None:
    """Every collective of `torch.distributed`, those that wait and those that return a work."""
    x, whole = torch.ones(8, device=device), torch.ones(8 * world_size, device=device)
    parts = [torch.ones(8, device=device) for _ in range(world_size)]
    rooted = parts if rank == 0 else None
    for later in (False, True):
        works = [
            dist.all_reduce(x, async_op=later),
            dist.broadcast(x, 1, async_op=later),
            dist.reduce(x, 1, async_op=later),
            dist.all_gather(parts, x, async_op=later),
            dist.all_gather_into_tensor(whole, x, async_op=later),
            dist.reduce_scatter(x, parts, async_op=later),
            dist.reduce_scatter_tensor(x, whole, async_op=later),
            dist.gather(x, rooted, async_op=later),
            dist.scatter(x, rooted, async_op=later),
            dist.all_to_all_single(whole.clone(), whole, async_op=later),
            dist.barrier(async_op=later),
        ]
        for work in works:
            if work is not None:
                work.wait()
    if device == "cpu":
        dist.monitored_barrier()
    else:
        dist.all_to_all(parts, [part.clone() for part in parts])
    with torch.inference_mode():
        dist.all_reduce(torch.ones(3, device=device))


def objects(rank: int, world_size: int, device: str) -> None:
    """Collectives of pickled objects."""
    got: list[Any] = [None] * world_size
    dist.all_gather_object(got, {"rank": rank})
    dist.broadcast_object_list(got, 0)
    dist.gather_object(rank, got if rank == 0 else None)
    dist.scatter_object_list([None], got if rank == 0 else None)
    assert got[0] in ({"rank": 0}, 0)


def messages(rank: int, world_size: int, device: str) -> None:
    """Messages between the first two ranks; on NCCL those of a batch have one work."""
    x, peer = torch.ones(8, device=device), 1 - rank
    if rank > 1:
        return
    if rank == 0:
        dist.send(x, peer)
        dist.recv(x, None if device == "cpu" else peer)
    else:
        dist.recv(x, peer)
        dist.send(x, peer)
    both = [dist.P2POp(dist.isend, x, peer), dist.P2POp(dist.irecv, torch.ones(8, device=device), peer)]
    for work in dist.batch_isend_irecv(both):
        work.wait()
    if device == "cpu":
        for single in (dist.isend(x, peer), dist.irecv(torch.ones(8), peer)):
            assert single is not None
            single.wait()


def bare_backends(rank: int, world_size: int, device: str) -> None:
    """Messages and a collective of a backend that belongs to no process group, as pipelines have."""
    if rank > 1:
        return
    store: Any = dist.PrefixStore("bare", dist.distributed_c10d._get_default_store())  # type: ignore[attr-defined]
    backend: Any
    if device == "cpu":
        backend = dist.ProcessGroupGloo(store, 1 - rank, 2, timedelta(seconds=20))
    else:
        backend = dist.ProcessGroupNCCL(store, 1 - rank, 2, dist.ProcessGroupNCCL.Options())
    x = torch.ones(4, device=device)
    for _ in range(2):
        work = backend.send([x], 1, 0) if rank == 1 else backend.recv([x], 0, 0)
        work.wait()
    backend.allreduce([x]).wait()
    if device != "cpu":
        torch.cuda.synchronize()
    backend.shutdown()


def functional_collectives(rank: int, world_size: int, device: str) -> None:
    """The functional collectives that DTensor uses, whose waits are in C++."""
    x, group = torch.ones(8, device=device), dist.group.WORLD
    whole = torch.ones(8 * world_size, device=device)
    for made in (
        functional.all_reduce(x, "sum", group),
        functional.all_gather_tensor(x, 0, group),
        functional.reduce_scatter_tensor(whole, "sum", 0, group),
        functional.all_to_all_single(whole, None, None, group),
        functional.broadcast(x, 0, group),
        *functional.all_reduce_coalesced([x, x], "sum", group),
        *functional.all_gather_into_tensor_coalesced([x, x], group),
        *functional.reduce_scatter_tensor_coalesced([whole, whole], "sum", [0, 0], group),
    ):
        functional.wait_tensor(made)


def new_groups(rank: int, world_size: int, device: str) -> None:
    """A group of some ranks, and a device mesh."""
    group = dist.new_group([0, 1])
    if rank < 2:
        dist.all_reduce(torch.ones(2, device=device), group=group)
    mesh = dist.device_mesh.init_device_mesh(device, (world_size,))
    dist.all_reduce(torch.ones(2, device=device), group=mesh.get_group())


def ddp(rank: int, world_size: int, device: str) -> None:
    """DistributedDataParallel, whose reducer is C++ and has several buckets here."""
    model = nn.parallel.DistributedDataParallel(small_model().to(device), bucket_cap_mb=0.001)
    for _ in range(3):
        model(torch.ones(2, 16, device=device)).sum().backward()


def fsdp2(rank: int, world_size: int, device: str) -> None:
    """`fully_shard`."""
    from torch.distributed.fsdp import fully_shard

    model = small_model().to(device)
    mesh = dist.device_mesh.init_device_mesh(device, (world_size,))
    for part in model:
        if isinstance(part, nn.Linear):
            fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for _ in range(2):
        model(torch.ones(2, 16, device=device)).sum().backward()


def dtensor(rank: int, world_size: int, device: str) -> None:
    """A DTensor that is sharded and gathered."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = dist.device_mesh.init_device_mesh(device, (world_size,))
    sharded = distribute_tensor(torch.ones(8 * world_size, 2, device=device), mesh, [Shard(0)])
    gathered: Any = sharded.redistribute(mesh, [Replicate()])
    assert gathered.to_local().shape[0] == 8 * world_size


def compiled(backend: str) -> Caller:
    """Return a caller whose collectives are in a compiled graph."""

    def call(rank: int, world_size: int, device: str) -> None:
        def step(x: Tensor) -> Tensor:
            reduced = functional.all_reduce(x * 2, "sum", dist.group.WORLD)
            scattered: Tensor = functional.reduce_scatter_tensor(reduced + 1, "sum", 0, dist.group.WORLD)
            return scattered.cos()

        run: Any = torch.compile(step, backend=backend, fullgraph=True)
        for _ in range(2):
            run(torch.ones(8 * world_size, device=device))

    return call


def small_model() -> nn.Sequential:
    """Return a model of three layers, the same on all ranks."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))


BARE = "bare backends"
CALLERS: dict[str, Caller] = {
    "torch.distributed": plain,
    "objects": objects,
    "messages": messages,
    BARE: bare_backends,
    "functional": functional_collectives,
    "new groups": new_groups,
    "DDP": ddp,
    "FSDP2": fsdp2,
    "DTensor": dtensor,
    "compiled, aot_eager": compiled("aot_eager"),
}
"""Those that need nothing but torch and no compiler."""
