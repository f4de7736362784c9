"""Copies in the remote tier: whole, verified, resumed, never in the way."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

import checkpoint
from checkpoint import (
    CheckpointConfig,
    Checkpointer,
    CheckpointInfo,
    CorruptCheckpoint,
    SaveFailed,
    StorageError,
    catalog,
    retention,
)
from checkpoint.catalog import PROMOTION
from checkpoint.config import RemoteConfig
from checkpoint.local import LocalStorage
from checkpoint.promotion import Promoter, copy_file, marked
from checkpoint.reader import Reader
from checkpoint.storage import BlockSink, Storage, open_storage
from tests.ranks import RankFailed, run_ranks
from tests.test_checkpoint.worlds import ranks, saved_by, values, wait_until


class Time:
    """A clock that a promoter's pauses move on, so that nothing waits; `pauses` are those of its back-off."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.pauses: list[float] = []

    def clock(self) -> float:
        return self.now_s

    def pause(self, event: threading.Event, seconds: float) -> None:
        self.now_s += seconds
        self.pauses.append(seconds)
        event.wait(0.001)


class Broken(LocalStorage):
    """A remote tier that fails when `fails(call, path)` says so."""

    def __init__(self, root: Path, fails: Callable[[str, str], bool]) -> None:
        super().__init__(root)
        self._fails = fails
        self.created: list[str] = []

    def _check(self, call: str, path: str) -> None:
        if self._fails(call, path):
            raise StorageError(f"{path}: cannot {call}: the link is down")

    @contextlib.contextmanager
    def create_at(self, path: str, nbytes: int) -> Iterator[BlockSink]:
        self._check("create_at", path)
        self.created.append(path)
        with super().create_at(path, nbytes) as sink:
            yield sink

    def write(self, path: str, data: bytes) -> None:
        self._check("write", path)
        super().write(path, data)

    def write_new(self, path: str, data: bytes) -> None:
        self._check("write_new", path)
        super().write_new(path, data)


def promoter(local: Path, remote: Storage | str, rank: int = 0, world_size: int = 1, **options: Any) -> Promoter:
    time = options.pop("time", None) or Time()
    config = RemoteConfig(url="unused", **options)
    storage = open_storage(remote) if isinstance(remote, str) else remote
    return Promoter(
        open_storage(local), storage, config, rank=rank, world_size=world_size, clock=time.clock, pause=time.pause
    )


def folders(root: Path) -> list[str]:
    """Return the committed checkpoints, oldest first."""
    return [reader.folder for reader in catalog.scan(open_storage(root)).committed]


def promote(local: Path, remote: Storage | str, world_size: int = 1, **options: Any) -> CheckpointInfo:
    """Copy the newest checkpoint, a thread for each rank."""
    folder = folders(local)[-1]
    made = [promoter(local, remote, rank, world_size, **options) for rank in range(world_size)]
    for one in made:
        one.announce(folder)
    copies = [copy.result(60) for copy in [one.submit(folder) for one in made]]
    assert all(one.close(60) for one in made)
    assert len({copy.path for copy in copies}) == 1
    return copies[0]


@pytest.fixture
def local(tmp_path: Path) -> Path:
    """A root with one checkpoint of three ranks."""
    saved_by(tmp_path / "local", 3, seed=5)
    return tmp_path / "local"


