"""Data parallelism that keeps a part of every parameter on each rank: ZeRO 2 and 3 by torch's `fully_shard` (FSDP2).

What differs from plain FSDP2: gradients are summed, never averaged; parameters may be one tensor rank's local part,
of which dimension 0 is shared out, or an expert's, which has its own, smaller group; and pipelines may run any order
of forwards and backwards, with one reduction at the end of the step.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from parallel.data import DataGroups, Master, data_grid, unique_parameters
from parallel.groups import MeshGroups
from parallel.shards import Shard, shard_of


class FullySharded:
    """A part of every parameter, its gradient and its optimizer state on each rank of a replica.

        stage   parameters between forward and backward     gradients between micro-batches
        2       whole                                       sharded
        3       sharded, but for those outside of blocks    sharded
        2 or 3 in a pipeline: whole over the step            whole, reduced once

    Where there are several replicas, their shards of the gradient are summed at the last micro-batch.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        blocks: Sequence[nn.Module],
        groups: MeshGroups,
        *,
        stage: Literal[2, 3],
        compute_dtype: torch.dtype | None = None,
        in_pipeline: bool = False,
        overlap: bool = True,
    ) -> None:
        """Take over `modules`, on their device and in the masters' dtype; `blocks` are gathered one at a time.

        Each module is run by itself (a pipeline's stages). `compute_dtype` is what forward and backward read and
        write, None the masters'; gradients are summed in the masters' dtype. With `overlap` the next block is gathered
        while one computes.
        """
        self._groups = DataGroups(groups)
        self._in_pipeline = in_pipeline
        before = list(unique_parameters(modules))
        dtypes = {parameter.dtype for _, parameter in before}
        assert len(dtypes) == 1, f"masters have one dtype, these {dtypes}"
        self._dtype = dtypes.pop()
        self._compute_dtype = compute_dtype or self._dtype
        self._meshes = {is_expert: self._mesh(before[0][1], is_expert) for is_expert in self._kinds(before)}
        self._has_replicas = any(mesh.ndim == 2 for mesh in self._meshes.values())
        self._modules: list[FSDPModule] = []
        reshard = stage == 3 and not in_pipeline
        shards = {name: shard_of(parameter) for name, parameter in before}
        for module in modules:
            for experts in self._expert_modules(module):
                self._apply(experts, is_expert=True, reshard=reshard)
        for block in blocks:
            self._apply(block, is_expert=False, reshard=reshard)
        self._roots = [self._apply(module, is_expert=False, reshard=False) for module in modules]
        if overlap and not in_pipeline:
            self._prefetch(blocks)
        self._parameters = dict(unique_parameters(modules))
        self.masters: list[Master] = []
        self._describe(before, shards)

    def begin(self, num_micro_batches: int) -> None:
        """Start a step; in a pipeline nothing is reduced or dropped before `finish`."""
        if self._in_pipeline:
            for root in self._roots:
                root.set_is_last_backward(False)
                root.set_requires_gradient_sync(False)
                root.set_reshard_after_backward(False)

    def micro_batch(self, is_last: bool) -> None:
        """Say before each forward whether it is the last of the step."""
        for root in self._roots:
            root.set_is_last_backward(is_last)
            if self._has_replicas:
                root.set_requires_all_reduce(is_last)

    def finish(self) -> None:
        """Leave the summed gradient in `grad` of every master."""
        if self._in_pipeline:
            for root in self._roots:
                root.set_is_last_backward(True)
                root.set_requires_gradient_sync(True)
                root.set_reshard_after_backward(True)
                _reduce_now(root)
        for master in self.masters:
            gradient = self._parameters[master.name].grad
            if gradient is not None:
                assert isinstance(gradient, DTensor)
                master.tensor.grad = gradient.to_local().view(-1)
            elif master.tensor.requires_grad:  # unused in this step
                master.tensor.grad = torch.zeros_like(master.tensor)

    @torch.no_grad()
    def refresh(self) -> None:
        """Drop the gradients, and let forward see what was written to the masters."""
        for master in self.masters:
            master.tensor.grad = None
            self._parameters[master.name].grad = None
        for module in self._modules:
            module.reshard()
        if self._compute_dtype != self._dtype:
            torch._foreach_copy_(
                [master.weight for master in self.masters], [master.tensor.detach() for master in self.masters]
            )

    def close(self) -> None:
        """Destroy the groups made here; the model stays sharded."""
        self._groups.close()

    def _kinds(self, named: Sequence[tuple[str, nn.Parameter]]) -> list[bool]:
        """Return whether there are parameters of all ranks, and of experts; every rank of a stage sees the same."""
        return sorted({False} | {self._groups.is_expert(shard_of(parameter)) for _, parameter in named})

    def _mesh(self, like: Tensor, is_expert: bool) -> DeviceMesh:
        """Return the ranks that share parameters out, as FSDP2 takes them: (replicas x) shards."""
        grid = data_grid(self._groups.mesh, dist.get_rank(), is_expert=is_expert)
        (row,) = [row for row in grid if dist.get_rank() in row]
        shards = self._groups.of(row)
        if len(grid) == 1:
            return DeviceMesh.from_group(shards, like.device.type)
        replicas = self._groups.of([other[row.index(dist.get_rank())] for other in grid])
        names = ("replicate", "shard")
        return DeviceMesh.from_group([replicas, shards], like.device.type, torch.tensor(grid), mesh_dim_names=names)

    def _expert_modules(self, module: nn.Module) -> Iterator[nn.Module]:
        """Yield the modules that own parameters of experts."""
        for name, owner in module.named_modules():
            kinds = {self._groups.is_expert(shard_of(parameter)) for parameter in owner.parameters(recurse=False)}
            if kinds == {True, False}:
                raise ValueError(
                    f"parallel: {name} owns parameters of experts and others; give experts their own module"
                )
            if True in kinds:
                yield owner

    def _apply(self, module: nn.Module, *, is_expert: bool, reshard: bool) -> FSDPModule:
        fully_shard(
            module,
            mesh=self._meshes[is_expert],
            reshard_after_forward=reshard,
            mp_policy=MixedPrecisionPolicy(
                param_dtype=None if self._compute_dtype == self._dtype else self._compute_dtype,
                reduce_dtype=None if self._compute_dtype == self._dtype else self._dtype,
                cast_forward_inputs=False,  # positions, masks and losses keep their dtypes
            ),
        )
        assert isinstance(module, FSDPModule)
        # Plain sums, which gloo has as well: torch would scale by one inside of the reduction, which it has not.
        module.set_force_sum_reduction_for_comms(True)
        module.set_gradient_divide_factor(1.0)
        self._modules.append(module)
        return module

    def _prefetch(self, blocks: Sequence[nn.Module]) -> None:
        """Gather each block while the one before it computes; in backward FSDP2 does so itself."""
        for block, following in itertools.pairwise(blocks):
            assert isinstance(block, FSDPModule)
            block.set_modules_to_forward_prefetch([m for m in following.modules() if isinstance(m, FSDPModule)])

    @torch.no_grad()
    def _describe(self, before: Sequence[tuple[str, nn.Parameter]], shards: dict[str, Shard]) -> None:
        """List the masters: views of what FSDP2 keeps of every parameter on this rank."""
        locals_ = {name: _local(parameter) for name, parameter in self._parameters.items()}
        apart = self._compute_dtype != self._dtype
        sizes = [locals_[name].numel() for name, _ in before]
        first = next(iter(locals_.values()))
        # What forward reads in its own dtype exists only while it is gathered; a checkpoint wants it at any time.
        kept = torch.empty(sum(sizes) if apart else 0, dtype=self._compute_dtype, device=first.device)
        views = torch.split(kept, sizes) if apart else [locals_[name] for name, _ in before]
        for (name, parameter), weight in zip(before, views, strict=True):
            grid = self._groups.grid(shards[name])
            (row,) = [row for row in grid if dist.get_rank() in row]
            column = row.index(dist.get_rank())
            copy, num_copies = self._groups.copies(shards[name], [other[column] for other in grid])
            rows, inner = parameter.shape[0], math.prod(parameter.shape[1:])
            master = Master(
                name=name,
                parameter=parameter,
                shard=shards[name],
                tensor=nn.Parameter(locals_[name], requires_grad=parameter.requires_grad),
                start=min(column * math.ceil(rows / len(row)), rows) * inner,
                weight=weight,
                copy=copy,
                num_copies=num_copies,
            )
            if apart:
                weight.copy_(master.tensor)
            self.masters.append(master)


def _local(parameter: nn.Parameter) -> Tensor:
    """Return what this rank keeps of a parameter, flat; the memory that FSDP2 gathers from."""
    tensor = parameter.detach()
    assert isinstance(tensor, DTensor)
    local: Tensor = tensor.to_local()
    return local.view(-1)


def _reduce_now(root: FSDPModule) -> None:
    """Sum the gradients that backward passes left unreduced, whichever passes these were.

    FSDP2 reduces at the end of the last backward pass of a module. A schedule that splits input gradients from weight
    gradients has none, so torch's own pipelines call these two methods of FSDP2's state as well.
    """
    state: Any = fully_shard.state(root)  # type: ignore[attr-defined]
    for each in reversed(state._state_ctx.all_states):
        groups = each._fsdp_param_groups if hasattr(each, "_fsdp_param_groups") else [each._fsdp_param_group]
        for group in groups:
            if group is not None:
                group.post_backward()
    state._root_post_backward_final_callback()
