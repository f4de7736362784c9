"""Data parallelism that keeps a part of every parameter on each rank: ZeRO 1 to 3 by torch's `fully_shard` (FSDP2).

What differs from plain FSDP2: gradients are summed, never averaged; parameters may be one tensor rank's local part,
of which dimension 0 is shared out, or an expert's, which has its own, smaller group; and pipelines may run any order
of forwards and backwards, with one reduction at the end of the step.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from parallel.data import Master, copies, holders
from parallel.groups import MeshGroups
from parallel.mesh import Along, Mesh
from parallel.shards import Shard, shard_of


class FullySharded:
    """A part of every parameter, its gradient and its optimizer state on each rank of a replica.

        ZeRO    parameters between forward and backward     gradients between micro-batches
        1       whole                                       whole, reduced once
        2       whole                                       sharded
        3       sharded, but for those outside of blocks    sharded
        in a pipeline: whole over the step                  whole, reduced once

    Where there are several replicas, their shards of the gradient are summed at the last micro-batch.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        groups: MeshGroups,
        *,
        zero_stage: Literal[1, 2, 3],
        stages: Sequence[nn.Module] = (),
        compute_dtype: torch.dtype | None = None,
        overlap: bool = True,
    ) -> None:
        """Take over `model`, on its device and in the masters' dtype; `blocks` are gathered one at a time.

        `stages` are its parts that a pipeline runs. `compute_dtype` is what forward and backward read and
        write, None the masters'; gradients are summed in the masters' dtype. With `overlap` the next block is gathered
        while one computes.
        """
        self._groups = groups
        self._in_pipeline = bool(stages)
        self._reduces_once = zero_stage == 1
        before = list(model.named_parameters())
        dtypes = {parameter.dtype for _, parameter in before}
        assert len(dtypes) == 1, f"masters have one dtype, these {dtypes}"
        self._dtype = dtypes.pop()
        self._compute_dtype = compute_dtype or self._dtype
        self._meshes = {
            axes: groups.device_mesh(before[0][1].device.type, _dims(groups.mesh, axes))
            for axes in sorted({holders(shard_of(parameter)) for _, parameter in before} | {_DENSE})
        }
        self._has_replicas = self._meshes[_DENSE].ndim == 2
        self._modules: list[FSDPModule] = []
        self._finished: set[int] = set()
        reshard = zero_stage == 3 and not stages
        _check_apart(stages, dict(before))
        shards = {name: shard_of(parameter) for name, parameter in before}
        for experts in list(_expert_modules(model)):
            self._apply(experts, _EXPERT, reshard=reshard)
        for block in blocks:
            self._apply(block, _DENSE, reshard=reshard)
        self._roots = [self._apply(module, _DENSE, reshard=False) for module in stages or [model]]
        if overlap and not stages:
            self._prefetch(blocks)
        self._parameters = dict(model.named_parameters())
        self.masters: list[Master] = []
        self._describe(before, shards)

    def begin(self) -> None:
        """Start a step; in a pipeline nothing is reduced or dropped before a stage has finished."""
        self._finished.clear()
        if self._in_pipeline:
            for root in self._roots:
                root.set_is_last_backward(False)
                root.set_requires_gradient_sync(False)
                root.set_reshard_after_backward(False)

    def micro_batch(self, is_last: bool) -> None:
        """Say before each forward whether it is the last of the step."""
        for root in self._roots:
            root.set_is_last_backward(is_last)
            if self._reduces_once:
                root.set_requires_gradient_sync(is_last)
            elif self._has_replicas:
                root.set_requires_all_reduce(is_last)

    def stage_finished(self, index: int) -> None:
        """Say that this rank's stage `index` receives no more gradients in this step; they are reduced from here on."""
        self._finished.add(index)
        root = self._roots[index]
        root.set_is_last_backward(True)
        root.set_requires_gradient_sync(True)
        root.set_reshard_after_backward(True)
        _reduce_now(root)

    def finish(self) -> None:
        """Leave the summed gradient in `grad` of every master."""
        if self._in_pipeline:
            for index in sorted(set(range(len(self._roots))) - self._finished):
                self.stage_finished(index)
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
        """Nothing: the model stays sharded, the groups are the caller's."""

    def _apply(self, module: nn.Module, axes: tuple[Along, ...], *, reshard: bool) -> FSDPModule:
        fully_shard(
            module,
            mesh=self._meshes[axes],
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
            shard = shards[name]
            axes = holders(shard)
            dims = _dims(self._groups.mesh, axes)
            row = self._groups.mesh.group(self._groups.rank, *dims["shard"])
            column = row.index(self._groups.rank)
            copy, num_copies = copies(self._groups.mesh, self._groups.rank, shard, dims.get("replicate", ()))
            rows, inner = parameter.shape[0], math.prod(parameter.shape[1:])
            master = Master(
                name=name,
                shard=shard,
                tensor=nn.Parameter(locals_[name], requires_grad=parameter.requires_grad),
                start=min(column * math.ceil(rows / len(row)), rows) * inner,
                weight=weight,
                parts=dims["shard"],
                copy=copy,
                num_copies=num_copies,
            )
            if apart:
                weight.copy_(master.tensor)
            self.masters.append(master)


_DENSE: tuple[Along, ...] = holders(Shard(()))
_EXPERT: tuple[Along, ...] = holders(Shard((), ("expert",)))


def _dims(mesh: Mesh, axes: tuple[Along, ...]) -> dict[str, tuple[Along, ...]]:
    """Return the dimensions of the device mesh over which FSDP2 treats parameters that are equal along `axes`.

    Replicas times shards where both degrees are above 1, else shards alone. An expert has one replica: it is spread
    over data ranks already.
    """
    if axes == _DENSE and mesh.degrees.replicate > 1 and mesh.degrees.shard > 1:
        return {"replicate": ("replicate",), "shard": ("shard", "context")}
    return {"shard": axes}


def _expert_modules(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules that own parameters of experts."""
    for name, owner in module.named_modules():
        kinds = {"expert" in shard_of(parameter).axes for parameter in owner.parameters(recurse=False)}
        if kinds == {True, False}:
            raise ValueError(f"parallel: {name} owns parameters of experts and others; keep them apart")
        if True in kinds:
            yield owner


def _check_apart(stages: Sequence[nn.Module], named: dict[str, nn.Parameter]) -> None:
    """Raise ValueError if two stages use one parameter, of which FSDP2 would shard two copies."""
    names = {parameter: name for name, parameter in named.items()}
    uses = Counter(parameter for stage in stages for parameter in stage.parameters())
    shared = sorted(names[parameter] for parameter, count in uses.items() if count > 1)
    if shared:
        raise ValueError(
            f"parallel: two stages of one rank share {', '.join(shared)}, which ZeRO 1 to 3 cannot; untie it, take "
            "ZeRO 0, or a schedule whose first and last stage are on different ranks"
        )


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
