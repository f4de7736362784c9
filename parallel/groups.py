"""The process groups of a mesh: made by their members alone, each at most once on a rank.

torch's `new_group` is a trap for a mesh. Without `use_local_synchronization` all ranks of the job must make all groups
of all ranks. With it, a group's name holds how many groups the rank has at that moment: ranks that made different
numbers of groups before wait for each other forever, and a group that is made again after another was destroyed finds
the addresses of its predecessor. Here a group's name says which group it is, so that only its members matter, and its
members meet in the store before they connect: what would be a hang is an error that names who is missing.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, cast

from parallel.errors import GroupError, MeshError
from parallel.mesh import Along, Coordinates, Mesh

if TYPE_CHECKING:
    import torch.distributed as dist
    from torch._C._distributed_c10d import Store
    from torch.distributed.device_mesh import DeviceMesh

USUAL: tuple[tuple[Along, ...], ...] = (
    ("pipeline",),
    ("replicate",),
    ("shard",),
    ("context",),
    ("tensor",),
    ("expert",),
    ("expert_data",),
    ("replicate", "shard"),
    ("shard", "context"),
    ("replicate", "shard", "context"),
)
"""Groups that `prepare()` makes when it is not told which."""


class MeshGroups:
    """Process groups of this rank over axes of a mesh; `close()` destroys them, as does the end of the `with` block.

    Where an exception ends the block they stay, and go with the process or the default group.

    Needs the default group (`torch.distributed.init_process_group`), whose backend the groups take.
    `timeout_s` is the longest time one collective may take, and the making of one group.

    A rank is in at most one group for each set of axes that is asked for, however many ranks there are, and sets that
    differ in axes of degree 1 share one. Every rank makes its `MeshGroups` of one default group in the same order.

    Raises:
        MeshError: the default group is missing, or has another number of ranks than the mesh.
    """

    def __init__(self, mesh: Mesh, *, timeout_s: float = 600.0) -> None:
        # torch takes a second to import, and a mesh alone does not need it.
        import torch.distributed as dist

        if not dist.is_initialized():
            raise MeshError("parallel: there is no default process group; call init_process_group first")
        if dist.get_world_size() != mesh.world_size:
            raise MeshError(
                f"parallel: the default process group has {dist.get_world_size()} ranks, "
                f"the mesh {mesh.world_size}; make the mesh for the ranks there are"
            )
        self.mesh = mesh
        self.rank = dist.get_rank()
        self._timeout = timedelta(seconds=timeout_s)
        self._groups: dict[tuple[int, ...], dist.ProcessGroup] = {}
        self._others: dict[tuple[str, tuple[int, ...]], dist.ProcessGroup] = {}
        # Each MeshGroups of one default group has a name of its own: what an earlier one left in the store stays.
        self._name = f"parallel/{_store().add(f'parallel/count/{self.rank}', 1)}"

    def prepare(self, *sets_of_axes: Sequence[Along]) -> None:
        """Make the groups over each set of axes, in one order whatever the order of the arguments; `USUAL` without any.

        All ranks call it with the same sets, at setup: then no later `get` waits for another rank.
        """
        for axes in sorted({tuple(sorted(set(axes))) for axes in sets_of_axes or USUAL}):
            self.get(*axes)

    def get(self, *axes: Along) -> dist.ProcessGroup:
        """Return this rank's group over the axes; a later call for the same ranks returns the same group.

        The first call is collective over the members, who make their groups in the same order; ranks of other
        groups need not take part (with NCCL and a default group that is bound to a device all ranks must: its
        communicators are split). One rank alone is a group too.

        Raises:
            GroupError: a member did not come within the timeout.
        """
        import torch.distributed as dist

        members = tuple(self.mesh.group(self.rank, *axes))
        if len(members) == self.mesh.world_size:
            assert dist.group.WORLD is not None
            return dist.group.WORLD
        if members not in self._groups:
            self._groups[members] = self._make(members, "x".join(sorted(set(axes))) or "alone")
        return self._groups[members]

    def of(self, ranks: Sequence[int], purpose: str) -> dist.ProcessGroup:
        """Return a group of these ranks, of which this is one, that serves `purpose` alone; like `get` in all else."""
        key = purpose, tuple(sorted(ranks))
        if key not in self._others:
            self._others[key] = self._make(key[1], purpose, apart=True)
        return self._others[key]

    def device_mesh(self, device_type: str, dims: Mapping[str, Sequence[Along]] | None = None) -> DeviceMesh:
        """Return torch's DeviceMesh over the same groups: name of a dimension -> the axes it runs over.

        Without `dims` its dimensions are the axes from the outermost to the innermost. `{"data": ("replicate",
        "shard")}` is one dimension over two axes; axes that no dimension names stay where this rank is. Ranks along a
        dimension are in the order of its group. Makes the groups that are missing, so the members must all call.

        Raises:
            MeshError: two dimensions share an axis.
        """
        import torch
        from torch.distributed.device_mesh import DeviceMesh

        chosen = dims or {axis: (axis,) for axis in cast("tuple[Along, ...]", Coordinates._fields)}
        named = [axis for axes in chosen.values() for axis in axes]
        if len(named) != len(set(named)):
            raise MeshError(f"parallel: dimensions {', '.join(chosen)} share an axis; each axis may be in one")
        ranks = self._grid([tuple(axes) for axes in chosen.values()])
        groups = [self.get(*axes) for axes in chosen.values()]
        shape = [self.mesh.size(*axes) for axes in chosen.values()]
        grid = torch.tensor(ranks, dtype=torch.int).reshape(shape)
        if len(groups) == 1:
            return DeviceMesh.from_group(groups[0], device_type, mesh_dim_names=tuple(chosen))
        return DeviceMesh.from_group(groups, device_type, mesh=grid, mesh_dim_names=tuple(chosen))

    def close(self) -> None:
        """Destroy the groups that were made; the default group stays, and a second call does nothing."""
        import torch.distributed as dist

        groups: Iterable[dist.ProcessGroup] = [*self._groups.values(), *self._others.values()]
        self._groups.clear()
        self._others.clear()
        if dist.is_initialized():  # else they went with the default group
            for group in groups:
                dist.destroy_process_group(group)

    def __enter__(self) -> MeshGroups:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Of a rank that failed, the groups stay until it has told so: without them its peers fail at once, and first.
        if kind is None:
            self.close()

    def _grid(self, dims: Sequence[tuple[Along, ...]]) -> list[int]:
        """Return the ranks of this rank's group over all dims, the last dim fastest."""
        ranks = [self.rank]
        for axes in dims:
            ranks = [other for rank in ranks for other in self.mesh.group(rank, *axes)]
        assert len(ranks) == math.prod(self.mesh.size(*axes) for axes in dims)
        return ranks

    def _make(self, members: tuple[int, ...], over: str, *, apart: bool = False) -> dist.ProcessGroup:
        """Meet the members, then connect to them; `apart` from another group of the same members."""
        from torch.distributed import distributed_c10d as c10d

        world = c10d._get_default_group()
        identity = repr((over, members) if apart else members)
        name = f"{self._name}/{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
        if world.bound_device_id is None:
            self._meet(name, members, over)
        else:
            self._meet(
                f"{self._name}/{len(self._groups) + len(self._others)}", tuple(range(self.mesh.world_size)), over
            )
        backend, store = c10d._world.pg_map[world]
        # What new_group does, with a name that we choose. torch offers no public way to.
        group: dist.ProcessGroup = c10d._new_process_group_helper(
            len(members),
            members.index(self.rank),
            list(members),
            c10d.Backend(backend),
            store,
            c10d.GroupName(name),
            timeout=self._timeout,
            device_id=world.bound_device_id,
            group_desc=over,
        )[0]
        c10d._world.pg_group_ranks[group] = {rank: index for index, rank in enumerate(members)}
        return group

    def _meet(self, name: str, members: tuple[int, ...], over: str) -> None:
        """Wait until all members ask for the group; what they asked for last is in the store for the error."""
        if len(members) == 1:
            return
        store = _store()
        what = f"{over}, ranks {' '.join(map(str, members))}"
        store.set(f"parallel/asks/{self.rank}", what)
        keys = {rank: f"{name}/asked by {rank}" for rank in members}
        store.set(keys[self.rank], "")
        try:
            store.wait(list(keys.values()), self._timeout)
        except RuntimeError as error:  # DistStoreError, its timeout, is one
            missing = [rank for rank, key in keys.items() if not store.check([key])]
            if not missing:
                raise
            last = [f"rank {rank} {_last_wish(store, rank)}" for rank in missing]
            raise GroupError(
                f"parallel: rank {self.rank} waited {self._timeout.total_seconds():g} s for the group over {what}; "
                f"who did not ask for it: {'; '.join(last)}. Members make their groups in the same order: "
                "call MeshGroups.prepare on all ranks at setup"
            ) from error


def _last_wish(store: Store, rank: int) -> str:
    key = f"parallel/asks/{rank}"
    return f"asked last for {store.get(key).decode()}" if store.check([key]) else "asked for none yet"


def _store() -> Store:
    from torch.distributed import distributed_c10d as c10d

    return c10d._get_default_store()