def tree(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


# Whole copies


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_any_number_of_ranks_copies_what_three_saved(local: Path, tmp_path: Path, world_size: int):
    copy = promote(local, str(tmp_path / "remote"), world_size)
    assert copy.step == 1
    assert checkpoint.verify(copy).ok
    assert torch.equal(checkpoint.read(copy, "flat")["flat"], values(5)["flat"])
    saved, copied = tree(local), tree(tmp_path / "remote")
    assert copied == {path: data for path, data in saved.items() if "/parts/" not in path}


def test_a_copy_in_an_object_store_is_a_checkpoint(local: Path):
    url = f"memory://{uuid.uuid4().hex}/run"
    copy = promote(local, url, 2)
    assert copy.path.startswith("memory://")
    assert checkpoint.verify(copy).ok


def test_the_commit_record_comes_last(local: Path, tmp_path: Path):
    order: list[str] = []

    def watch(call: str, path: str) -> bool:
        order.append(path.rpartition("/")[2])
        return False

    promote(local, Broken(tmp_path / "remote", watch))
    assert order[-2:] == ["slices.arrow", "COMMIT.json"]
    assert len(order) == 8


def test_each_rank_copies_its_own_files_and_only_once(local: Path, tmp_path: Path):
    remotes = [Broken(tmp_path / "remote", lambda call, path: False) for _ in range(3)]
    made = [promoter(local, remote, rank, 3) for rank, remote in enumerate(remotes)]
    (folder,) = folders(local)
    made[0].announce(folder)
    for copy in [one.submit(folder) for one in made]:
        copy.result(60)
    assert all(one.close(60) for one in made)
    for rank, remote in enumerate(remotes):
        names = [path.rpartition("/")[2] for path in remote.created]
        assert sorted(names) == [f"r{rank:05d}.objects.json", f"r{rank:05d}.safetensors"]


# Damage


@pytest.mark.parametrize("name", ["r00001.safetensors", "r00001.objects.json", "slices.arrow"])
def test_damage_is_found_on_the_way_and_never_committed(
    local: Path, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
):
    (folder,) = folders(local)
    path = local / folder / name
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptCheckpoint, match=name):
        promote(local, str(tmp_path / "remote"))
    assert folders(tmp_path / "remote") == []
    assert not (tmp_path / "remote" / folder / name).exists()
    assert f"{folder} was not copied" in caplog.text
    assert marked(open_storage(local)) == []


def test_every_flipped_bit_of_a_shard_is_found(local: Path, tmp_path: Path):
    (folder,) = folders(local)
    path = local / folder / "r00000.safetensors"
    sound = path.read_bytes()
    reader = Reader(open_storage(local), folder)
    (record,) = (f for f in reader.record.files if f.path == path.name)
    for at in range(0, len(sound), 97):
        data = bytearray(sound)
        data[at] ^= 1 << at % 8
        path.write_bytes(data)
        with pytest.raises(CorruptCheckpoint, match=r"r00000\.safetensors"):
            copy_file(reader, record, open_storage(local), open_storage(tmp_path / "remote"))
    path.write_bytes(sound)
    copy_file(reader, record, open_storage(local), open_storage(tmp_path / "remote"))
    assert (tmp_path / "remote" / folder / path.name).read_bytes() == sound


# Failures


def test_a_failing_store_is_tried_ever_less_often_until_it_works(local: Path, tmp_path: Path):
    left = [9]

    def down(call: str, path: str) -> bool:
        left[0] -= 1
        return left[0] >= 0

    time = Time()
    promote(local, Broken(tmp_path / "remote", down), time=time)
    assert time.pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60]


def test_a_store_that_never_works_is_given_up_after_its_time(local: Path, tmp_path: Path):
    time = Time()
    remote = Broken(tmp_path / "remote", lambda call, path: True)
    with pytest.raises(StorageError, match="the link is down"):
        promote(local, remote, time=time, retry_s=100.0)
    assert time.pauses == [1, 2, 4, 8, 16, 32, 37]
    assert marked(open_storage(local)) == []


def test_a_rank_that_gives_up_is_named_by_rank_0(local: Path, tmp_path: Path):
    healthy = Broken(tmp_path / "remote", lambda call, path: False)
    broken = Broken(tmp_path / "remote", lambda call, path: True)
    made = [promoter(local, remote, rank, 2, retry_s=100.0) for rank, remote in enumerate((healthy, broken))]
    (folder,) = folders(local)
    made[0].announce(folder)
    copies = [one.submit(folder) for one in made]
    with pytest.raises(SaveFailed, match=r"rank 1 gave up: StorageError: .*the link is down"):
        copies[0].result(60)
    with pytest.raises(StorageError, match="the link is down"):
        copies[1].result(60)
    assert all(one.close(60) for one in made)
    assert folders(tmp_path / "remote") == []
    assert marked(open_storage(local)) == []


