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
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from parallel.groups import MeshGroups
from parallel.mesh import Along, Mesh
from parallel.shards import Shard, shard_of


@dataclass(frozen=True, slots=True, eq=False)
class Master:
    """What the optimizer of this rank updates of one parameter."""

    name: str
    """Of the parameter, in the model that one process would have."""
    shard: Shard
    """Where the local tensor lies in the whole one."""
    tensor: nn.Parameter
    """Elements [start, start + n) of the flattened local tensor; n may be 0."""
    start: int
    """First element, in the flattened local tensor."""
    weight: Tensor
    """The same elements in the dtype that forward reads; `tensor`'s own memory where that is the same."""
    parts: tuple[Along, ...]
    """Axes along which ranks hold the other elements of the local tensor."""
    copy: int
    """Which of the equal copies of these elements this is."""
    num_copies: int
    """How many ranks hold these elements."""


class DataParallel(Protocol):
    """Gradients summed over the data ranks; every rank calls every method.

    begin(); for each micro-batch micro_batch(is_last), forward, backward; finish(); update the `masters`; refresh().
    Under a pipeline the schedule runs between begin and finish, and calls stage_finished instead of micro_batch.
    """

    @property
    def masters(self) -> Sequence[Master]:
        """In the order of the model's parameters; the same objects for as long as this lives."""

    def begin(self) -> None:
        """Start a step."""

    def micro_batch(self, is_last: bool) -> None:
        """Say before each forward whether it is the last of the step."""

    def stage_finished(self, index: int) -> None:
        """Say that this rank's stage `index` (counted from 0) receives no more gradients in this step."""

    def finish(self) -> None:
        """Leave the summed gradient in `grad` of every master."""

    def refresh(self) -> None:
        """Drop the gradients, and let forward see what was written to the masters."""

    def close(self) -> None:
        """Take out hooks; the model stays, and so do the groups."""


def holders(shard: Shard) -> tuple[Along, ...]:
    """Return the axes along which ranks add up the gradient of a parameter: those that hold the same part of it."""
    return ("expert_data", "context") if "expert" in shard.axes else ("replicate", "shard", "context")


def copies(mesh: Mesh, rank: int, shard: Shard, axes: Sequence[Along]) -> tuple[int, int]:
    """Return (which copy, of how many) a rank holds of a part that is the same along data axes and what else it may."""
    also: tuple[Along, ...] = () if "tensor" in shard.axes else ("tensor",)
    members = mesh.group(rank, *axes, *also)
    return members.index(rank), len(members)


@dataclass(slots=True, eq=False)
class _Place:
    """Where one parameter's gradient lies in a bucket."""

    name: str
    gradient: Tensor
    stages: frozenset[int]
    """Of this rank, which use the parameter."""
    has_arrived: bool = False
    is_complete: bool = False


@dataclass(slots=True, eq=False)
class _Bucket:
    """Gradients that are summed in one collective."""

    group: ProcessGroup
    flat: Tensor
    places: list[_Place]
    work: dist.Work | None = None
    is_sent: bool = False


