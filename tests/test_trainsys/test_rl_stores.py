"""One contract of all stores; a folder, a bucket, a mailbox here and in a Ray cluster keep it."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

import launch.ray_cluster
from launch import LaunchError
from tests.test_trainsys.rollouts import message, row
from trainsys.rl import ray_mailbox
from trainsys.rl.errors import SharingError
from trainsys.rl.stores import FolderStore, Mailbox, Store, open_store


class StoreContract:
    """What every store does."""

    @pytest.fixture
    def store(self) -> Any:
        raise NotImplementedError

    def test_what_is_published_is_listed_and_read(self, store: Store) -> None:
        assert store.names() == []
        sent = dict(message(row(seed, sequence=seed)) for seed in range(3))
        for name, data in sent.items():
            store.publish(name, data)
        assert set(store.names()) == sent.keys()
        assert {name: store.fetch(name, 2**20) for name in store.names()} == sent

    def test_no_more_is_read_than_tells_that_it_is_too_long(self, store: Store) -> None:
        name, data = message(row(1))
        store.publish(name, data)
        store.names()
        assert store.fetch(name, 100) == data[:101]

    def test_what_is_not_there_is_none(self, store: Store) -> None:
        assert store.fetch(message(row(1))[0], 100) is None

    def test_publishing_twice_keeps_one(self, store: Store) -> None:
        name, data = message(row(1))
        store.publish(name, data)
        store.publish(name, data)
        assert store.names() == [name]

    def test_threads_publish_and_read_at_once(self, store: Store) -> None:
        sent = [[message(row(seed, node=f"n{node}", sequence=seed)) for seed in range(4)] for node in range(4)]

        def publish(part: list[tuple[str, bytes]]) -> None:
            for item in part:
                store.publish(*item)

        threads = [threading.Thread(target=publish, args=(part,)) for part in sent]
        for thread in threads:
            thread.start()
        for _ in range(5):
            for name in store.names():
                assert store.fetch(name, 2**20) == dict(item for part in sent for item in part)[name]
        for thread in threads:
            thread.join()
        assert len(store.names()) == 16

    def test_closing_twice_is_fine(self, store: Store) -> None:
        store.close()
        store.close()


class TestFolder(StoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[Store]:
        with contextlib.closing(FolderStore(str(tmp_path / "store"), keep_s=600)) as store:
            yield store


class TestBucket(StoreContract):
    """An object store, as fsspec has it in memory: no renaming, no folders."""

    @pytest.fixture
    def store(self) -> Iterator[Store]:
        url = f"memory://{uuid.uuid4().hex}/swarm"
        with contextlib.closing(open_store(url, keep_s=600)) as store:
            yield store
        with contextlib.suppress(FileNotFoundError):
            fsspec.filesystem("memory").rm(url, recursive=True)


class TestS3(StoreContract):
    """An object store behind HTTP, by the URL and the environment that a node would be given."""

    _number: ClassVar[int] = 0

    @pytest.fixture(scope="class", autouse=True)
    @staticmethod
    def server() -> Iterator[None]:
        from moto.server import ThreadedMotoServer

        server = ThreadedMotoServer(port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        fsspec.filesystem("s3").clear_instance_cache()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
            patch.setenv("AWS_ACCESS_KEY_ID", "key")
            patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
            fsspec.filesystem("s3").makedirs("rollouts", exist_ok=True)  # moto's buckets outlive its servers
            yield
            fsspec.filesystem("s3").clear_instance_cache()
        server.stop()

    @pytest.fixture
    def store(self) -> Iterator[Store]:
        type(self)._number += 1
        with contextlib.closing(open_store(f"s3://rollouts/swarm{self._number}", keep_s=600)) as store:
            yield store


class TestMailbox(StoreContract):
    @pytest.fixture
    def store(self) -> Store:
        return Mailbox(keep_s=600, budget_bytes=2**20)


@pytest.mark.ray
class TestRay(StoreContract):
    _number: ClassVar[int] = 0

    @pytest.fixture(scope="class", autouse=True)
    @staticmethod
    def cluster() -> Iterator[None]:
        with launch.ray_cluster.joined(""):
            yield

    @pytest.fixture
    def store(self) -> Iterator[Store]:
        type(self)._number += 1
        with (
            ray_mailbox.serve(f"box-{self._number}", keep_s=600, budget_bytes=2**20) as url,
            contextlib.closing(open_store(url, keep_s=600)) as store,
        ):
            yield store

    def test_a_mailbox_that_is_not_there_is_said_so(self) -> None:
        with (
            ray_mailbox.serve("there", keep_s=1, budget_bytes=1) as url,
            pytest.raises(SharingError, match="no mailbox"),
        ):
            open_store(url.replace("there", "elsewhere"), keep_s=1)


def test_an_url_that_is_no_store_is_said_so() -> None:
    for url in ("nonsense://x", "ray-actor://host"):
        with pytest.raises((SharingError, LaunchError), match=url):
            open_store(url, keep_s=1)


class _Clock:
    now_s = 10_000.0

    def __call__(self) -> float:
        return self.now_s


def _tell(monkeypatch: pytest.MonkeyPatch, clock: _Clock) -> None:
    """Let files be as old as that clock says: the store's."""
    monkeypatch.setattr(LocalFileSystem, "modified", lambda self, path: datetime.fromtimestamp(clock.now_s, UTC))


