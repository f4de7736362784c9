"""Files on several hosts' agents: how many copies, where, and what a lost host leaves."""

from __future__ import annotations

import random
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint import CheckpointConfig, Checkpointer, StorageError
from checkpoint.client import Link, Request
from checkpoint.memory import MemoryStorage
from checkpoint.storage import MirroredSource, Storage, open_storage, sizes
from tests.test_checkpoint.fleets import Fleet, fleet
from tests.test_checkpoint.test_storage import StorageContract

MIB = 1 << 20


@pytest.fixture
def three(tmp_path: Path) -> Iterator[Fleet]:
    with fleet(tmp_path, 3) as made:
        yield made


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Agents that no test ends; every test has a name of its own there."""
    with fleet(tmp_path_factory.mktemp("shared"), 3) as made:
        yield made


@pytest.fixture(scope="module")
def survivors(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Three agents, of which the second is gone."""
    with fleet(tmp_path_factory.mktemp("survivors"), 3) as made:
        made.kill(1)
        yield made


class TestOneAgent(StorageContract):
    @pytest.fixture
    def storage(self, shared: Fleet) -> Storage:
        return MemoryStorage([shared.agents[0].address], shared.agents[0].token, uuid.uuid4().hex)


class TestAgentsOfThreeHosts(StorageContract):
    @pytest.fixture
    def storage(self, shared: Fleet) -> Storage:
        return shared.storage(1, peers=1, name=uuid.uuid4().hex)


class TestSurvivorsOfThreeHosts(StorageContract):
    @pytest.fixture
    def storage(self, survivors: Fleet) -> Storage:
        return survivors.storage(1, peers=1, name=uuid.uuid4().hex)


def write_at(storage: Storage, path: str, content: bytes) -> None:
    with storage.create_at(path, len(content)) as sink:
        for start in range(0, len(content), MIB):
            sink.write_at(start, memoryview(content)[start : start + MIB])


def test_large_files_lie_here_and_on_the_next_hosts_small_ones_everywhere(three: Fleet):
    for home in range(3):
        storage = three.storage(home, peers=1)
        write_at(storage, f"large{home}", b"x" * 100)
        storage.write(f"small{home}", b"x")
        storage.write_new(f"record{home}", b"x")
    assert [sorted(three.holders(f"large{home}")) for home in range(3)] == [[0, 1], [1, 2], [0, 2]]
    assert all(three.holders(f"{kind}{home}") == [0, 1, 2] for kind in ("small", "record") for home in range(3))


def test_without_peers_a_large_file_stays_at_home(three: Fleet):
    write_at(three.storage(2), "large", b"x")
    assert three.holders("large") == [2]


def test_every_host_reads_what_any_host_wrote(three: Fleet):
    content = random.Random(1).randbytes(3 * MIB)
    write_at(three.storage(2), "folder/large", content)
    for home in range(3):
        storage = three.storage(home)
        assert storage.read("folder/large") == content
        assert sizes(storage, "folder") == {"large": 3 * MIB}


def test_a_lost_host_takes_no_file_with_it(three: Fleet):
    content = random.Random(1).randbytes(3 * MIB)
    write_at(three.storage(0, peers=1), "large", content)
    reader = three.storage(0, peers=1)
    with reader.open("large") as source:
        three.kill(0)
        buffer = bytearray(100)
        assert source.read_into(MIB, memoryview(buffer)) == 100
        assert buffer == content[MIB : MIB + 100]
    assert three.storage(1).read("large") == content
    assert reader.size("large") == 3 * MIB


def test_a_copy_goes_to_the_next_host_where_one_is_gone(three: Fleet):
    three.kill(1)
    write_at(three.storage(0, peers=1), "large", b"x")
    three.storage(0, peers=1).write("small", b"x")
    with three.client(2) as client:
        assert client.call({"op": "stat", "path": "run/large"})[0]["nbytes"] == 1
    assert three.storage(2).read("small") == b"x"


