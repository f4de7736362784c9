"""Everybody who starts collectives, each as a function of (rank, world size), to count what a recorder saw of it."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor, nn

Caller = Callable[[int, int], None]


def plain(rank: int, world_size: int) -> None:
    """Every collective of `torch.distributed`, those that wait and those that return a work."""
    x = torch.ones(8)
    whole = torch.ones(8 * world_size)
    parts = [torch.ones(8) for _ in range(world_size)]
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
    dist.monitored_barrier()
    with torch.inference_mode():
        dist.all_reduce(torch.ones(3))


def objects(rank: int, world_size: int) -> None:
    """Collectives of pickled objects."""
    got: list[Any] = [None] * world_size
    dist.all_gather_object(got, {"rank": rank})
    dist.broadcast_object_list(got, 0)
    dist.gather_object(rank, got if rank == 0 else None)
    dist.scatter_object_list([None], got if rank == 0 else None)
    assert got[0] in ({"rank": 0}, 0)


def messages(rank: int, world_size: int) -> None:
    """Messages between the first two ranks."""
    x, peer = torch.ones(8), 1 - rank
    if rank > 1:
        return
    if rank == 0:
        dist.send(x, peer)
        dist.recv(x)
    else:
        dist.recv(x, peer)
        dist.send(x, peer)
    both = [dist.isend(x, peer), dist.irecv(torch.ones(8), peer)]
    both += dist.batch_isend_irecv(
        [dist.P2POp(dist.isend, x, peer), dist.P2POp(dist.irecv, torch.ones(8), peer)],
    )
    for work in both:
        assert work is not None
        work.wait()


def bare_backends(rank: int, world_size: int) -> None:
    """Messages and a collective of a backend that belongs to no process group, as pipelines have."""
    if rank > 1:
        return
    store = dist.PrefixStore("bare", dist.distributed_c10d._get_default_store())
    backend = dist.distributed_c10d.ProcessGroupGloo(store, 1 - rank, 2, timedelta(seconds=20))
    for _ in range(2):
        work = backend.send([torch.ones(4)], 1, 0) if rank == 1 else backend.recv([torch.ones(4)], 0, 0)
        work.wait()
    backend.allreduce([torch.ones(2)]).wait()
    backend.shutdown()


def functional_collectives(rank: int, world_size: int) -> None:
    """The functional collectives that DTensor uses, whose waits are in C++."""
    x, group = torch.ones(8), dist.group.WORLD
    whole = torch.ones(8 * world_size)
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


def new_groups(rank: int, world_size: int) -> None:
    """A group of some ranks, and a device mesh."""
    group = dist.new_group([0, 1])
    if rank < 2:
        dist.all_reduce(torch.ones(2), group=group)
    mesh = dist.device_mesh.init_device_mesh("cpu", (world_size,))
    dist.all_reduce(torch.ones(2), group=mesh.get_group())


def ddp(rank: int, world_size: int) -> None:
    """DistributedDataParallel, whose reducer is C++ and has several buckets here."""
    model = nn.parallel.DistributedDataParallel(_model(), bucket_cap_mb=0.001)
    for _ in range(3):
        model(torch.ones(2, 16)).sum().backward()


def fsdp2(rank: int, world_size: int) -> None:
    """`fully_shard`."""
    from torch.distributed.fsdp import fully_shard

    model = _model()
    mesh = dist.device_mesh.init_device_mesh("cpu", (world_size,))
    for part in model:
        if isinstance(part, nn.Linear):
            fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for _ in range(2):
        model(torch.ones(2, 16)).sum().backward()


def dtensor(rank: int, world_size: int) -> None:
    """A DTensor that is sharded and gathered."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = dist.device_mesh.init_device_mesh("cpu", (world_size,))
    sharded = distribute_tensor(torch.ones(8 * world_size, 2), mesh, [Shard(0)])
    assert sharded.redistribute(mesh, [Replicate()]).to_local().shape[0] == 8 * world_size
    assert sharded.sum().full_tensor() == 16 * world_size


def compiled(backend: str) -> Caller:
    """Return a caller whose collectives are in a compiled graph."""

    def call(rank: int, world_size: int) -> None:
        def step(x: Tensor) -> Tensor:
            reduced = functional.all_reduce(x * 2, "sum", dist.group.WORLD)
            return functional.reduce_scatter_tensor(reduced + 1, "sum", 0, dist.group.WORLD).cos()

        run = torch.compile(step, backend=backend, fullgraph=True)
        for _ in range(2):
            run(torch.ones(8 * world_size))

    return call


def deepspeed_zero(stage: int) -> Caller:
    """Return a caller that trains under DeepSpeed."""

    def call(rank: int, world_size: int) -> None:
        import deepspeed

        engine, *_ = deepspeed.initialize(
            model=_model(),
            config={
                "train_micro_batch_size_per_gpu": 2,
                "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
                "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
                "zero_allow_untested_optimizer": True,
            },
            dist_init_required=False,
        )
        for _ in range(2):
            engine.backward(engine(torch.ones(2, 16)).sum())
            engine.step()
        engine.destroy()

    return call


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))


BARE = "bare backends"
QUICK: dict[str, Caller] = {
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
HEAVY: dict[str, Caller] = {"compiled, inductor": compiled("inductor")} | {
    f"DeepSpeed ZeRO {stage}": deepspeed_zero(stage) for stage in (1, 2, 3)
}
