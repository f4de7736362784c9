"""Ranks are packed where they fit, and seated so that neighbours in rank are neighbours on a node."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.placement import Home, Seat, fits, seats, strategy

CPUS_4 = {"CPU": 4.0, "memory": 1e9}
GPUS_8 = {"CPU": 64.0, "GPU": 8.0}


def home(node_id: str, *gpu_ids: str) -> Home:
    return Home(node_id=node_id, pid=1, start_ticks=1, folder="", gpu_ids=gpu_ids)


@pytest.mark.parametrize(
    ("demand", "world_size", "nodes", "expected"),
    [
        ({"CPU": 1.0}, 4, [CPUS_4], "STRICT_PACK"),
        ({"CPU": 1.0}, 5, [CPUS_4, CPUS_4], "PACK"),
        ({"CPU": 1.0}, 5, [CPUS_4, GPUS_8], "STRICT_PACK"),
        ({"CPU": 1.0, "GPU": 1.0}, 8, [GPUS_8, GPUS_8], "STRICT_PACK"),
        ({"CPU": 1.0, "GPU": 1.0}, 9, [GPUS_8, GPUS_8], "PACK"),
        ({"CPU": 0.1}, 40, [CPUS_4], "STRICT_PACK"),
        ({"CPU": 1.0, "GPU": 0.0}, 4, [CPUS_4], "STRICT_PACK"),
    ],
)
def test_ranks_share_a_node_when_one_can_hold_them_all(
    demand: Mapping[str, float], world_size: int, nodes: list[Mapping[str, float]], expected: str
) -> None:
    assert strategy(demand, world_size, nodes) == expected


def test_a_rank_is_not_split_over_nodes() -> None:
    assert fits({"CPU": 2.0}, 2, [{"CPU": 3.0}, {"CPU": 3.0}])
    assert not fits({"CPU": 2.0}, 3, [{"CPU": 3.0}, {"CPU": 3.0}])
    assert not fits({"CPU": 1.0, "GPU": 1.0}, 1, [CPUS_4])


def test_the_drivers_node_comes_first() -> None:
    seated = seats([home("a"), home("b"), home("a"), home("b")], "b")
    assert [seat.actor for seat in seated] == [1, 3, 0, 2]
    assert [(seat.node_rank, seat.local_rank) for seat in seated] == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_ranks_of_a_node_take_its_gpus_in_order_and_see_them_all() -> None:
    seated = seats([home("a", "10"), home("a", "2"), home("b", "3")], "a")
    assert seated == [
        Seat(actor=1, local_rank=0, local_world_size=2, node_rank=0, visible_gpus=("2", "10")),
        Seat(actor=0, local_rank=1, local_world_size=2, node_rank=0, visible_gpus=("2", "10")),
        Seat(actor=2, local_rank=0, local_world_size=1, node_rank=1, visible_gpus=("3",)),
    ]


def test_ranks_that_share_a_gpu_see_it_once() -> None:
    assert [seat.visible_gpus for seat in seats([home("a", "1"), home("a", "1")], "a")] == [("1",), ("1",)]


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=12), st.sampled_from("abcd"))
def test_every_actor_gets_one_seat_and_places_are_consistent(node_ids: list[str], first: str) -> None:
    seated = seats([home(node_id) for node_id in node_ids], first)
    assert sorted(seat.actor for seat in seated) == list(range(len(node_ids)))
    for seat in seated:
        neighbours = [other for other in seated if other.node_rank == seat.node_rank]
        assert {node_ids[other.actor] for other in neighbours} == {node_ids[seat.actor]}
        assert [other.local_rank for other in neighbours] == list(range(seat.local_world_size))
    assert [seat.node_rank for seat in seated] == sorted(seat.node_rank for seat in seated)