class Replicated:
    """All weights on every rank; gradients are summed bucket by bucket, each when backward has filled it.

    A bucket is full when none of its parameters receives another gradient in this step, so nothing is sent before the
    last micro-batch. Without stages buckets are sent in one order, the reverse of the parameters'; those of a stage
    when it has finished, which is the same moment of the schedule on all ranks that share the bucket.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: MeshGroups,
        *,
        stages: Sequence[nn.Module] = (),
        master_dtype: torch.dtype | None = None,
        bucket_numel: int = 50_000_000,
        overlap: bool = True,
    ) -> None:
        """Take over `model`, which is on its device; `stages` are its parts that a pipeline runs.

        With a `master_dtype` other than the parameters' the masters are copies of them, else they share their memory.
        Gradients are kept and summed in the masters' dtype. A bucket holds about `bucket_numel` elements. Without
        `overlap` all are sent after backward; the sums are the same bits.
        """
        self._groups = groups
        self._overlap = overlap
        self._is_last = False
        self._is_open = False
        self._finished: set[int] = set()
        named = dict(model.named_parameters())
        self.masters: list[Master] = [self._master(name, parameter, master_dtype) for name, parameter in named.items()]
        self._buckets = list(self._fill(named, _users(named, stages), bucket_numel))
        self._gradients = {place.name: place.gradient for bucket in self._buckets for place in bucket.places}
        self._hooks = [
            named[place.name].register_post_accumulate_grad_hook(_Arrival(self, place, bucket))  # type: ignore[no-untyped-call]
            for bucket in self._buckets
            for place in bucket.places
        ]

    def begin(self) -> None:
        """Start a step."""
        self._is_last, self._is_open = False, True
        self._finished.clear()
        for bucket in self._buckets:
            bucket.work, bucket.is_sent = None, False
            for place in bucket.places:
                place.has_arrived = place.is_complete = False

    def micro_batch(self, is_last: bool) -> None:
        """Say before each forward whether it is the last of the step."""
        self._is_last = is_last

    def arrived(self, place: _Place, bucket: _Bucket, parameter: Tensor) -> None:
        """Take in what one backward gave a parameter; send its bucket when it is full."""
        if not self._is_open or bucket.is_sent:
            raise RuntimeError(
                f"parallel: {place.name} received a gradient after its last one of this step; call begin() before a "
                "step, and micro_batch(True) before no other forward than the last"
            )
        assert parameter.grad is not None
        if place.has_arrived:
            place.gradient.add_(parameter.grad)
        else:
            place.gradient.copy_(parameter.grad)
        parameter.grad = None
        place.has_arrived = True
        if self._is_last:
            place.is_complete = True
            self._send_full()

    def stage_finished(self, index: int) -> None:
        """Say that this rank's stage `index` receives no more gradients in this step."""
        self._finished.add(index)
        if not self._overlap:
            return
        for bucket in self._buckets:
            if not bucket.is_sent and all(place.stages <= self._finished for place in bucket.places):
                self._send(bucket)

    def finish(self) -> None:
        """Leave the summed gradient in `grad` of every master."""
        for bucket in self._buckets:
            if not bucket.is_sent:
                self._send(bucket)
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
        """Take out hooks; the model stays, and so do the groups."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    @torch.no_grad()
    def _master(self, name: str, parameter: nn.Parameter, dtype: torch.dtype | None) -> Master:
        shard = shard_of(parameter)
        weight = parameter.detach().view(-1)
        copy, num_copies = copies(self._groups.mesh, self._groups.rank, shard, holders(shard))
        return Master(
            name=name,
            shard=shard,
            tensor=nn.Parameter(weight if dtype in (None, weight.dtype) else weight.to(dtype), parameter.requires_grad),
            start=0,
            weight=weight,
            parts=(),
            copy=copy,
            num_copies=num_copies,
        )

    def _fill(
        self, named: dict[str, nn.Parameter], users: dict[str, frozenset[int]], bucket_numel: int
    ) -> Iterator[_Bucket]:
        """Yield buckets of neighbours, last parameters first; those of other ranks or stages apart."""
        dtypes = {master.name: master.tensor.dtype for master in self.masters}
        open_ones: dict[object, list[str]] = {}
        full: list[list[str]] = []
        for name, parameter in reversed(named.items()):
            if not parameter.requires_grad:
                continue
            key = holders(shard_of(parameter)), dtypes[name], users[name]
            members = open_ones.setdefault(key, [])
            members.append(name)
            if sum(named[member].numel() for member in members) >= bucket_numel:
                full.append(open_ones.pop(key))
        for members in [*full, *open_ones.values()]:
            sizes = [named[name].numel() for name in members]
            first = named[members[0]]
            flat = torch.zeros(sum(sizes), dtype=dtypes[members[0]], device=first.device)
            parts = zip(members, torch.split(flat, sizes), strict=True)
            places = [_Place(name, part.view(named[name].shape), users[name]) for name, part in parts]
            yield _Bucket(self._groups.get(*holders(shard_of(first))), flat, places)

    def _send_full(self) -> None:
        """Send the first buckets that are full and have not left."""
        if not self._overlap:
            return
        for bucket in self._buckets:
            if bucket.is_sent:
                continue
            if not all(place.is_complete for place in bucket.places):
                return
            self._send(bucket)

    def _send(self, bucket: _Bucket) -> None:
        for place in bucket.places:
            if not place.has_arrived:  # unused in this step, on this rank
                place.gradient.zero_()
        bucket.is_sent = True
        if bucket.group.size() > 1:
            bucket.work = dist.all_reduce(bucket.flat, group=bucket.group, async_op=True)


@dataclass(frozen=True, slots=True)
class _Arrival:
    """The hook on one parameter."""

    owner: Replicated
    place: _Place
    bucket: _Bucket

    def __call__(self, parameter: Tensor) -> None:
        self.owner.arrived(self.place, self.bucket, parameter)


def _users(named: dict[str, nn.Parameter], stages: Sequence[nn.Module]) -> dict[str, frozenset[int]]:
    """Return which stages use each parameter, by name."""
    used = [set(stage.parameters()) for stage in stages]
    return {
        name: frozenset(index for index, parameters in enumerate(used) if parameter in parameters)
        for name, parameter in named.items()
    }
