"""Process groups of a mesh: the right members, made once by nobody else, gone when closed; never a silent hang."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist
import torch.distributed.tensor as dtensor

from parallel import GroupError, Mesh, MeshError, MeshGroups, ParallelConfig
from parallel.groups import USUAL
from parallel.mesh import Along, Coordinates
from tests.ranks import RankFailed, run_ranks

_DEGREES = ParallelConfig(pipeline=2, shard=2, expert=2)


def _members(rank: int, world_size: int) -> dict[Along, list[int]]:
    mesh = Mesh(_DEGREES, world_size)
    found: dict[Along, list[int]] = {}
    with MeshGroups(mesh) as groups:
        axes: list[Along] = ["pipeline", "shard", "tensor", "expert", "expert_data"]
        for axis in axes:
            gathered = [torch.zeros(1, dtype=torch.long) for _ in range(mesh.size(axis))]
            dist.all_gather(gathered, torch.tensor([rank]), group=groups.get(axis))
            found[axis] = [int(x) for x in gathered]
    return found


def test_a_group_joins_the_ranks_that_the_mesh_says() -> None:
    mesh = Mesh(_DEGREES, 4)
    for rank, found in enumerate(run_ranks(_members, 4)):
        assert found == {axis: mesh.group(rank, axis) for axis in found}


def _uneven(rank: int, world_size: int) -> list[float]:
    with MeshGroups(Mesh(_DEGREES, world_size), timeout_s=20) as groups:
        x = torch.ones(1)
        if rank in (0, 1):
            dist.all_reduce(x, group=groups.get("shard"))
        first = x.item()
        # Ranks 0 and 1 have made a group more than 2 and 3 by now; torch's own names of groups would not meet.
        dist.all_reduce(x, group=groups.get("pipeline"))
        return [first, x.item()]


def test_ranks_outside_a_group_need_not_take_part_in_making_it_and_may_make_others_later() -> None:
    assert run_ranks(_uneven, 4) == [[2.0, 3.0], [2.0, 3.0], [1.0, 3.0], [1.0, 3.0]]


def _again(rank: int, world_size: int) -> list[float]:
    sums = []
    for _ in range(5):
        with MeshGroups(Mesh(_DEGREES, world_size), timeout_s=20) as groups:
            x = torch.ones(1)
            dist.all_reduce(x, group=groups.get("pipeline"))
            dist.all_reduce(x, group=groups.get("shard"))
            sums.append(x.item())
    return sums


def test_groups_that_were_closed_can_be_made_again() -> None:
    assert run_ranks(_again, 4) == [[4.0] * 5] * 4


def _opposite_orders(rank: int, world_size: int) -> str:
    # 0 waits for 2 in pipeline, 2 for 3 in shard, 3 for 1 in pipeline, 1 for 0 in shard.
    first: Along = "shard" if rank in (1, 2) else "pipeline"
    groups = MeshGroups(Mesh(_DEGREES, world_size), timeout_s=1.5)
    with pytest.raises(GroupError) as info:
        groups.get(first)
    return str(info.value)


def test_ranks_that_make_groups_in_different_orders_learn_who_waits_where() -> None:
    messages = run_ranks(_opposite_orders, 4)
    assert messages[0] == (
        "parallel: rank 0 waited 1.5 s for the group over pipeline, ranks 0 2; who did not ask for it: rank 2 asked "
        "last for shard, ranks 2 3. Members make their groups in the same order: call MeshGroups.prepare on all ranks "
        "at setup"
    )
    assert "rank 0 asked last for pipeline, ranks 0 2" in messages[1]


def _prepared(rank: int, world_size: int) -> tuple[int, float]:
    mesh = Mesh(ParallelConfig(replicate=2, shard=2, expert=2), world_size)
    some: list[tuple[Along, ...]] = [("shard",), ("pipeline",), ("expert",), ("replicate",)]
    with MeshGroups(mesh, timeout_s=20) as groups:
        num_before = len(dist.distributed_c10d._world.pg_map)
        # Every rank names them in another order.
        groups.prepare(*some[rank % 4 :], *some[: rank % 4])
        groups.prepare()
        num_made = len(dist.distributed_c10d._world.pg_map) - num_before
        if rank == 0:
            for axes in USUAL:  # alone: nothing is left to wait for
                groups.get(*axes)
        x = torch.ones(1)
        dist.all_reduce(x, group=groups.get("shard", "replicate"))
        return num_made, x.item()


def test_prepared_groups_are_made_in_one_order_and_a_rank_joins_one_for_each_set_of_axes() -> None:
    # shard (which is expert too), replicate, and this rank alone; replicate x shard is the whole world.
    assert run_ranks(_prepared, 4) == [(3, 4.0)] * 4


def _device_mesh(rank: int, world_size: int) -> None:
    mesh = Mesh(ParallelConfig(replicate=2, tensor=2), world_size)
    with MeshGroups(mesh) as groups:
        all_axes = groups.device_mesh("cpu")
        assert all_axes.mesh_dim_names == Coordinates._fields
        assert all_axes.shape == (1, 2, 1, 1, 2)
        assert tuple(all_axes.get_coordinate() or ()) == mesh.coordinates(rank)
        for axis in Coordinates._fields:
            assert dist.get_process_group_ranks(all_axes.get_group(axis)) == mesh.group(rank, axis)
            assert all_axes.get_group(axis) is groups.get(axis)
        whole = dtensor.distribute_tensor(torch.arange(4.0), all_axes["tensor"])
        part = whole.redistribute(placements=[dtensor.Shard(0)]).to_local()
        assert part.tolist() == [[0.0, 1.0], [2.0, 3.0]][rank % 2]
        num_groups = len(dist.distributed_c10d._world.pg_map)
        both = groups.device_mesh("cpu", {"tensor": ("tensor",), "data": ("replicate", "shard")})
        assert both.mesh.tolist() == [[0, 2], [1, 3]]
        data = groups.device_mesh("cpu", {"data": ("shard", "replicate")})
        assert data.mesh.tolist() == mesh.group(rank, "replicate")
        assert len(dist.distributed_c10d._world.pg_map) == num_groups  # none of its own
        with pytest.raises(MeshError, match="dimensions a, b share an axis"):
            groups.device_mesh("cpu", {"a": ("shard", "tensor"), "b": ("tensor",)})


def test_a_device_mesh_stands_on_the_same_groups_in_the_same_order() -> None:
    run_ranks(_device_mesh, 4)


def _fail_in(rank: int, world_size: int, axis: Along, at_fault: int) -> None:
    with MeshGroups(Mesh(ParallelConfig(pipeline=2, shard=2), world_size)) as groups:
        groups.prepare()
        x = torch.ones(1)
        dist.all_reduce(x)
        if rank == at_fault:
            raise ArithmeticError("at fault")
        dist.all_reduce(x, group=groups.get(axis))
        dist.all_reduce(x)  # ranks of other groups meet the lost one here


@pytest.mark.parametrize("axis", ["pipeline", "shard"])
def test_a_rank_that_fails_in_a_collective_of_any_group_is_told_first_and_ends_the_others(axis: Along) -> None:
    begun_s = time.monotonic()
    with pytest.raises(RankFailed) as info:
        run_ranks(_fail_in, 4, axis, 2)
    assert next(iter(info.value.reports)) == 2
    assert "ArithmeticError: at fault" in info.value.reports[2]
    assert time.monotonic() - begun_s < 30, "the others waited for a timeout of their collectives"


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
