"""Which tier is due, which is nearest, and what a restart takes when some of it is damaged or gone."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint import (
    CheckpointConfig,
    Checkpointer,
    CheckpointError,
    CorruptCheckpoint,
    InvalidState,
    StateMismatch,
    StorageError,
)
from checkpoint.catalog import scan
from checkpoint.config import MemoryConfig, RemoteConfig
from checkpoint.promotion import Promoter
from checkpoint.storage import Storage, open_storage
from checkpoint.tiers import Found, Tier, TierName, Tiers, due, recover
from tests.test_checkpoint.fleets import Fleet, fleet
from tests.test_checkpoint.worlds import ranks, saved_by, values

# What is due


def config(local: int, memory: int = 0, remote: int = 0) -> CheckpointConfig:
    return CheckpointConfig(
        every=local,
        memory=MemoryConfig(every=memory),
        remote=RemoteConfig(url="s3://bucket" if remote else "", every=remote or 1000),
    )


@pytest.mark.parametrize(
    ("cadences", "step", "expected"),
    [
        ((10, 1, 100), 0, ()),
        ((10, 1, 100), 7, ("memory",)),
        ((10, 1, 100), 20, ("memory", "local")),
        ((10, 1, 100), 300, ("memory", "local", "remote")),
        ((10, 3, 100), 100, ("local", "remote")),
        ((10, 0, 0), 1000, ("local",)),
        ((0, 5, 0), 10, ("memory",)),
        ((0, 0, 0), 10, ()),
        ((3, 0, 5), 5, ()),
        ((3, 0, 5), 15, ("local", "remote")),
    ],
)
def test_tiers_are_due_by_their_own_cadence(cadences: tuple[int, int, int], step: int, expected: tuple[str, ...]):
    assert due(config(*cadences), step) == expected


def test_remote_is_never_due_without_local_nor_anything_before_the_first_step():
    for cadences in ((2, 1, 3), (4, 3, 6), (5, 0, 2)):
        for step in range(200):
            found = due(config(*cadences), step)
            assert "remote" not in found or "local" in found
            assert bool(found) <= (step > 0)


def test_everything_wrong_with_the_tiers_is_said_at_once(tmp_path: Path):
    memory = MemoryConfig(every=-1, keep_last=0, limit_bytes=-1, peers=-1)
    remote = RemoteConfig(url="memory://x", every=15, keep_last=0, keep_every=-1, retry_s=0)
    with pytest.raises(ValueError, match="config") as caught:
        Checkpointer(tmp_path, config=CheckpointConfig(every=10, memory=memory, remote=remote))
    for part in (
        "config.memory.every: -1; allowed are integers from 0",
        "config.memory.keep_last: 0; allowed are integers from 1",
        "config.memory.limit_bytes: -1; allowed are integers from 0",
        "config.memory.peers: -1; allowed are integers from 0",
        "config.remote.keep_last: 0; allowed are integers from 1",
        "config.remote.keep_every: -1; allowed are integers from 0",
        "config.remote.retry_s: 0; allowed are seconds above 0",
        "config.remote.every: 15; allowed are multiples of config.every, 10",
    ):
        assert part in str(caught.value)


# Which is newest, and nearest


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Fleet]:
    with fleet(tmp_path / "agents", 1) as made:
        yield made


def copy(source: Storage, target: Storage, step: int) -> None:
    """Put the checkpoint of a step into another tier."""
    (folder,) = (r.folder for r in scan(source).committed if r.record.step == step)
    promoter = Promoter(source, target, RemoteConfig(url="unused", keep_last=9), rank=0, world_size=1)
    promoter.announce(folder)
    promoter.submit(folder).result(20)
    promoter.close()


class Places:
    """Three tiers: step 3 in memory and locally, step 2 locally and remotely, step 1 remotely."""

    def __init__(self, root: Path, memory: Storage) -> None:
        self.local_root, self.remote_root = root / "local", root / "remote"
        self.memory, self.local, self.remote = memory, open_storage(self.local_root), open_storage(self.remote_root)
        for step in (1, 2, 3):
            saved_by(self.local_root, 2, step, seed=step)
        copy(self.local, self.remote, 1)
        copy(self.local, self.remote, 2)
        copy(self.local, self.memory, 3)
        shutil.rmtree(self.local_root / self.folder(1))
        self.tiers = Tiers([Tier("memory", self.memory), Tier("local", self.local), Tier("remote", self.remote)])

    def folder(self, step: int) -> str:
        for storage in (self.memory, self.local, self.remote):
            for reader in scan(storage).committed:
                if reader.record.step == step:
                    return reader.folder
        raise KeyError(step)

    def damage(self, path: Path) -> None:
        path.write_bytes(path.read_bytes()[:-1])

    def latest(self) -> tuple[TierName, int]:
        found = self.tiers.latest()
        assert found is not None
        return found.tier.name, found.reader.record.step


@pytest.fixture
def places(tmp_path: Path, host: Fleet) -> Places:
    return Places(tmp_path, host.storage())


def test_the_newest_comes_from_the_nearest_tier_then_the_next_then_the_one_before(
    places: Places, caplog: pytest.LogCaptureFixture
):
    steps: list[tuple[Callable[[], object], tuple[TierName, int]]] = [
        (lambda: None, ("memory", 3)),
        (lambda: places.memory.remove(f"{places.folder(3)}/r00001.safetensors"), ("local", 3)),
        (lambda: places.damage(places.local_root / places.folder(3) / "slices.arrow"), ("local", 2)),
        (lambda: shutil.rmtree(places.local_root / places.folder(2)), ("remote", 2)),
        (lambda: places.damage(places.remote_root / places.folder(2) / "r00000.safetensors"), ("remote", 1)),
    ]
    for happens, expected in steps:
        happens()
        caplog.clear()
        assert places.latest() == expected
        assert ("is skipped" in caplog.text) == (expected != ("memory", 3))
    shutil.rmtree(places.remote_root / places.folder(1))
    with pytest.raises(CorruptCheckpoint, match="none of the checkpoints is whole"):
        places.latest()


def test_a_later_save_of_an_earlier_step_is_newer(places: Places):
    saved_by(places.local_root, 2, 1, seed=9, run_id="went back")
    assert places.latest() == ("local", 1)


def test_saves_are_numbered_over_all_tiers(tmp_path: Path):
    near, far = open_storage(tmp_path / "near"), open_storage(tmp_path / "far")
    for step in (1, 2, 3):
        saved_by(tmp_path / "far", 1, step)
    saved_by(tmp_path / "near", 1, 9)
    tiers = Tiers([Tier("local", near), Tier("remote", far)])
    assert [tiers.sequence(ordinal, storage) for ordinal, storage in ((2, near), (1, far), (2, far))] == [5, 4, 5]
    saved_by(tmp_path / "far", 1, 5)
    saved_by(tmp_path / "far", 1, 6)
    saved_by(tmp_path / "far", 1, 7)
    saved_by(tmp_path / "far", 1, 8)
    assert tiers.sequence(3, near) == 6
    assert tiers.sequence(3, far) == 8  # another launch was there meanwhile


def test_saves_go_on_from_the_number_of_a_tier_that_can_no_longer_be_read(tmp_path: Path):
    saved_by(tmp_path / "remote", 1, step=1)
    saved_by(tmp_path / "remote", 1, step=2, run_id="second")
    tiers = Tiers([Tier("local", open_storage(tmp_path / "local")), Tier("remote", open_storage(tmp_path / "remote"))])
    assert tiers.latest() is not None
    shutil.rmtree(tmp_path / "remote")
    (tmp_path / "remote").symlink_to(tmp_path / "remote")  # whatever looks there fails
    assert tiers.sequence(1, tiers.tiers[0].storage) == 3


def test_a_commit_record_that_cannot_be_read_stops_no_save(tmp_path: Path):
    saved_by(tmp_path, 1, step=1)
    saved_by(tmp_path, 1, step=2, run_id="second")
    record = next(tmp_path.glob("step-00000001.*")) / "COMMIT.json"
    record.rename(tmp_path / "elsewhere")
    record.symlink_to(tmp_path / "elsewhere")
    with Checkpointer(tmp_path) as ck:
        assert ck.save(3, values()).result(20).sequence == 3


def test_a_tier_that_cannot_be_read_is_passed_over_loudly(
    places: Places, host: Fleet, caplog: pytest.LogCaptureFixture
):
    host.kill(0)
    assert places.latest() == ("local", 3)
    assert "the memory tier is skipped" in caplog.text
    assert places.tiers.sequence(1, places.local) == 4


def test_a_tier_that_cannot_be_read_is_not_taken_for_an_empty_one(tmp_path: Path, host: Fleet):
    memory = host.storage()
    tiers = Tiers([Tier("memory", memory), Tier("local", open_storage(tmp_path / "empty"))])
    assert tiers.latest() is None
    host.kill(0)
    memory.close()
    with pytest.raises(StorageError, match=r"no checkpoint can be read: .*agent"):
        tiers.latest()


def test_a_checkpoint_is_found_by_its_path(places: Places):
    for storage, name in ((places.memory, "memory"), (places.local, "local")):
        found = places.tiers.find(f"{storage.url}/{places.folder(3)}")
        assert found is not None
        assert found.tier.name == name
    assert places.tiers.find(f"/elsewhere/{places.folder(3)}") is None


# What a restart takes


class Meeting:
    """A gather for ranks that are threads."""

    def __init__(self, size: int) -> None:
        self._barrier = threading.Barrier(size)
        self._values: list[Any] = [None] * size

    def of(self, rank: int) -> Callable[[Any], Sequence[Any]]:
        def gather(value: Any) -> Sequence[Any]:
            self._values[rank] = value
            self._barrier.wait(20)
            found = list(self._values)
            self._barrier.wait(20)
            return found

        return gather


def read_all(found: Found) -> str:
    problems = list(found.reader.problems())
    if problems:
        raise CorruptCheckpoint(problems[0])
    return f"{found.tier.name} {found.reader.record.step}"


def test_a_restart_takes_the_nearest_copy_that_loads(places: Places):
    taken = recover(places.tiers, read_all)
    assert taken is not None
    assert (taken.value, taken.tier, taken.skipped) == ("memory 3", "memory", ())


def test_damage_that_only_loading_finds_moves_on_to_the_next_tier_and_is_told(
    places: Places, host: Fleet, caplog: pytest.LogCaptureFixture
):
    host.damage(0, f"{places.folder(3)}/r00001.safetensors", at=4096 + 5)
    taken = recover(places.tiers, read_all)
    assert taken is not None
    assert taken.value == "local 3"
    assert len(taken.skipped) == 1
    assert "the digest does not match" in taken.skipped[0]
    assert "r00001.safetensors" in caplog.text


def test_what_one_rank_cannot_load_no_rank_takes(places: Places):
    meeting = Meeting(3)

    def restart(rank: int) -> Any:
        def load(found: Found) -> str:
            if rank == 1 and found.tier.name == "memory":
                raise CorruptCheckpoint("rank 1 read garbage")
            if rank == 2 and found.tier.name == "local" and found.reader.record.step == 3:
                raise StorageError("rank 2 lost the disk")
            return read_all(found)

        taken = recover(places.tiers, load, gather=meeting.of(rank))
        assert taken is not None
        return taken.value, taken.skipped

    outcomes = ranks(3, restart)
    assert [value for value, _ in outcomes] == ["local 2"] * 3
    for _, skipped in outcomes:
        assert "rank 1: CorruptCheckpoint: rank 1 read garbage" in skipped[0]
        assert "rank 2: StorageError: rank 2 lost the disk" in skipped[1]


def test_a_tier_that_one_rank_does_not_see_is_taken_by_none(places: Places):
    meeting = Meeting(2)

    def restart(rank: int) -> Any:
        tiers = places.tiers if rank == 0 else Tiers(places.tiers.tiers[1:])
        taken = recover(tiers, read_all, gather=meeting.of(rank))
        assert taken is not None
        return taken.value

    assert ranks(2, restart) == ["local 3", "local 3"]


def test_a_mismatch_on_one_rank_is_raised_on_all_and_no_other_checkpoint_is_tried(places: Places):
    meeting = Meeting(2)
    tried: list[str] = []

    def restart(rank: int) -> str:
        def load(found: Found) -> str:
            tried.append(found.reader.folder)
            if rank == 1:
                raise StateMismatch("'w' has another shape")
            return "loaded"

        try:
            recover(places.tiers, load, gather=meeting.of(rank))
        except StateMismatch as error:
            return str(error)
        return "no error"

    assert all("rank 1: StateMismatch: 'w' has another shape" in text for text in ranks(2, restart))
    assert len(tried) == 2


def test_an_error_that_is_none_of_ours_ends_the_restart_of_every_rank(places: Places):
    meeting = Meeting(2)

    def restart(rank: int) -> str:
        def load(found: Found) -> str:
            if rank == 1:
                raise RuntimeError("out of device memory")
            return "loaded"

        try:
            recover(places.tiers, load, gather=meeting.of(rank))
        except (CheckpointError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}"
        return "no error"

    first, second = ranks(2, restart)
    assert first.startswith("CheckpointError: ")
    assert first.endswith("rank 1: RuntimeError: out of device memory")
    assert second == "RuntimeError: out of device memory"


def test_destinations_that_cannot_be_loaded_into_are_no_damage(places: Places):
    def load(found: Found) -> str:
        raise InvalidState("'w': is on the meta device")

    with pytest.raises(StateMismatch, match="'w': is on the meta device"):
        recover(places.tiers, load)


def test_where_nothing_loads_every_rank_says_so(tmp_path: Path):
    saved_by(tmp_path, 2)
    meeting = Meeting(2)

    def restart(rank: int) -> str:
        def load(found: Found) -> str:
            if rank == 0:
                raise CorruptCheckpoint("garbage")
            return "loaded"

        tiers = Tiers([Tier("local", open_storage(tmp_path))])
        try:
            recover(tiers, load, gather=meeting.of(rank))
        except CorruptCheckpoint as error:
            return str(error)
        return "no error"

    assert all("rank 0: CorruptCheckpoint: garbage" in text for text in ranks(2, restart))


def test_a_rank_that_sees_nothing_starts_afresh_only_with_all_others(tmp_path: Path):
    saved_by(tmp_path / "seen", 2)
    meeting = Meeting(2)

    def restart(rank: int) -> Any:
        tiers = Tiers([Tier("local", open_storage(tmp_path / ("seen" if rank else "unseen")))])
        try:
            return recover(tiers, read_all, gather=meeting.of(rank))
        except CheckpointError as error:
            return str(error)

    assert all("not every rank sees it" in str(outcome) for outcome in ranks(2, restart))


def test_an_empty_run_recovers_nothing(tmp_path: Path):
    assert recover(Tiers([Tier("local", open_storage(tmp_path / "new"))]), read_all) is None


def test_marked_checkpoints_are_not_recovered(places: Places):
    for storage in (places.memory, places.local):
        storage.write(f"{places.folder(3)}/BAD.json", b'{"rank":0,"reason":"a test says so"}')
    taken = recover(places.tiers, read_all)
    assert taken is not None
    assert taken.value == "local 2"
    assert all("a test says so" in reason for reason in taken.skipped)
    assert os.path.isdir(places.local_root / places.folder(3))


def test_distrusted_checkpoints_are_passed_over_in_every_tier_and_stay(tmp_path: Path) -> None:
    config = CheckpointConfig(keep_last=5)
    with Checkpointer(tmp_path / "root", config=config) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, {"w": torch.full((4,), float(step))}).result()
        assert checkpointer.distrust(1, "a bit had flipped") == 2
        restored = torch.zeros(4)
        loaded = checkpointer.recover({"w": restored})
        assert loaded is not None
        assert (loaded.step, float(restored[0])) == (1, 1.0)
        assert [info.step for info in checkpointer.list()] == [1, 2, 3]
        checkpointer.save(2, {"w": torch.full((4,), 2.0)}).result()
        latest = checkpointer.latest()
        assert latest is not None
        assert latest.step == 2, "made anew"