def test_ranks_that_never_come_are_named_when_the_time_is_over(local: Path, tmp_path: Path):
    first = promoter(local, str(tmp_path / "remote"), 0, 3, retry_s=20.0)
    (folder,) = folders(local)
    first.announce(folder)
    with pytest.raises(SaveFailed, match=r"not copied within 20 s: .*r00001\.objects.*r00002\.safetensors"):
        first.submit(folder).result(60)
    first.close(60)


def test_closing_ends_the_trying_and_the_next_launch_goes_on(local: Path, tmp_path: Path):
    is_down = threading.Event()
    is_down.set()
    entered = threading.Event()

    def down(call: str, path: str) -> bool:
        entered.set()
        return is_down.is_set() and "r00001" in path

    remote = Broken(tmp_path / "remote", down)
    config = RemoteConfig(url="unused")
    first = Promoter(open_storage(local), remote, config, rank=0, world_size=1)  # with the real clock
    (folder,) = folders(local)
    first.announce(folder)
    copy = first.submit(folder)
    assert entered.wait(20)
    assert first.close(20)
    with pytest.raises(StorageError, match="the link is down"):
        copy.result(0)
    assert marked(open_storage(local)) == [folder]
    is_down.clear()
    remote.created.clear()
    assert promoter(local, remote).close(20)
    assert folders(tmp_path / "remote") == [folder]
    assert not any("r00000" in path for path in remote.created)
    assert marked(open_storage(local)) == []


def test_what_another_rank_could_not_copy_at_the_end_is_left_to_the_next_launch(local: Path, tmp_path: Path):
    entered = threading.Event()

    def down(call: str, path: str) -> bool:
        entered.set()
        return True

    healthy, broken = (Broken(tmp_path / "remote", fails) for fails in (lambda call, path: False, down))
    config = RemoteConfig(url="unused")
    made = [
        Promoter(open_storage(local), remote, config, rank=rank, world_size=2)  # with the real clock
        for rank, remote in enumerate((healthy, broken))
    ]
    (folder,) = folders(local)
    made[0].announce(folder)
    copies = [one.submit(folder) for one in made]
    assert entered.wait(20)
    assert all(ranks(2, lambda rank: made[rank].close(20)))
    with pytest.raises(SaveFailed, match="rank 1 gave up"):
        copies[0].result(0)
    assert marked(open_storage(local)) == [folder]
    assert promoter(local, healthy).close(20)
    assert folders(tmp_path / "remote") == [folder]


def test_what_a_killed_launch_left_is_completed_and_nothing_is_sent_twice(local: Path, tmp_path: Path):
    remote = tmp_path / "remote"
    (folder,) = folders(local)
    for num_files in range(1, 8):
        with pytest.raises(RankFailed, match="died"):
            run_ranks(_copy_and_die, 1, str(local), str(remote), num_files)
        assert folders(remote) == []
        assert len([p for p in remote.rglob("*") if p.is_file() and not p.name.startswith(".")]) == num_files - 1
    there = {path: path.stat().st_ino for path in (remote / folder).glob("r*")}
    assert promoter(local, str(remote)).close(20)
    assert folders(remote) == [folder]
    assert {path: path.stat().st_ino for path in (remote / folder).glob("r*")} == there
    assert checkpoint.verify(remote).ok


def _copy_and_die(rank: int, world_size: int, local: str, remote: str, num_files: int) -> None:
    """Be a launch that is killed amid the writing of its n-th file: what is there already is not written again."""
    there = sum(path.is_file() and not path.name.startswith(".") for path in Path(remote).rglob("*"))

    def die(call: str, path: str) -> bool:
        nonlocal there
        there += 1
        if there == num_files:
            (Path(remote) / path).parent.mkdir(parents=True, exist_ok=True)
            (Path(remote) / path).with_name(".half.tmp").write_bytes(b"half")
            os.kill(os.getpid(), 9)
        return False

    if not marked(open_storage(local)):
        promote(Path(local), Broken(Path(remote), die))
    promoter(Path(local), Broken(Path(remote), die)).close(60)


