"""Process groups of a mesh: the right members, made once and only when asked for, gone when closed."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from parallel import Mesh, MeshError, MeshGroups, ParallelConfig
from parallel.mesh import Axis
from tests.ranks import run_ranks

_DEGREES = ParallelConfig(pipeline=2, shard=2, expert=2)


def _members(rank: int, world_size: int) -> dict[Axis, list[int]]:
    mesh = Mesh(_DEGREES, world_size)
    found: dict[Axis, list[int]] = {}
    with MeshGroups(mesh) as groups:
        axes: list[Axis] = ["pipeline", "shard", "tensor", "expert"]
        for axis in axes:
            gathered = [torch.zeros(1, dtype=torch.long) for _ in range(mesh.size(axis))]
            dist.all_gather(gathered, torch.tensor([rank]), group=groups.get(axis))
            found[axis] = [int(x) for x in gathered]
    return found


def test_a_group_joins_the_ranks_that_the_mesh_says() -> None:
    mesh = Mesh(_DEGREES, 4)
    for rank, found in enumerate(run_ranks(_members, 4)):
        assert found == {axis: mesh.group(rank, axis) for axis in found}


def _only_the_first_stage_asks(rank: int, world_size: int) -> float:
    with MeshGroups(Mesh(_DEGREES, world_size)) as groups:
        x = torch.ones(1)
        if rank in (0, 1):
            dist.all_reduce(x, group=groups.get("shard"))
        return x.item()


def test_ranks_outside_a_group_need_not_take_part_in_making_it() -> None:
    assert run_ranks(_only_the_first_stage_asks, 4) == [2.0, 2.0, 1.0, 1.0]


def _identity_and_lifetime(rank: int, world_size: int) -> list[bool]:
    groups = MeshGroups(Mesh(_DEGREES, world_size))
    num_before = len(dist.distributed_c10d._world.pg_map)
    shard = groups.get("shard")
    facts = [
        groups.get("shard") is shard,
        groups.get("expert") is shard,  # the same ranks: expert 2 of replicate 1 x shard 2
        groups.get("pipeline", "shard") is dist.group.WORLD,
        len(dist.distributed_c10d._world.pg_map) == num_before + 1,
    ]
    groups.close()
    groups.close()
    facts.append(len(dist.distributed_c10d._world.pg_map) == num_before)
    dist.barrier()  # the default group is still there
    return facts


def test_groups_of_the_same_ranks_are_one_and_close_destroys_what_was_made() -> None:
    assert run_ranks(_identity_and_lifetime, 4) == [[True] * 5] * 4


def _wrong_size(rank: int, world_size: int) -> str:
    with pytest.raises(MeshError) as info:
        MeshGroups(Mesh(_DEGREES, 4))
    dist.destroy_process_group()
    with pytest.raises(MeshError, match="call init_process_group first"):
        MeshGroups(Mesh(_DEGREES, 4))
    return str(info.value)


def test_a_mesh_for_other_ranks_is_refused() -> None:
    assert run_ranks(_wrong_size, 1) == [
        "parallel: the default process group has 1 ranks, the mesh 4; make the mesh for the ranks there are"
    ]
