"""A rank's place is read from torchrun's variables, whole or not at all."""

from __future__ import annotations

import pytest

from launch import RankEnv

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29501",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "TORCHELASTIC_RESTART_COUNT": "2",
    "HOME": "/root",
}


def test_without_variables_there_is_one_rank() -> None:
    assert RankEnv.from_environ({"HOME": "/root", "MASTER_ADDR": "left over"}) == RankEnv()
    assert (RankEnv().rank, RankEnv().world_size, RankEnv().store_host) == (0, 1, "")


def test_torchruns_variables_are_read() -> None:
    assert RankEnv.from_environ(TORCHRUN) == RankEnv(
        rank=5,
        world_size=8,
        local_rank=1,
        local_world_size=4,
        node_rank=1,
        store_host="10.0.0.1",
        store_port=29501,
        store_is_served=True,
        attempt=2,
    )


def test_what_is_written_is_what_is_read() -> None:
    env = RankEnv.from_environ(TORCHRUN)
    assert RankEnv.from_environ(env.to_environ()) == env


def test_the_place_of_a_single_rank_is_read_back_too() -> None:
    assert RankEnv.from_environ(RankEnv().to_environ()) == RankEnv()


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_a_missing_variable_is_named(name: str) -> None:
    environ = {key: value for key, value in TORCHRUN.items() if key != name}
    with pytest.raises(ValueError, match=f"^environment: {name}: not set beside "):
        RankEnv.from_environ(environ)


def test_all_missing_variables_are_named_together() -> None:
    with pytest.raises(ValueError, match=r"^environment: LOCAL_RANK, MASTER_ADDR, MASTER_PORT: not set beside"):
        RankEnv.from_environ({"RANK": "0", "WORLD_SIZE": "2"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RANK": "-1"}, "environment: RANK: '-1' is not an integer of at least 0"),
        ({"WORLD_SIZE": "two"}, "environment: WORLD_SIZE: 'two' is not an integer of at least 1"),
        ({"MASTER_PORT": "0"}, "environment: MASTER_PORT: '0' is not an integer of at least 1"),
        ({"MASTER_ADDR": ""}, "environment: MASTER_ADDR: empty, though WORLD_SIZE is 8"),
        ({"RANK": "8"}, "environment: RANK: 8 is not below WORLD_SIZE 8"),
        ({"LOCAL_RANK": "4"}, "environment: LOCAL_RANK: 4 is not below LOCAL_WORLD_SIZE 4"),
        (
            {"RANK": "x", "LOCAL_RANK": ""},
            "environment: LOCAL_RANK: '' is not an integer of at least 0\n"
            "environment: RANK: 'x' is not an integer of at least 0",
        ),
    ],
)
def test_a_value_that_makes_no_sense_is_named(changes: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        RankEnv.from_environ({**TORCHRUN, **changes})
    assert str(caught.value) == message


def test_without_a_local_world_size_there_is_one_node() -> None:
    environ = {key: TORCHRUN[key] for key in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    env = RankEnv.from_environ({**environ, "LOCAL_RANK": "5"})
    assert (env.local_rank, env.local_world_size, env.node_rank) == (5, 8, 0)