# Lag, retention


class Gate(Broken):
    """A remote tier that lets nothing in until it is opened."""

    def __init__(self, root: Path) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        super().__init__(root, self._wait)

    def _wait(self, call: str, path: str) -> bool:
        self.reached.set()
        return not self.opened.wait(20)


def three_steps(root: Path) -> Sequence[str]:
    for step in (1, 2, 3):
        saved_by(root, 2, step, seed=step)
    return folders(root)


def test_one_is_under_way_and_of_those_that_wait_the_newest_counts(tmp_path: Path):
    first, second, third = three_steps(tmp_path / "local")
    gate = Gate(tmp_path / "remote")
    one = promoter(tmp_path / "local", gate)
    copies: dict[str, Future[CheckpointInfo]] = {}
    for folder in (first, second, third):
        one.announce(folder)
        copies[folder] = one.submit(folder)
        assert gate.reached.wait(20)
    with pytest.raises(SaveFailed, match=f"{second}: {third}, which is newer, is copied in its place"):
        copies[second].result(0)
    assert not copies[first].done()
    assert marked(open_storage(tmp_path / "local")) == [first, third]
    gate.opened.set()
    assert copies[first].result(20).step == 1
    assert copies[third].result(20).step == 3
    assert one.close(20)
    assert folders(tmp_path / "remote") == [first, third]


def test_other_ranks_copy_what_rank_0_chose(tmp_path: Path):
    steps = three_steps(tmp_path / "local")
    gate = Gate(tmp_path / "remote")
    made = [promoter(tmp_path / "local", gate, rank, 2) for rank in range(2)]
    copies = []
    for folder in steps:
        made[0].announce(folder)
        copies.append(made[0].submit(folder))
        assert gate.reached.wait(20)
    late = [made[1].submit(folder) for folder in steps]
    gate.opened.set()
    outcomes = [[type(copy.exception(20)) for copy in of] for of in (copies, late)]
    assert outcomes == [[type(None), SaveFailed, type(None)]] * 2
    assert all(one.close(20) for one in made)


def test_retention_leaves_alone_what_is_being_copied(tmp_path: Path):
    first, _, third = three_steps(tmp_path / "local")
    local = open_storage(tmp_path / "local")
    gate = Gate(tmp_path / "remote")
    one = promoter(tmp_path / "local", gate)
    one.announce(first)
    copy = one.submit(first)
    assert gate.reached.wait(20)
    going = retention.removable(local, keep_last=1, keep_every=0, abandoned=lambda name: False)
    assert first not in [removal.folder for removal in going]
    gate.opened.set()
    copy.result(20)
    one.close(20)
    going = retention.removable(local, keep_last=1, keep_every=0, abandoned=lambda name: False)
    assert [removal.folder for removal in going] == [first, folders(tmp_path / "local")[1]]
    assert folders(tmp_path / "local")[-1] == third


def test_the_remote_tier_has_its_own_retention_and_loses_what_was_given_up(tmp_path: Path):
    steps = three_steps(tmp_path / "local")
    remote = tmp_path / "remote"
    (remote / "step-00000000.a0.0123456789abcdef").mkdir(parents=True)
    one = promoter(tmp_path / "local", str(remote), keep_last=1, keep_every=2)
    for folder in steps:
        one.announce(folder)
        one.submit(folder).result(20)
    one.close(20)
    assert sorted(path.name for path in remote.iterdir()) == sorted(steps[1:])


def test_what_is_committed_in_the_remote_tier_already_is_only_unmarked(local: Path, tmp_path: Path):
    promote(local, str(tmp_path / "remote"))
    (folder,) = folders(local)
    (local / folder / PROMOTION).write_bytes(b'{"state":"is copied"}')
    refuse = Broken(tmp_path / "remote", lambda call, path: True)
    assert promoter(local, refuse).close(20)
    assert marked(open_storage(local)) == []
    assert refuse.created == []


