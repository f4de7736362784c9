"""The layout as DeepSpeed sees it: who holds the same parameters, who the same experts.

Nothing here is known to DeepSpeed by its own modules: it asks an `mpu` for groups, and knows experts by how their
parameters and parameter groups are marked.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import distributed as dist
from torch import nn

from parallel.groups import MeshGroups
from parallel.hybrid import Hybrid

EXPERTS = "_experts"
"""Ending of the names of parameter groups that hold experts."""


class Units:
    """The layout as DeepSpeed asks for it (its `mpu`)."""

    def __init__(self, groups: MeshGroups) -> None:
        self.data = groups.get("replicate", "shard", "context")
        self.model = groups.get("pipeline", "tensor")
        self.tensor = groups.get("tensor")
        self.expert_data = groups.get("expert_data", "context")

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """Ranks that hold the same parameters (but for experts) and have tokens of their own."""
        return self.data

    def get_data_parallel_world_size(self) -> int:
        return self.data.size()

    def get_data_parallel_rank(self) -> int:
        return self.data.rank()

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """Ranks that hold different parameters of one replica."""
        return self.model

    def get_model_parallel_world_size(self) -> int:
        return self.model.size()

    def get_model_parallel_rank(self) -> int:
        return self.model.rank()

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        return self.tensor

    def get_tensor_model_parallel_world_size(self) -> int:
        return self.tensor.size()

    def get_tensor_model_parallel_rank(self) -> int:
        return self.tensor.rank()


@contextlib.contextmanager
def shown_experts(model: nn.Module, optimizer: torch.optim.Optimizer, hybrid: Hybrid) -> Iterator[None]:
    """Let DeepSpeed reduce and shard experts over the ranks that hold the same ones.

    It does so for parameters marked `allreduce = False`, in parameter groups of their own that are named like a process
    group, if the model has a layer of its MoE class. Ours are other classes, so it is shown an empty one.
    """
    from deepspeed.moe.layer import MoE
    from deepspeed.utils import groups

    class Marker(MoE):  # type: ignore[misc]
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.num_experts = hybrid.mesh.size("expert")

        def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
            return

    experts = {name for name, shard in hybrid.shards.items() if "expert" in shard.axes}
    apart = set_apart(optimizer, experts, model, EXPERTS)
    for group in apart:
        group["moe"] = True
        for parameter in group["params"]:
            parameter.allreduce, parameter.group_name = False, group["name"]
    names = [group["name"] for group in apart]
    same_experts = hybrid.groups.get("expert_data", "context")
    groups._EXPERT_DATA_PARALLEL_GROUP.update(dict.fromkeys(names, same_experts))
    model.add_module(EXPERTS, Marker())
    try:
        yield
    finally:
        for name in names:
            groups._EXPERT_DATA_PARALLEL_GROUP.pop(name, None)


def set_apart(
    optimizer: torch.optim.Optimizer, chosen: set[str], model: nn.Module, ending: str
) -> list[dict[str, Any]]:
    """Give parameters groups of their own, named like their groups before with an `ending`; return the new groups."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    apart = []
    for group in list(optimizer.param_groups):
        members = [parameter for parameter in group["params"] if names[parameter] in chosen]
        if members:
            apart.append({**group, "params": members, "name": f"{group['name']}{ending}"})
            group["params"] = [parameter for parameter in group["params"] if names[parameter] not in chosen]
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]] + apart
    return apart


def forget_groups(units: Units) -> None:
    """Take the layout out of DeepSpeed, which keeps it for every later engine of the process."""
    from deepspeed.utils import groups

    if groups.mpu is units:
        groups.mpu = None
