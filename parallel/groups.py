"""The process groups of a mesh, made when they are first asked for."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING

from parallel.errors import MeshError
from parallel.mesh import Axis, Mesh

if TYPE_CHECKING:
    import torch.distributed as dist


class MeshGroups:
    """Process groups of this rank over axes of a mesh; leaving the `with` block (or `close()`) destroys them.

    Needs the default group (`torch.distributed.init_process_group`), whose backend the groups take.
    `timeout_s` is the longest time one collective may take.

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
        self._timeout = timedelta(seconds=timeout_s)
        self._groups: dict[tuple[int, ...], dist.ProcessGroup] = {}

    def get(self, *axes: Axis) -> dist.ProcessGroup:
        """Return this rank's group over the axes; a later call for the same ranks returns the same group.

        The first call is collective over the members, who make their groups in the same order; ranks of other
        groups need not take part. One rank alone is a group too.
        """
        import torch.distributed as dist

        members = tuple(self.mesh.group(dist.get_rank(), *axes))
        if len(members) == self.mesh.world_size:
            assert dist.group.WORLD is not None
            return dist.group.WORLD
        if members not in self._groups:
            self._groups[members] = dist.new_group(
                list(members),
                timeout=self._timeout,
                use_local_synchronization=True,
                group_desc="x".join(sorted(axes)) or "alone",
            )
        return self._groups[members]

    def close(self) -> None:
        """Destroy the groups that were made; the default group stays, and a second call does nothing."""
        import torch.distributed as dist

        groups: Iterable[dist.ProcessGroup] = list(self._groups.values())
        self._groups.clear()
        if dist.is_initialized():  # else they went with the default group
            for group in groups:
                dist.destroy_process_group(group)

    def __enter__(self) -> MeshGroups:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