def test_a_marked_checkpoint_that_was_never_committed_is_let_go(local: Path, tmp_path: Path):
    (folder,) = folders(local)
    (local / folder / "COMMIT.json").unlink()
    (local / folder / PROMOTION).write_bytes(b'{"state":"waits"}')
    assert promoter(local, str(tmp_path / "remote")).close(20)
    assert marked(open_storage(local)) == []


def test_one_that_was_never_committed_does_not_push_out_one_that_was(local: Path, tmp_path: Path):
    (folder,) = folders(local)
    saved_by(local, 3, step=2, run_id="second")
    newest = folders(local)[-1]
    (local / newest / "COMMIT.json").unlink()
    for name in (folder, newest):
        (local / name / PROMOTION).write_bytes(b'{"state":"waits"}')
    assert promoter(local, str(tmp_path / "remote")).close(20)
    assert folders(tmp_path / "remote") == [folder]
    assert marked(open_storage(local)) == []


def test_the_caller_never_waits_for_the_remote_tier(local: Path, tmp_path: Path):
    gate = Gate(tmp_path / "remote")
    one = promoter(local, gate)
    (folder,) = folders(local)
    one.announce(folder)
    copy = one.submit(folder)  # returns although the gate is shut
    assert gate.reached.wait(20)
    assert not one.close(timeout_s=0)
    gate.opened.set()
    assert copy.result(20).folder == folder
    wait_until(lambda: one.close(0))


def test_ranks_as_threads_end_together(local: Path, tmp_path: Path):
    (folder,) = folders(local)
    promoter(local, str(tmp_path / "unused")).announce(folder)
    remote = str(tmp_path / "remote")

    def take_part(rank: int) -> bool:
        return promoter(local, remote, rank, 3).close(30)

    assert ranks(3, take_part) == [True, True, True]
    assert folders(tmp_path / "remote") == [folder]


# Checkpoints that refer to others


def weights(step: int) -> dict[str, torch.Tensor]:
    return {"frozen": torch.arange(50_000.0), "trained": torch.full((1000,), float(step))}


def saved_by_delta(root: Path, steps: int) -> None:
    remote = RemoteConfig(url=str(root.with_name("remote")))
    with Checkpointer(root, config=CheckpointConfig(delta=True, keep_last=2, remote=remote)) as ck:
        for step in range(1, steps + 1):
            ck.save(step, weights(step)).result(20)


def test_what_a_copy_refers_to_comes_with_it_and_goes_with_the_last_that_needs_it(tmp_path: Path):
    local, remote = tmp_path / "local", tmp_path / "remote"
    saved_by_delta(local, 3)
    copy = promote(local, str(remote), keep_last=1)
    files = [record.path for record in Reader(open_storage(remote), copy.folder).record.files]
    assert any("/" in path for path in files)
    assert checkpoint.verify(copy).ok
    shutil.rmtree(local)
    found = checkpoint.read(remote)
    assert all(torch.equal(found[name], value) for name, value in weights(3).items())
    saved_by_delta(local, 1)  # without a checkpoint to refer to, and yet newer than what the remote tier has
    promote(local, str(remote), keep_last=1)
    assert len(list(remote.iterdir())) == 1
    assert checkpoint.verify(remote).ok


def test_damage_in_what_is_referred_to_is_found(tmp_path: Path):
    local, remote = tmp_path / "local", tmp_path / "remote"
    saved_by_delta(local, 2)
    first = local / folders(local)[0] / "r00000.safetensors"
    data = bytearray(first.read_bytes())
    data[len(data) // 2] ^= 1
    first.write_bytes(data)
    with pytest.raises(CorruptCheckpoint, match=r"r00000\.safetensors"):
        promote(local, str(remote))
    assert folders(remote) == []
