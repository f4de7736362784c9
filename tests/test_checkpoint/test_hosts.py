"""Agents of hosts: one a host, found again by whoever comes after, and lost hosts that cost nothing."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from checkpoint import CheckpointConfig, Checkpointer, StorageError, hosts
from checkpoint.client import Agent
from checkpoint.config import MemoryConfig
from checkpoint.memory import MemoryStorage
from checkpoint.wire import read_token
from tests.ranks import RankFailed, run_ranks
from tests.test_checkpoint.fleets import IDLE_S
from tests.test_checkpoint.worlds import blank, ranks, same, state, values

MIB = 1 << 20
PER_HOST = 2
"""Ranks of a host."""


@pytest.fixture
def places(tmp_path: Path) -> Iterator[Path]:
    """A folder for the folders of hosts; every agent that one of them records is stopped in the end."""
    yield tmp_path
    for record in tmp_path.rglob("agent.json"):
        address = json.loads(record.read_bytes())["address"]
        with contextlib.suppress(StorageError):  # of a token that was replaced
            hosts.HostAgent(address, record.with_name("token"), 0).stop()


def gather(value: Any) -> Sequence[Any]:
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def join(folder: Path, peers: int, exchange: Callable[[Any], Sequence[Any]] = gather) -> MemoryStorage:
    return hosts.join(folder, "run", exchange, peers=peers, limit_bytes=64 * MIB, idle_s=IDLE_S)


# One agent a host


def test_whoever_comes_first_starts_the_agent_and_all_find_it(places: Path):
    started = ranks(6, lambda rank: hosts.start(places / "host", limit_bytes=MIB, idle_s=IDLE_S))
    assert len(set(started)) == 1
    assert hosts.start(places / "host", limit_bytes=MIB) == started[0]


def test_what_it_holds_outlives_the_processes_that_wrote_it(places: Path):
    run_ranks(_write_and_go, 1, str(places / "host"))
    agent = hosts.start(places / "host", limit_bytes=MIB)
    assert MemoryStorage([agent.address], agent.token, "run").read("file") == b"still here"


def _write_and_go(rank: int, world_size: int, folder: str) -> None:
    agent = hosts.start(folder, limit_bytes=MIB, idle_s=IDLE_S)
    MemoryStorage([agent.address], agent.token, "run").write("file", b"still here")


def test_a_new_agent_takes_the_place_of_one_that_is_gone(places: Path):
    first = hosts.start(places / "host", limit_bytes=MIB, idle_s=IDLE_S)
    os.kill(first.pid, signal.SIGKILL)
    with contextlib.suppress(StorageError):  # it may take the first connection still
        while True:
            Agent(first.address, read_token(first.token)).call({"op": "about"})
    second = hosts.start(places / "host", limit_bytes=MIB, idle_s=IDLE_S)
    assert second.pid != first.pid


def test_only_the_owner_can_read_the_folder_and_the_token(places: Path):
    agent = hosts.start(places / "host", limit_bytes=MIB, idle_s=IDLE_S)
    assert stat.S_IMODE((places / "host").stat().st_mode) == 0o700
    assert stat.S_IMODE(agent.token.stat().st_mode) == 0o600


def test_a_folder_that_others_may_enter_is_refused(places: Path):
    (places / "host").mkdir(mode=0o755)
    (places / "link").symlink_to(places / "host")
    for name in ("host", "link"):
        with pytest.raises(StorageError, match=r"cannot start an agent: .*others may use it"):
            hosts.start(places / name, limit_bytes=MIB)


def test_an_address_that_cannot_be_listened_at_is_told(places: Path):
    with pytest.raises(StorageError, match=r"host: cannot start an agent: .*(Cannot assign|not known)"):
        hosts.start(places / "host", limit_bytes=MIB, host="203.0.113.1")


def test_another_token_gets_another_agent(places: Path):
    first = hosts.start(places / "host", limit_bytes=MIB, idle_s=IDLE_S)
    old = read_token(first.token)
    second = hosts.start(places / "host", limit_bytes=MIB, idle_s=IDLE_S, token=b"y" * 32)
    assert second.address != first.address
    second.token.write_bytes(old)
    first.stop()
    second.token.write_bytes(b"y" * 32)


# All hosts together


def test_ranks_meet_and_each_host_is_its_own_nearest(places: Path):
    found = run_ranks(_addresses, 4, str(places))
    assert len({addresses[0] for addresses in found}) == 2
    assert found[0] == found[1]
    assert found[2] == found[3] == found[0][::-1]
    assert read_token(places / "host0" / "token") == read_token(places / "host1" / "token")


def _addresses(rank: int, world_size: int, places: str) -> list[str]:
    with contextlib.closing(join(Path(places) / f"host{rank // PER_HOST}", peers=1)) as storage:
        return [agent.address for agent in storage._agents]


def test_a_host_without_an_agent_is_told_to_every_rank(places: Path):
    (places / "host1").mkdir(mode=0o755)
    for failed in run_ranks(_join_or_tell, 3, str(places)):
        assert failed.startswith("StorageError: the agents of the hosts cannot be joined: rank 1: ")
        assert "others may use it" in failed


def _join_or_tell(rank: int, world_size: int, places: str) -> str:
    try:
        join(Path(places) / f"host{rank}", peers=1)
    except StorageError as error:
        return f"StorageError: {error}"
    return "joined"


def test_too_few_hosts_for_the_peers_are_refused(places: Path):
    with pytest.raises(ValueError, match="peers: 1 copies on other hosts, and there are 0 others"):
        join(places / "host0", 1, lambda value: [value])


def test_a_smaller_world_finds_the_agents_that_a_larger_one_left(places: Path):
    run_ranks(_write_one, 6, str(places))
    with contextlib.closing(join(places / "host1", 1, lambda value: [value])) as storage:
        assert sorted(entry.name for entry in storage.entries("")) == [f"file{rank}" for rank in range(6)]
        for rank in range(6):
            assert storage.read(f"file{rank}") == b"x" * rank


def _write_one(rank: int, world_size: int, places: str) -> None:
    storage = join(Path(places) / f"host{rank // PER_HOST}", peers=0)
    with contextlib.closing(storage), storage.create(f"file{rank}") as sink:
        sink.write(b"x" * rank)


def test_a_lost_host_costs_no_step_though_no_disk_can_be_read(places: Path):
    lost_step = 4
    (places / "disk").symlink_to(places / "disk")  # whatever looks there fails
    with pytest.raises(RankFailed) as failed:
        run_ranks(_train, 4, str(places), lost_step)
    assert {2, 3} <= set(failed.value.reports)
    # The host and its folder are gone; another one, with nothing on it, takes its place.
    (places / "host1").rename(places / "lost")
    assert run_ranks(_restart, 4, str(places)) == [(lost_step - 1, True)] * 4


def _checkpointer(rank: int, world_size: int, places: str, launch: str) -> Checkpointer:
    memory = join(Path(places) / f"host{rank // PER_HOST}", peers=1)
    config = CheckpointConfig(every=0, commit_timeout_s=2, memory=MemoryConfig(every=1, keep_last=1, peers=1))
    disk = Path(places) / "disk"
    return Checkpointer(disk, config=config, rank=rank, world_size=world_size, run_id=launch, memory=memory)


def _train(rank: int, world_size: int, places: str, lost_step: int) -> None:
    """Save every step into memory; host 1 is lost, agent and ranks, amid one of the saves."""
    torch.set_num_threads(1)
    with _checkpointer(rank, world_size, places, "first") as ck:
        for step in range(1, lost_step):
            ck.save(step, state(values(step), rank, world_size), {"rank": rank}).result(20)
            dist.barrier()
        pending = ck.save(lost_step, state(values(lost_step), rank, world_size)) if rank != 3 else None
        if rank // PER_HOST == 1:
            dist.barrier()
            if rank == 2:
                os.kill(hosts.start(Path(places) / "host1", limit_bytes=0).pid, signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)
        dist.barrier()
        assert pending is not None
        pending.result(20)


def _restart(rank: int, world_size: int, places: str) -> tuple[int, bool]:
    torch.set_num_threads(1)
    with _checkpointer(rank, world_size, places, "second") as ck:
        found = blank(rank, world_size)
        loaded = ck.recover(found, verify="deep", gather=gather)
        assert loaded is not None
        assert loaded.info.tier == "memory"
        assert loaded.objects == {"rank": rank}
        assert "Too many levels of symbolic links" in loaded.skipped[0]
        whole = same(found, state(values(loaded.step), rank, world_size))
        ck.save(loaded.step + 1, found).result(20)
        return loaded.step, whole
