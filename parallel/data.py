"""Data parallelism by torch alone: ranks with tokens of their own, whose gradients are summed.

Two forms with one face (`DataParallel`). `Replicated` here: every rank keeps all weights and gradients, which are
summed in buckets while backward is still running. `FullySharded` in `parallel.zero`: FSDP2 keeps a part of each.

The model may be tensor, expert or context parallel already: what a parameter's `Shard` says stays true, and what is
local is what is shared out here. Gradients are summed and never averaged, because each rank's loss is its share of the
whole step's: over replicate x shard x context, and for a parameter of an expert only over the ranks that hold it.

What an optimizer updates are the `masters`: flat tensors, in a wider dtype than what forward reads if so asked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from parallel.groups import MeshGroups
from parallel.mesh import Mesh
from parallel.shards import Shard, shard_of


@dataclass(frozen=True, slots=True, eq=False)
class Master:
    """What the optimizer of this rank updates of one parameter."""

    name: str
    """Of the parameter, in the model that one process would have."""
    parameter: nn.Parameter
    """What the optimizer was given for it, as it was before anything was shared out."""
    shard: Shard
    """Where the local tensor lies in the whole one."""
    tensor: nn.Parameter
    """Elements [start, start + n) of the flattened local tensor; n may be 0."""
    start: int
    """First element, in the flattened local tensor."""
    weight: Tensor
    """The same elements in the dtype that forward reads; `tensor`'s own memory where that is the same."""
    copy: int
    """Which of the equal copies of these elements this is."""
    num_copies: int
    """How many ranks hold these elements."""


class DataParallel(Protocol):
    """Gradients summed over the data ranks; every rank calls every method.

    begin(n); for each micro-batch micro_batch(is_last), forward, backward; finish(); update the `masters`; refresh().
    Under a pipeline the schedule runs between begin and finish.
    """

    @property
    def masters(self) -> Sequence[Master]:
        """In the order of the model's parameters; the same objects for as long as this lives."""

    def begin(self, num_micro_batches: int) -> None:
        """Start a step in which each parameter receives this number of gradients."""

    def micro_batch(self, is_last: bool) -> None:
        """Say before each forward whether it is the last of the step; a pipeline does not."""

    def finish(self) -> None:
        """Leave the summed gradient in `grad` of every master."""

    def refresh(self) -> None:
        """Drop the gradients, and let forward see what was written to the masters."""

    def close(self) -> None:
        """Take out hooks and groups; the model stays."""


def data_grid(mesh: Mesh, rank: int, *, is_expert: bool) -> list[list[int]]:
    """Return the ranks that sum a gradient with `rank`: a row for each replica, a column for each of its shards.

    A replica is shard x context ranks; where `shard` is 1 there is one replica of all of them, so that a recipe that
    only counts data ranks shards over these. An expert's are the ranks at its own place in the expert groups.
    """
    members, degrees = mesh.group(rank, "replicate", "shard", "context"), mesh.degrees
    width = degrees.shard * degrees.context if degrees.shard > 1 else len(members)
    if is_expert:
        place = mesh.data_rank(rank) % degrees.expert
        members = [member for member in members if mesh.data_rank(member) % degrees.expert == place]
        width = len(members) if degrees.shard % degrees.expert else width // degrees.expert
    return [members[start : start + width] for start in range(0, len(members), width)]


