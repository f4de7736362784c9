"""The callers of the benchmark, and those that need more than torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from faulttol.bench.parts.callers import CALLERS, Caller, compiled, small_model


def deepspeed_zero(stage: int) -> Caller:
    """Return a caller that trains under DeepSpeed."""

    def call(rank: int, world_size: int, device: str) -> None:
        import deepspeed

        engine, *_ = deepspeed.initialize(
            model=small_model(),
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


QUICK = CALLERS
HEAVY: dict[str, Caller] = {"compiled, inductor": compiled("inductor")} | {
    f"DeepSpeed ZeRO {stage}": deepspeed_zero(stage) for stage in (1, 2, 3)
}


KINDS_OF_METHODS = {
    **dict.fromkeys(("all_reduce", "broadcast", "reduce", "gather", "scatter"), 64),
    **dict.fromkeys(("all_gather", "all_gather_into_tensor", "all_gather_coalesced"), 64),
    **dict.fromkeys(("send", "recv", "recv_any_source"), 64),
    **dict.fromkeys(("all_reduce_coalesced", "reduce_scatter", "reduce_scatter_tensor"), 128),
    **dict.fromkeys(("all_to_all", "all_to_all_single"), 128),
    "barrier": 0,
}
"""What every object with methods has, and how many bytes `methods` gives to each."""
KINDS_OF_GROUPS = {"all_gather_into_tensor_coalesced": 64, "reduce_scatter_tensor_coalesced": 128}
"""What only a process group has."""


def methods(of: Any, rank: int) -> dict[str, Callable[[], Any]]:
    """Every kind as a method of a process group or a backend of two ranks; rank 0 is every root."""
    x, whole = torch.ones(8, dtype=torch.float64), torch.ones(16, dtype=torch.float64)
    peer, is_root = 1 - rank, rank == 0

    def parts() -> list[Tensor]:
        return [torch.ones(8, dtype=torch.float64) for _ in range(2)]

    return {
        "all_reduce": lambda: of.allreduce([x]),
        "all_reduce_coalesced": lambda: of.allreduce_coalesced(parts()),
        "broadcast": lambda: of.broadcast([x], dist.BroadcastOptions()),
        "reduce": lambda: of.reduce([x], dist.ReduceOptions()),
        "all_gather": lambda: of.allgather([parts()], [x]),
        "all_gather_into_tensor": lambda: of._allgather_base(whole, x),
        "all_gather_coalesced": lambda: of.allgather_coalesced([[part] for part in parts()], [x]),
        "all_gather_into_tensor_coalesced": lambda: of.allgather_into_tensor_coalesced([whole], [x]),
        "reduce_scatter": lambda: of.reduce_scatter([x], [parts()]),
        "reduce_scatter_tensor": lambda: of._reduce_scatter_base(x, whole),
        "reduce_scatter_tensor_coalesced": lambda: of.reduce_scatter_tensor_coalesced([x], [whole]),
        "gather": lambda: of.gather([parts()] if is_root else [], [x], dist.GatherOptions()),
        "scatter": lambda: of.scatter([x], [parts()] if is_root else [], dist.ScatterOptions()),
        "all_to_all": lambda: of.alltoall(parts(), parts()),
        "all_to_all_single": lambda: of.alltoall_base(whole.clone(), whole, [], []),
        "barrier": lambda: of.barrier(dist.BarrierOptions()),
        "send": lambda: of.send([x], peer, 0) if is_root else of.recv([x], peer, 0),
        "recv": lambda: of.recv([x], peer, 0) if is_root else of.send([x], peer, 0),
        "recv_any_source": lambda: of.recv_anysource([x], 0) if is_root else of.send([x], peer, 0),
    }
