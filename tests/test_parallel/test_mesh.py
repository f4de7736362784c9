"""A mesh lays every rank out once, inverts, and says what does not fit."""

from __future__ import annotations

import math
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel import Coordinates, Mesh, MeshError, ParallelConfig
from parallel.mesh import Along, Axis

_AXES: tuple[Axis, ...] = get_args(Axis)


@st.composite
def _meshes(draw: st.DrawFn) -> Mesh:
    degree = st.integers(1, 3)
    sizes = {axis: draw(degree) for axis in Coordinates._fields}
    num_data = sizes["replicate"] * sizes["shard"]
    expert = draw(st.sampled_from([n for n in range(1, num_data + 1) if num_data % n == 0]))
    return Mesh(ParallelConfig(**sizes, expert=expert), math.prod(sizes.values()))


_axes = st.lists(st.sampled_from(Coordinates._fields), unique=True).map(tuple) | st.lists(
    st.sampled_from(["pipeline", "context", "tensor", "expert", "expert_data"]), unique=True
).map(tuple)


@given(_meshes())
def test_every_rank_has_coordinates_that_invert(mesh: Mesh) -> None:
    places = [mesh.coordinates(rank) for rank in range(mesh.world_size)]
    assert len(set(places)) == mesh.world_size
    assert [mesh.rank_of(place) for place in places] == list(range(mesh.world_size))


@given(_meshes(), _axes)
def test_groups_partition_the_ranks(mesh: Mesh, axes: tuple[Along, ...]) -> None:
    groups = mesh.groups(*axes)
    assert sorted(rank for group in groups for rank in group) == list(range(mesh.world_size))
    assert {len(group) for group in groups} == {mesh.size(*axes)}
    assert all(group == sorted(group) == mesh.group(group[-1], *axes) for group in groups)
    assert groups == sorted(groups)


@given(_meshes(), _axes)
def test_ranks_of_a_group_differ_only_along_its_axes(mesh: Mesh, axes: tuple[Along, ...]) -> None:
    free = set(axes) | ({"replicate", "shard"} if {"expert", "expert_data"} & set(axes) else set())
    for group in mesh.groups(*axes):
        places = [mesh.coordinates(rank)._asdict() for rank in group]
        for axis in set(Coordinates._fields) - free:
            assert len({place[axis] for place in places}) == 1


@given(_meshes())
def test_an_expert_group_is_a_run_of_neighbours_in_the_data_ranks(mesh: Mesh) -> None:
    for group in mesh.groups("expert"):
        data_ranks = [mesh.data_rank(rank) for rank in group]
        assert data_ranks == list(range(data_ranks[0], data_ranks[0] + mesh.degrees.expert))
        assert data_ranks[0] % mesh.degrees.expert == 0


@given(_meshes())
def test_expert_and_expert_data_make_up_the_data_ranks(mesh: Mesh) -> None:
    assert mesh.groups("expert", "expert_data") == mesh.groups("replicate", "shard")
    for group in mesh.groups("expert_data"):
        assert len({mesh.data_rank(rank) % mesh.degrees.expert for rank in group}) == 1
        assert len({mesh.data_rank(rank) // mesh.degrees.expert for rank in group}) == len(group)


@given(_meshes())
def test_data_ranks_number_the_ranks_that_read_different_data(mesh: Mesh) -> None:
    for group in mesh.groups("replicate", "shard"):
        assert [mesh.data_rank(rank) for rank in group] == list(range(mesh.data_size))
    for group in mesh.groups("pipeline", "context", "tensor"):
        assert len({mesh.data_rank(rank) for rank in group}) == 1


def test_tensor_is_the_innermost_axis_and_pipeline_the_outermost() -> None:
    mesh = Mesh(ParallelConfig(pipeline=2, replicate=2, shard=2, context=2, tensor=2), 32)
    neighbours = [mesh.group(0, axis)[1] for axis in _AXES if axis != "expert"]
    assert neighbours == [16, 8, 4, 2, 1]


@pytest.mark.parametrize(
    ("degrees", "world_size", "message"),
    [
        (
            {"pipeline": 2, "replicate": 3},
            4,
            "parallel: degrees multiply to 6 (pipeline 2 x replicate 3) but there are 4 ranks; "
            "start 6 or choose degrees with the product 4",
        ),
        (
            {},
            2,
            "parallel: degrees multiply to 1 (1) but there are 2 ranks; start 1 or choose degrees with the product 2",
        ),
        (
            {"tensor": 2},
            1,
            "parallel: degrees multiply to 2 (tensor 2) but there is 1 rank; "
            "start 2 or choose degrees with the product 1",
        ),
        (
            {"replicate": 4, "expert": 3},
            4,
            "parallel.expert: 3 does not divide replicate x shard = 4; one of 1, 2, 4",
        ),
        (
            {"tensor": 0, "context": -1},
            1,
            "parallel.context: -1 ranks cannot share it; at least 1\n"
            "parallel.tensor: 0 ranks cannot share it; at least 1",
        ),
    ],
)
def test_degrees_that_do_not_fit_are_refused(degrees: dict[str, int], world_size: int, message: str) -> None:
    with pytest.raises(MeshError) as info:
        Mesh(ParallelConfig(**degrees), world_size)
    assert str(info.value) == message


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(MeshError, match=r"multiply to 3(.*\n)parallel\.expert: 2 does not divide"):
        Mesh(ParallelConfig(shard=3, expert=2), 8)


def test_what_is_not_on_the_mesh_is_refused() -> None:
    mesh = Mesh(ParallelConfig(replicate=2), 2)
    with pytest.raises(MeshError, match="no rank 2; ranks are 0 to 1"):
        mesh.coordinates(2)
    with pytest.raises(MeshError, match="no rank -1"):
        mesh.group(-1, "tensor")
    with pytest.raises(MeshError, match="replicate has no index 2; indices are 0 to 1"):
        mesh.rank_of(Coordinates(replicate=2))
    with pytest.raises(MeshError, match="there is no axis data"):
        mesh.groups("data")  # type: ignore[arg-type]
    with pytest.raises(MeshError, match="expert is a part of replicate x shard"):
        mesh.size("expert", "shard")


def test_a_degree_can_be_filled_to_the_number_of_ranks() -> None:
    degrees = ParallelConfig(pipeline=2, replicate=3)
    assert Mesh.product(degrees) == 6
    assert Mesh.fill(degrees, "replicate", 24) == ParallelConfig(pipeline=2, replicate=12)
    assert Mesh.fill(degrees, "shard", 24) == ParallelConfig(pipeline=2, replicate=3, shard=4)
    with pytest.raises(MeshError) as info:
        Mesh.fill(degrees, "shard", 16)
    assert str(info.value) == (
        "parallel.shard: cannot fill 16 ranks: degrees multiply to 6 (pipeline 2 x replicate 3); a multiple of 6"
    )