class DataGroups:
    """Process groups over data ranks, those of experts included; the latter are destroyed by `close`."""

    def __init__(self, groups: MeshGroups) -> None:
        self.mesh = groups.mesh
        self._groups = groups
        self._own: dict[tuple[int, ...], ProcessGroup] = {}
        self._rank = dist.get_rank()

    def grid(self, shard: Shard) -> list[list[int]]:
        """Return the ranks that sum the gradient of a parameter, see `data_grid`."""
        return data_grid(self.mesh, self._rank, is_expert=self.is_expert(shard))

    def is_expert(self, shard: Shard) -> bool:
        """Return whether data ranks hold different experts of a parameter."""
        return "expert" in shard.axes and self.mesh.degrees.expert > 1

    def all(self, shard: Shard) -> ProcessGroup:
        """Return the group over which the gradient of a parameter is summed."""
        if not self.is_expert(shard):
            return self._groups.get("replicate", "shard", "context")
        return self.of([rank for row in self.grid(shard) for rank in row])

    def of(self, ranks: Sequence[int]) -> ProcessGroup:
        """Return the group of these ranks, one of which is this; its members must ask for it in the same order."""
        for axes in (("replicate",), ("shard",), ("shard", "context"), ("replicate", "shard", "context")):
            if list(ranks) == self.mesh.group(self._rank, *axes):
                return self._groups.get(*axes)
        key = tuple(ranks)
        if key not in self._own:
            self._own[key] = dist.new_group(list(ranks), use_local_synchronization=True, group_desc="data")
        return self._own[key]

    def copies(self, shard: Shard, data_ranks: Sequence[int]) -> tuple[int, int]:
        """Return (which copy, of how many) this rank holds of what these data ranks have in common."""
        tensor = 1 if "tensor" in shard.axes else self.mesh.degrees.tensor
        place = self.mesh.coordinates(self._rank).tensor if tensor > 1 else 0
        return data_ranks.index(self._rank) * tensor + place, len(data_ranks) * tensor

    def close(self) -> None:
        """Destroy the groups made here."""
        groups = list(self._own.values())
        self._own.clear()
        if dist.is_initialized():
            for group in groups:
                dist.destroy_process_group(group)


@dataclass(slots=True, eq=False)
class _Bucket:
    """Gradients that are summed in one collective."""

    group: ProcessGroup
    flat: Tensor
    places: list[_Place] = field(default_factory=list)
    num_missing: int = 0
    """Parameters whose gradient is not complete."""
    work: dist.Work | None = None


@dataclass(slots=True, eq=False)
class _Place:
    """Where one parameter's gradient lies in a bucket."""

    name: str
    gradient: Tensor
    num_arrived: int = 0