def test_a_file_survives_a_host_that_is_lost_while_it_is_written(three: Fleet):
    storage = three.storage(0, peers=1)
    with storage.create_at("large", 2 * MIB) as sink:
        sink.write_at(0, memoryview(bytes(MIB)))
        three.kill(0)
        sink.write_at(MIB, memoryview(bytes(MIB)))
    assert three.storage(2).read("large") == bytes(2 * MIB)


def test_too_few_copies_fail_the_write_and_say_why(three: Fleet):
    storage = three.storage(0, peers=2)
    three.kill(2)
    for write in (
        lambda: write_at(storage, "large", b"x"),
        lambda: storage.write("small", b"x"),
        lambda: storage.write_new("record", b"x"),
    ):
        with pytest.raises(StorageError, match=r"too few copies \(2 on other hosts asked for\): agent 127"):
            write()
    with pytest.raises(StorageError, match="too few copies"), storage.create_at("late", 1):
        pass
    three.kill(0)
    with pytest.raises(StorageError, match=r"too few copies \(one on this host asked for\)"):
        write_at(three.storage(0), "large", b"x")


def test_a_copy_lost_while_it_is_written_fails_the_write_if_it_is_needed(three: Fleet):
    def write() -> None:
        with three.storage(0, peers=2).create_at("large", 2) as sink:
            three.kill(1)
            sink.write_at(0, memoryview(b"ab"))

    with pytest.raises(StorageError, match="large: cannot write: too few copies"):
        write()
    assert three.storage(2).size("large") is None


def test_a_failed_write_leaves_no_file_and_no_memory(three: Fleet):
    storage = three.storage(0, peers=2)

    def fail_half_way() -> None:
        with storage.create_at("large", MIB) as sink:
            sink.write_at(0, memoryview(bytes(1000)))
            raise KeyError

    with pytest.raises(KeyError):
        fail_half_way()
    assert storage.size("large") is None
    for index in range(3):
        with three.client(index) as client:
            assert client.call({"op": "about"})[0]["used_bytes"] == 0


def test_a_full_agent_says_so(tmp_path: Path):
    with (
        fleet(tmp_path, 1, limit_bytes=MIB) as small,
        pytest.raises(StorageError, match=r"large.*do not fit.*more memory"),
    ):
        write_at(small.storage(), "large", bytes(2 * MIB))


def test_a_damaged_copy_of_a_small_file_gives_way_to_another(three: Fleet, caplog: pytest.LogCaptureFixture):
    storage = three.storage(0, peers=1)
    storage.write("COMMIT.json", b"the record")
    three.damage(0, "COMMIT.json", at=3)
    assert storage.read("COMMIT.json") == b"the record"
    assert "COMMIT.json: the copy of agent" in caplog.text


def test_copies_that_are_gone_are_passed_over_on_the_way_to_a_sound_one(three: Fleet):
    storage = three.storage(0, peers=2)
    write_at(storage, "large", b"content")
    three.damage(0, "large", at=0)
    buffer = bytearray(7)
    with storage.open("large") as source:
        assert source.read_into(0, memoryview(buffer)) == 7
        assert buffer == b"bontent"
        three.kill(1)
        assert isinstance(source, MirroredSource)
        assert [copy.read_into(0, memoryview(buffer)) for copy in source.copies()] == [7, 7]
        assert buffer == b"content"


def test_damage_everywhere_is_left_to_the_fingerprints(three: Fleet):
    three.storage(0).write("file", b"ab")
    for index in range(3):
        three.damage(index, "file", at=0)
    assert three.storage(1).read("file") == b"`b"


def test_runs_do_not_see_each_other(three: Fleet):
    three.storage(0, name="one").write("file", b"1")
    three.storage(0, name="two/inner").write("file", b"2")
    assert three.storage(0, name="one").read("file") == b"1"
    three.storage(0, name="one").remove("file")
    assert three.storage(0, name="two/inner").read("file") == b"2"


def test_when_no_agent_is_left_nothing_is_taken_for_empty(three: Fleet):
    storage = three.storage(0)
    for index in range(3):
        three.kill(index)
    for look in (lambda: storage.entries(""), lambda: storage.size("file"), lambda: storage.read("file")):
        with pytest.raises(StorageError, match="agent 127"):
            look()


