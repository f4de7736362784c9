"""One Checkpointer, all tiers: where a save goes, what each keeps, and what a restart finds."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import checkpoint
from checkpoint import CheckpointConfig, Checkpointer, InvalidState, StorageError
from checkpoint.config import MemoryConfig, RemoteConfig
from checkpoint.errors import CommitTimeout, SaveSkipped
from tests.test_checkpoint.fleets import Fleet, fleet
from tests.test_checkpoint.worlds import blank, ranks, same, state, values

WORLD = 3


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Fleet]:
    with fleet(tmp_path / "agents", 2) as made:
        yield made


class Run:
    """Launches of three ranks, two of them on the first host."""

    def __init__(self, root: Path, hosts: Fleet, **config: Any) -> None:
        self.root, self.hosts = root, hosts
        self.local, self.remote = root / "local", root / "remote"
        defaults = {
            "every": 2,
            "keep_last": 2,
            "commit_timeout_s": 20,
            "memory": MemoryConfig(every=1, peers=1),
            "remote": RemoteConfig(url=str(self.remote), every=4, keep_last=1),
        }
        self.config = CheckpointConfig(**defaults | config)

    def open(self, rank: int, launch: str) -> Checkpointer:
        memory = self.hosts.storage(rank // 2, peers=1) if self.config.memory.every else None
        return Checkpointer(self.local, config=self.config, rank=rank, world_size=WORLD, run_id=launch, memory=memory)

    def train(self, steps: range, launch: str = "first") -> None:
        def work(rank: int) -> None:
            with self.open(rank, launch) as ck:
                for step in steps:
                    if ck.should_save(step):
                        handle = ck.save(step, state(values(step), rank, WORLD), {"rank": rank})
                        handle.result(20)
                        if step % self.config.remote.every == 0 and self.config.remote.url:
                            handle.at("remote").result(20)

        ranks(WORLD, work)

    def recover(self, launch: str = "second") -> tuple[int, str, tuple[str, ...]]:
        """Return step, tier and what was skipped, after checking that every rank has its part bit by bit."""

        def work(rank: int) -> tuple[int, str, tuple[str, ...]]:
            found = blank(rank, WORLD)
            with self.open(rank, launch) as ck:
                loaded = ck.recover(found)
                assert loaded is not None
            assert same(found, state(values(loaded.step), rank, WORLD))
            assert loaded.objects == {"rank": rank}
            return loaded.step, loaded.info.tier, loaded.skipped

        outcomes = ranks(WORLD, work)
        assert len({(step, tier) for step, tier, _ in outcomes}) == 1
        return outcomes[0]

    def held(self) -> dict[str, list[int]]:
        """Return the steps in each tier."""
        steps: dict[str, list[int]] = {}
        with self.open(0, "look") as ck:
            for info in ck.list():
                steps.setdefault(info.tier, []).append(info.step)
        return steps


def test_each_tier_has_its_own_steps(tmp_path: Path, hosts: Fleet):
    run = Run(tmp_path, hosts)
    run.train(range(1, 10))
    assert run.held() == {"memory": [9], "local": [6, 8], "remote": [8]}
    for info_root in (run.local, run.remote):
        assert checkpoint.verify(info_root).ok


def test_a_restart_takes_memory_then_disk_then_remote(tmp_path: Path, hosts: Fleet):
    run = Run(tmp_path, hosts)
    run.train(range(1, 10))
    assert run.recover() == (9, "memory", ())
    hosts.kill(1)
    assert run.recover("third")[:2] == (9, "memory")
    hosts.kill(0)
    step, tier, skipped = run.recover("fourth")
    assert (step, tier) == (8, "local")
    assert "agent" in skipped[0]
    shutil.rmtree(run.local)
    assert run.recover("fifth")[:2] == (8, "remote")


def test_the_disk_is_not_touched_where_memory_has_it(tmp_path: Path, hosts: Fleet):
    run = Run(tmp_path, hosts, every=0, remote=RemoteConfig())
    run.train(range(1, 4))
    assert not run.local.exists()
    hosts.kill(0)
    run.local.write_text("not a folder: whatever is read from here fails")
    assert run.recover()[:2] == (3, "memory")


def test_a_damaged_copy_in_one_agent_is_read_from_the_other(
    tmp_path: Path, hosts: Fleet, caplog: pytest.LogCaptureFixture
):
    run = Run(tmp_path, hosts)
    run.train(range(1, 4))
    with run.open(0, "look") as ck:
        info = ck.latest()
    assert info is not None
    for rank in range(WORLD):
        for at in (3, 4096, 4096 + 40):
            hosts.damage(rank // 2, f"{info.folder}/r{rank:05d}.safetensors", at)
    hosts.damage(0, f"{info.folder}/slices.arrow", 500)
    hosts.damage(1, f"{info.folder}/COMMIT.json", 50)
    assert run.recover() == (3, "memory", ())
    assert "a copy is damaged, another one is read" in caplog.text


def test_damage_in_every_copy_falls_back_to_the_disk(tmp_path: Path, hosts: Fleet):
    run = Run(tmp_path, hosts)
    run.train(range(1, 5))
    with run.open(0, "look") as ck:
        info = ck.latest()
    assert info is not None
    for host in range(2):
        hosts.damage(host, f"{info.folder}/r00001.safetensors", 4096)
    step, tier, skipped = run.recover()
    assert (step, tier) == (4, "local")
    assert "the digest does not match" in skipped[0]


def test_saves_go_on_from_the_newest_number_of_any_tier(tmp_path: Path, hosts: Fleet):
    run = Run(tmp_path, hosts)
    run.train(range(1, 10))
    shutil.rmtree(run.local)
    run.train(range(2, 3), launch="went back")
    assert run.recover()[:2] == (2, "memory")
    hosts.kill(0)
    hosts.kill(1)
    assert run.recover("third")[:2] == (2, "local")


def test_a_save_tells_of_each_tier_it_goes_to(tmp_path: Path, hosts: Fleet):
    run = Run(tmp_path, hosts)

    def work(rank: int) -> list[str]:
        with run.open(rank, "first") as ck:
            handle = ck.save(4, state(values(4), rank, WORLD))
            paths = [handle.at(tier).result(20).path for tier in ("memory", "local", "remote")]
            assert handle.result(0) == handle.at("local").result(0)
            with pytest.raises(KeyError):
                ck.save(5, state(values(5), rank, WORLD)).at("local")
            return [path.rpartition("/")[0] for path in paths]

    for memory, local, remote in ranks(WORLD, work):
        assert memory.startswith("agents://")
        assert (local, remote) == (str(run.local), str(run.remote))


def test_an_unscheduled_or_urgent_save_goes_to_the_disk(tmp_path: Path, hosts: Fleet):
    run = Run(tmp_path, hosts, memory=MemoryConfig(every=2, peers=1))

    def work(rank: int) -> list[list[str]]:
        found = []
        with run.open(rank, "first") as ck:
            for step, options in (
                (1, {}),
                (6, {"urgent": True}),
                (7, {"tiers": ["memory"]}),
                (9, {"tiers": ["local"]}),
            ):
                handle = ck.save(step, state(values(step), rank, WORLD), **options)
                handle.result(20)
                found.append([outcome.tier for outcome in handle.outcomes])
        return found

    assert ranks(WORLD, work)[0] == [["local"], ["memory", "local"], ["memory"], ["local"]]


def test_a_lost_agent_fails_the_memory_save_and_not_the_training(
    tmp_path: Path, hosts: Fleet, caplog: pytest.LogCaptureFixture
):
    run = Run(tmp_path, hosts)
    hosts.kill(1)

    def work(rank: int) -> None:
        with run.open(rank, "first") as ck:
            for step in (1, 2, 3):
                handle = ck.save(step, state(values(step), rank, WORLD))
                assert isinstance(handle.outcomes[0].exception(20), checkpoint.CheckpointError)
                handle.outcomes[0].error_seen = False
                ck.poll()
                if step == 2:
                    handle.at("local").result(20)

    ranks(WORLD, work)
    assert run.held() == {"local": [2]}
    assert "training goes on" in caplog.text


def test_a_remote_tier_that_is_down_does_not_fail_the_local_save(tmp_path: Path, hosts: Fleet):
    (tmp_path / "remote").write_text("in the way")
    run = Run(tmp_path, hosts)

    def work(rank: int) -> None:
        with run.open(rank, "first") as ck:
            handle = ck.save(4, state(values(4), rank, WORLD))
            assert handle.result(20).step == 4
            ck.close()
            with pytest.raises(checkpoint.CheckpointError):
                handle.at("remote").result(20)

    ranks(WORLD, work)
    (tmp_path / "remote").unlink()
    run.train(range(5, 6), launch="second")  # takes up what the first launch left
    assert run.held() == {"memory": [5], "local": [4], "remote": [4]}


def test_a_failed_local_save_fails_its_copy_too(tmp_path: Path):
    config = CheckpointConfig(every=1, remote=RemoteConfig(url=str(tmp_path / "remote"), every=1))
    (tmp_path / "local").write_text("in the way")
    with contextlib.closing(Checkpointer(tmp_path / "local", config=config, on_error="warn")) as ck:
        handle = ck.save(1, {"w": torch.zeros(3)})
        with pytest.raises(StorageError):
            handle.at("remote").result(20)


def test_tiers_that_do_not_exist_are_refused(tmp_path: Path):
    with Checkpointer(tmp_path / "local") as ck:
        for tiers in (["memory"], ["remote"], ["local", "remote"]):
            with pytest.raises(InvalidState, match=r"tiers: .*; there are local"):
                ck.save(1, {"w": torch.zeros(3)}, tiers=tiers)
    with pytest.raises(ValueError, match=r"config\.memory\.every: needs the storage"):
        Checkpointer(tmp_path / "local", config=CheckpointConfig(memory=MemoryConfig(every=1)))


@pytest.mark.parametrize("writer", ["thread", "process"])
def test_either_writer_fills_every_tier(tmp_path: Path, hosts: Fleet, writer: str):
    run = Run(tmp_path, hosts, writer=writer)

    def work(rank: int) -> None:
        with run.open(rank, "first") as ck:
            ck.save(4, state(values(4), rank, WORLD), {"rank": rank}).at("remote").result(60)

    ranks(WORLD, work)
    assert run.held() == {"memory": [4], "local": [4], "remote": [4]}
    assert run.recover() == (4, "memory", ())


def test_a_save_that_is_skipped_is_skipped_in_every_tier(tmp_path: Path):
    remote = RemoteConfig(url=str(tmp_path / "remote"), every=1)
    config = CheckpointConfig(every=1, on_pressure="skip", on_error="warn", commit_timeout_s=1, remote=remote)
    with Checkpointer(tmp_path / "local", config=config, rank=0, world_size=2, run_id="other rank never comes") as ck:
        handles = [ck.save(step, {"w": torch.zeros(3)}) for step in (1, 2, 3)]
        assert handles[2].skipped
        assert isinstance(handles[2].at("remote").exception(0), SaveSkipped)
        assert isinstance(handles[0].at("remote").exception(20), CommitTimeout)