def test_a_folder_lists_what_is_young_and_its_nodes_remove_what_is_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = _Clock()
    _tell(monkeypatch, clock)
    store = FolderStore(str(tmp_path), keep_s=120, clock=clock)
    first, data = message(row(1))
    store.publish(first, data)
    clock.now_s += 100
    assert store.names() == [first]
    clock.now_s += 300
    assert store.names() == []
    assert store.fetch(first, 2**20) is None
    second, data = message(row(2, sequence=2))
    store.publish(second, data)
    assert [path.name for path in tmp_path.rglob("*.arrows")] == [f"{second}.arrows"]
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_shows_no_half_written_message_and_ignores_what_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = _Clock()
    _tell(monkeypatch, clock)
    store = FolderStore(str(tmp_path), keep_s=120, clock=clock)
    name, data = message(row(1))
    store.publish(name, data)
    bucket = next(tmp_path.iterdir())
    (bucket / f".{name}.partial").write_bytes(data[:10])
    (bucket / "notes.txt").write_text("x")
    (bucket / "folder.arrows").mkdir()
    assert set(store.names()) == {name, "folder"}
    assert store.fetch("folder", 10) is None
    assert store.fetch("../" + name, 10) is None


def test_nodes_whose_clocks_are_hours_apart_hear_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    true = _Clock()
    _tell(monkeypatch, true)
    stores = [
        FolderStore(str(tmp_path), keep_s=120, clock=lambda off_s=off_s: true.now_s + off_s)  # type: ignore[misc]
        for off_s in (0, 3 * 3600, -5 * 3600)
    ]
    for number, store in enumerate(stores):
        store.publish(*message(row(number, sequence=1 + number)))
    assert [len(store.names()) for store in stores] == [3, 3, 3]
    assert len(list(tmp_path.rglob("*.arrows"))) == 3, "nothing is left where nobody looks"
    assert caplog.text.count("and counts") == 2, "each that is off says so once"
    true.now_s += 400
    for number, store in enumerate(stores):
        store.publish(*message(row(10 + number, sequence=10 + number)))
    assert [len(store.names()) for store in stores] == [3, 3, 3]
    assert len(list(tmp_path.rglob("*.arrows"))) == 3, "each has removed what is old"


def test_a_write_that_stalls_is_not_taken_for_another_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock, written = _Clock(), _Clock()
    move = LocalFileSystem.mv

    def stalled(self: LocalFileSystem, path1: str, path2: str, **options: Any) -> None:
        clock.now_s += 40
        move(self, path1, path2, **options)
        written.now_s = clock.now_s
        clock.now_s += 40

    monkeypatch.setattr(LocalFileSystem, "mv", stalled)
    _tell(monkeypatch, written)
    store = FolderStore(str(tmp_path), keep_s=600, clock=clock)
    name, data = message(row(1))
    store.publish(name, data)
    assert store._ahead_s == 0
    assert "and counts" not in caplog.text
    assert store.names() == [name]


def test_a_folder_that_is_deleted_under_way_is_made_again(tmp_path: Path) -> None:
    store = FolderStore(str(tmp_path / "store"), keep_s=600)
    first, second = message(row(1)), message(row(2, sequence=2))
    store.publish(*first)
    assert store.names() == [first[0]]
    shutil.rmtree(tmp_path / "store")
    assert store.fetch(first[0], 100) is None
    assert store.names() == []
    store.publish(*second)
    assert store.names() == [second[0]]
    assert store.fetch(second[0], 2**20) == second[1]


def test_where_files_tell_no_time_a_sender_whose_clock_is_a_minute_off_is_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def modified(self: LocalFileSystem, path: str) -> datetime:
        raise NotImplementedError

    monkeypatch.setattr(LocalFileSystem, "modified", modified)
    for offset in (-60, 60):
        clocks = _Clock(), _Clock()
        clocks[0].now_s += offset
        sender, receiver = (FolderStore(str(tmp_path / str(offset)), keep_s=60, clock=clock) for clock in clocks)
        sender.publish(*message(row(1)))
        assert len(receiver.names()) == 1


def test_a_mailbox_keeps_to_its_budget_at_the_cost_of_who_sends_most() -> None:
    name, data = message(row(1, node="quiet"))
    box = Mailbox(keep_s=600, budget_bytes=4 * len(data))
    box.publish(name, data)
    for seed in range(10):
        box.publish(*message(row(seed, node="loud", sequence=seed)))
    names = box.names()
    assert name in names
    assert len(names) in (3, 4)


def test_a_mailbox_forgets_what_is_old() -> None:
    clock = _Clock()
    box = Mailbox(keep_s=60, budget_bytes=2**20, clock=clock)
    box.publish(*message(row(1)))
    clock.now_s += 61
    assert box.names() == []
    box.publish(*message(row(2)))
    assert len(box._messages) == 1


def test_a_mailbox_takes_nothing_empty() -> None:
    with pytest.raises(SharingError, match="nothing in it"):
        Mailbox(keep_s=60, budget_bytes=100).publish("name", b"")


def test_a_pipe_in_a_folder_stalls_nobody(tmp_path: Path) -> None:
    store = FolderStore(str(tmp_path), keep_s=60)
    name, data = message(row(1))
    store.publish(name, data)
    (path,) = tmp_path.rglob(f"{name}*")
    path.unlink()
    os.mkfifo(path)
    assert store.names() == [name]
    assert store.fetch(name, 100) is None