def test_an_agent_that_was_gone_is_asked_again_after_a_while(three: Fleet):
    now_s = [0.0]
    with three.client(0) as client:
        client._clock = lambda: now_s[0]
        address, client.address = client.address, "127.0.0.1:1"
        for _ in range(2):
            with pytest.raises(StorageError, match="refused"):
                client.call({"op": "about"})
        client.address = address
        with pytest.raises(StorageError, match="refused"):
            client.call({"op": "about"})
        now_s[0] = 11.0
        assert client.call({"op": "about"})[0]["num_files"] == 0


@pytest.mark.parametrize("url", ["agents://host:1/run", "agents://a:x@host:1/run", "agents://a:0@host:1", "agents://"])
def test_a_url_that_names_no_agents_is_refused(url: str):
    with pytest.raises(StorageError, match="is the form"):
        open_storage(url)


def test_a_token_that_is_given_is_not_in_the_url(three: Fleet):
    storage = MemoryStorage([three.agents[0].address], three.token, "run")
    storage.write("file", b"x")
    assert storage.reopening is None
    assert open_storage(storage.url, {"token": three.token}).read("file") == b"x"
    with pytest.raises(StorageError, match="is the form"):
        open_storage(storage.url)


def test_more_peers_than_hosts_are_refused():
    with pytest.raises(ValueError, match="peers: 1 copies on other hosts, and there are 0 others"):
        MemoryStorage(["host:1"], b"x" * 32, "run", peers=1)


# Checkpoints


class Strike:
    """Kills an agent at the n-th request from now on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_requests = 0
        self._kill: Callable[[], None] = lambda: None
        self._at = -1
        self._lock = threading.Lock()
        ask = Link.ask

        def counted(link: Link, request: Request, payload: Any = b"") -> None:
            with self._lock:
                if self.num_requests == self._at:
                    self._kill()
                self.num_requests += 1
            ask(link, request, payload)

        monkeypatch.setattr(Link, "ask", counted)

    def arm(self, at: int, kill: Callable[[], None]) -> None:
        self.num_requests, self._at, self._kill = 0, at, kill


def save(storage: MemoryStorage, step: int) -> bool:
    """Save a state that tells its step everywhere; return whether it was committed."""
    config = CheckpointConfig(keep_last=1, commit_timeout_s=20, on_error="warn")
    state = {"w": torch.full((300_000,), float(step)), "b": torch.full((7,), step)}
    with Checkpointer(storage.url, config=config) as ck:
        return ck.save(step, state, {"step": step}).exception(20) is None


def loaded(storage: MemoryStorage) -> int:
    """Return the step of the newest checkpoint, after checking every element."""
    state = {"w": torch.zeros(300_000), "b": torch.zeros(7, dtype=torch.int64)}
    with Checkpointer(storage.url) as ck:
        found = ck.recover(state)
    assert found is not None
    assert (state["w"] == found.step).all()
    assert (state["b"] == found.step).all()
    assert found.objects == {"step": found.step}
    return found.step


@pytest.mark.parametrize(("victim", "possible"), [(0, {2}), (1, {1, 2})], ids=["home", "the only peer"])
def test_an_agent_killed_at_any_request_leaves_the_old_or_the_new_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, victim: int, possible: set[int]
):
    strike = Strike(monkeypatch)
    with fleet(tmp_path / "dry", 2) as made:
        assert save(made.storage(peers=1), 1)
        strike.arm(-1, lambda: None)
        assert save(made.storage(peers=1), 2)
        total = strike.num_requests
    outcomes = []
    for at in range(victim, total, 6):
        with fleet(tmp_path / str(at), 2) as made:
            assert save(made.storage(peers=1), 1)
            strike.arm(at, lambda made=made: made.kill(victim))
            committed = save(made.storage(peers=1), 2)
            assert strike.num_requests > at
            strike.arm(-1, lambda: None)
            outcomes.append((committed, loaded(made.storage())))
    assert all(step == 2 for committed, step in outcomes if committed)
    assert {step for _, step in outcomes} == possible