class Replicated:
    """All weights on every rank; gradients are summed bucket by bucket, each when backward has filled it.

    A bucket is filled when every parameter in it has received a gradient from each micro-batch, so nothing is sent
    before the last one, in whatever order a pipeline's schedule runs them. Buckets are sent in the same order on all
    ranks: the reverse of the parameters'.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        groups: MeshGroups,
        *,
        master_dtype: torch.dtype | None = None,
        bucket_numel: int = 50_000_000,
        overlap: bool = True,
    ) -> None:
        """Take over `modules`, whose parameters have different names and are on their device.

        With a `master_dtype` other than the parameters' the masters are copies of them, else they share their memory.
        Gradients are kept and summed in the masters' dtype. A bucket holds about `bucket_numel` elements. Without
        `overlap` all are sent after backward; the sums are the same bits.
        """
        self._groups = DataGroups(groups)
        self._overlap = overlap
        self._num_micro_batches = 1
        self._is_open = False
        named = list(unique_parameters(modules))
        self.masters: list[Master] = [self._master(name, parameter, master_dtype) for name, parameter in named]
        self._buckets = list(self._fill(named, bucket_numel))
        self._gradients = {place.name: place.gradient for bucket in self._buckets for place in bucket.places}
        self._next = 0
        by_name = {place.name: (bucket, place) for bucket in self._buckets for place in bucket.places}
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(_Arrival(self, *by_name[name]))  # type: ignore[no-untyped-call]
            for name, parameter in named
            if name in by_name
        ]

    def begin(self, num_micro_batches: int) -> None:
        """Start a step in which each parameter receives this number of gradients."""
        self._num_micro_batches = num_micro_batches
        self._next = 0
        self._is_open = True
        for bucket in self._buckets:
            bucket.num_missing, bucket.work = len(bucket.places), None
            for place in bucket.places:
                place.num_arrived = 0

    def micro_batch(self, is_last: bool) -> None:
        """Nothing: each gradient is counted when it arrives."""

    def arrived(self, bucket: _Bucket, place: _Place, parameter: Tensor) -> None:
        """Take in what one backward gave a parameter; send the bucket when it is full."""
        if not self._is_open or place.num_arrived == self._num_micro_batches:
            raise RuntimeError(
                f"parallel: {place.name} received a gradient after its {self._num_micro_batches} of this step; "
                "call begin() with the number of backward passes"
            )
        assert parameter.grad is not None
        if place.num_arrived:
            place.gradient.add_(parameter.grad)
        else:
            place.gradient.copy_(parameter.grad)
        parameter.grad = None
        place.num_arrived += 1
        if place.num_arrived == self._num_micro_batches:
            bucket.num_missing -= 1
        if self._overlap:
            while self._next < len(self._buckets) and not self._buckets[self._next].num_missing:
                self._reduce(self._buckets[self._next])
                self._next += 1

    def finish(self) -> None:
        """Leave the summed gradient in `grad` of every master."""
        for bucket in self._buckets[self._next :]:
            for place in bucket.places:
                if not place.num_arrived:  # unused in this step, on this rank
                    place.gradient.zero_()
            self._reduce(bucket)
        self._is_open = False
        for bucket in self._buckets:
            if bucket.work is not None:
                bucket.work.wait()
                bucket.work = None
        for master in self.masters:
            if master.name in self._gradients:
                master.tensor.grad = self._gradients[master.name].view(-1)

    @torch.no_grad()
    def refresh(self) -> None:
        """Drop the gradients, and let forward see what was written to the masters."""
        for master in self.masters:
            master.tensor.grad = None
        apart = [master for master in self.masters if master.weight.dtype != master.tensor.dtype]
        if apart:
            torch._foreach_copy_([master.weight for master in apart], [master.tensor.detach() for master in apart])

    def close(self) -> None:
        """Take out hooks and groups; the model stays."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._groups.close()

    @torch.no_grad()
    def _master(self, name: str, parameter: nn.Parameter, dtype: torch.dtype | None) -> Master:
        shard = shard_of(parameter)
        weight = parameter.detach().view(-1)
        copy, num_copies = self._groups.copies(shard, [rank for row in self._groups.grid(shard) for rank in row])
        return Master(
            name=name,
            parameter=parameter,
            shard=shard,
            tensor=nn.Parameter(weight if dtype in (None, weight.dtype) else weight.to(dtype), parameter.requires_grad),
            start=0,
            weight=weight,
            copy=copy,
            num_copies=num_copies,
        )

    def _fill(self, named: Sequence[tuple[str, nn.Parameter]], bucket_numel: int) -> Iterator[_Bucket]:
        """Yield buckets of neighbours, last parameters first; experts, whose ranks are others, apart."""
        dtypes = {master.name: master.tensor.dtype for master in self.masters}
        trained = [(name, parameter) for name, parameter in reversed(named) if parameter.requires_grad]
        open_ones: dict[tuple[bool, torch.dtype], list[tuple[str, nn.Parameter]]] = {}
        full: list[list[tuple[str, nn.Parameter]]] = []
        for name, parameter in trained:
            key = self._groups.is_expert(shard_of(parameter)), dtypes[name]
            members = open_ones.setdefault(key, [])
            members.append((name, parameter))
            if sum(member.numel() for _, member in members) >= bucket_numel:
                full.append(open_ones.pop(key))
        for members in [*full, *open_ones.values()]:
            yield self._bucket(members, dtypes[members[0][0]])

    def _bucket(self, members: Sequence[tuple[str, nn.Parameter]], dtype: torch.dtype) -> _Bucket:
        first = members[0][1]
        flat = torch.zeros(sum(parameter.numel() for _, parameter in members), dtype=dtype, device=first.device)
        bucket = _Bucket(self._groups.all(shard_of(first)), flat)
        parts = torch.split(flat, [parameter.numel() for _, parameter in members])
        for (name, parameter), part in zip(members, parts, strict=True):
            bucket.places.append(_Place(name, part.view(parameter.shape)))
        return bucket

    def _reduce(self, bucket: _Bucket) -> None:
        if bucket.group.size() > 1:
            bucket.work = dist.all_reduce(bucket.flat, group=bucket.group, async_op=True)


@dataclass(frozen=True, slots=True)
class _Arrival:
    """The hook on one parameter."""

    owner: Replicated
    bucket: _Bucket
    place: _Place

    def __call__(self, parameter: Tensor) -> None:
        self.owner.arrived(self.bucket, self.place, parameter)


def unique_parameters(modules: Sequence[nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters of all modules by name, shared ones once."""
    seen: set[nn.Parameter] = set()
    for module in modules:
        for name, parameter in module.named_parameters():
            if parameter not in seen:
                seen.add(parameter)
                yield name, parameter
