"""The agent: files in RAM behind a port that anybody may knock at."""

from __future__ import annotations

import json
import os
import random
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from checkpoint import StorageError, hosts, wire
from checkpoint import agent as agent_module
from checkpoint.client import Agent
from checkpoint.ram import Rejected, Store
from checkpoint.wire import Refused
from tests.test_checkpoint.fleets import Fleet, fleet
from tests.test_checkpoint.worlds import ranks, wait_until

MIB = 1 << 20


@pytest.fixture
def one(tmp_path: Path) -> Iterator[Fleet]:
    with fleet(tmp_path, 1, limit_bytes=64 * MIB) as made:
        yield made


@pytest.fixture
def client(one: Fleet) -> Iterator[Agent]:
    with one.client(0) as agent:
        yield agent


def used_bytes(client: Agent) -> int:
    return int(client.call({"op": "about"})[0]["used_bytes"])


def resident_bytes(fleet: Fleet) -> int:
    fields = Path(f"/proc/{fleet.agents[0].pid}/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


def connect(fleet: Fleet) -> socket.socket:
    host, _, port = fleet.agents[0].address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=20)


# Memory


def test_an_upload_is_seen_when_it_is_committed_and_not_before(client: Agent):
    with client.link() as link:
        upload = client.begin(link, {"op": "create", "path": "a/b", "nbytes": 6})(None)[0]["upload"]
        client.call({"op": "put", "upload": upload, "offset": 3}, b"def")
        client.call({"op": "put", "upload": upload, "offset": 0}, b"abc")
        assert client.call({"op": "stat", "path": "a/b"})[0]["nbytes"] is None
        client.call({"op": "commit", "upload": upload, "tag": "t"})
    buffer = bytearray(9)
    assert client.call({"op": "read", "path": "a/b", "offset": 1, "nbytes": 9}, b"", memoryview(buffer))[1] == 5
    assert buffer[:5] == b"bcdef"
    assert client.call({"op": "stat", "path": "a/b"})[0] == {"nbytes": 6, "tag": "t"}


def test_an_upload_that_misses_bytes_is_not_committed(client: Agent):
    with client.link() as link:
        upload = client.begin(link, {"op": "create", "path": "a", "nbytes": 6})(None)[0]["upload"]
        client.call({"op": "put", "upload": upload, "offset": 0}, b"abc")
        with pytest.raises(StorageError, match="3 of 6 bytes arrived"):
            client.call({"op": "commit", "upload": upload, "tag": ""})


def test_what_does_not_fit_is_refused_before_a_byte_is_taken(client: Agent):
    with pytest.raises(StorageError, match=r"67108865 bytes do not fit: 0 of 67108864 are in use; give the agent more"):
        client.call({"op": "create", "path": "a", "nbytes": 64 * MIB + 1})
    client.call({"op": "write", "path": "small", "tag": ""}, bytes(40 * MIB))
    with pytest.raises(StorageError, match="do not fit"):
        client.call({"op": "write", "path": "second", "tag": ""}, bytes(40 * MIB))
    assert client.call({"op": "list", "folder": ""})[0]["entries"][0][0] == "small"


def test_memory_of_what_is_removed_or_replaced_is_used_again(client: Agent):
    for _ in range(5):
        client.call({"op": "write", "path": "run/a", "tag": ""}, bytes(20 * MIB))
    assert used_bytes(client) == 20 * MIB
    client.call({"op": "remove", "path": "run"})
    assert used_bytes(client) == 0
    client.call({"op": "write", "path": "other", "tag": ""}, bytes(60 * MIB))


def test_memory_is_reused_for_the_next_file_of_its_size_and_given_up_for_one_of_another():
    store = Store(limit_bytes=12 * MIB)
    for nbytes in (4 * MIB, 4 * MIB, 8 * MIB, 12 * MIB, 5 * MIB):
        upload = store.create("file", nbytes)
        with store.put(upload, 0, nbytes) as memory:
            memory[:] = bytes(nbytes)
        if nbytes == 12 * MIB:
            store.remove("file")
        store.commit(upload, "")
        store.remove("file")
        assert store.about()["used_bytes"] == 0


def test_the_uploads_of_a_client_that_dies_are_forgotten(one: Fleet, client: Agent):
    with one.client(0) as dying, dying.link() as link:
        dying.begin(link, {"op": "create", "path": "half", "nbytes": 30 * MIB})(None)
        assert used_bytes(client) == 30 * MIB
        link.close()
        wait_until(lambda: used_bytes(client) == 0)
        link.is_clean = False


def test_a_reader_keeps_what_it_reads_when_the_file_is_replaced():
    store = Store(limit_bytes=MIB)
    for content in (b"first", b"other"):
        upload = store.create("file", 5)
        with store.put(upload, 0, 5) as memory:
            memory[:] = content
        if content == b"first":
            store.commit(upload, "")
        else:
            with store.read("file", 0, 5) as held:
                store.commit(upload, "")
                assert bytes(held) == b"first"
                assert store.about()["used_bytes"] == 2 * 4096
    assert store.about()["used_bytes"] == 4096


def test_a_new_file_is_written_by_one_of_many(one: Fleet):
    def write(i: int) -> str:
        with one.client(0) as client:
            try:
                client.call({"op": "write", "path": "COMMIT", "tag": "", "new": True}, f"{i}".encode())
            except StorageError as error:
                return type(error.__cause__).__name__
            return "written"

    assert sorted(ranks(8, write)) == ["FileExistsError"] * 7 + ["written"]


def test_several_clients_write_and_read_at_once(one: Fleet):
    def work(i: int) -> bytes:
        content = random.Random(i).randbytes(3 * MIB)
        storage = one.storage()
        with storage.create_at(f"file{i}", len(content)) as sink, ThreadPoolExecutor(3) as pool:
            view = memoryview(content)
            list(pool.map(lambda at: sink.write_at(at, view[at : at + 100_000]), range(0, len(content), 100_000)))
        try:
            return storage.read(f"file{i}") == content
        finally:
            storage.close()

    assert all(ranks(6, work))


# Strangers


def test_random_bytes_neither_end_the_agent_nor_make_it_allocate(one: Fleet, client: Agent):
    client.call({"op": "about"})
    before = resident_bytes(one)
    chance = random.Random(7)
    for size in [0, 1, 7, 63, 64, 65, 1000, 100_000] * 8:
        with connect(one) as sock:
            try:
                sock.sendall(chance.randbytes(size))
                sock.shutdown(socket.SHUT_WR)
                while sock.recv(4096):
                    pass
            except OSError:
                continue  # the agent has closed the door already
    assert used_bytes(client) == 0
    assert resident_bytes(one) - before < 4 * MIB


def test_without_the_token_nothing_is_told(one: Fleet):
    stranger = Agent(one.agents[0].address, secrets.token_bytes(32))
    with pytest.raises(StorageError, match="it has another token"):
        stranger.call({"op": "about"})


def test_a_proof_that_was_overheard_is_of_no_use_again(one: Fleet):
    with connect(one) as first:
        hello = first.recv(40, socket.MSG_WAITALL)
        nonce = secrets.token_bytes(32)
        answer = nonce + wire._proof(one.token, b"client", hello[8:], nonce)
        first.sendall(answer)
        assert len(first.recv(32, socket.MSG_WAITALL)) == 32
    with connect(one) as second:
        second.recv(40, socket.MSG_WAITALL)
        second.sendall(answer)
        assert second.recv(1) == b""


def test_a_client_proves_nothing_to_an_agent_that_lacks_the_token():
    token = secrets.token_bytes(32)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def pretend() -> None:
            sock, _ = listener.accept()
            with sock:
                sock.sendall(b"ckagent1" + secrets.token_bytes(32))
                sock.recv(64, socket.MSG_WAITALL)
                sock.sendall(secrets.token_bytes(32))

        thread = threading.Thread(target=pretend)
        thread.start()
        with pytest.raises(StorageError, match="what listens there does not have the token"):
            Agent(f"127.0.0.1:{listener.getsockname()[1]}", token).call({"op": "about"})
        thread.join()


@pytest.mark.parametrize(
    "request_",
    [
        {},
        {"op": "format"},
        {"op": ["put"]},
        {"op": "create", "path": "a"},
        {"op": "create", "path": "a", "nbytes": -1},
        {"op": "create", "path": "a", "nbytes": 2**80},
        {"op": "create", "path": "a", "nbytes": True},
        {"op": "create", "path": "", "nbytes": 1},
        {"op": "create", "path": "/a", "nbytes": 1},
        {"op": "create", "path": 7, "nbytes": 1},
        {"op": "put", "upload": 99, "offset": 0},
        {"op": "put", "upload": 1, "offset": 2**70},
        {"op": "commit", "upload": 99, "tag": ""},
        {"op": "read", "path": "absent", "offset": 0, "nbytes": 1},
        {"op": "write", "path": "a"},
        {"op": "about", "extra": "x" * 1000},
    ],
    ids=json.dumps,
)
def test_a_request_that_makes_no_sense_is_rejected_and_the_next_is_served(client: Agent, request_: dict[str, object]):
    with pytest.raises(StorageError):
        client.call(request_, b"payload")
    assert client.call({"op": "write", "path": "good", "tag": ""}, b"x")[0] == {}
    assert client.call({"op": "list", "folder": ""})[0]["entries"][0][:3] == ["good", False, 1]


@pytest.mark.parametrize(
    "frame",
    [
        wire._FRAME.pack(wire.MAX_REQUEST_BYTES + 1, 0),
        wire._FRAME.pack(2**32 - 1, 2**64 - 1),
        wire._FRAME.pack(3, 0) + b"{{{",
        wire._FRAME.pack(2, 0) + b"[]",
        wire._FRAME.pack(5000, 0) + b"[" * 5000,
        wire._FRAME.pack(5000, 0) + b"9" * 5000,
    ],
    ids=["large header", "largest header", "no JSON", "no object", "deep JSON", "long number"],
)
def test_a_frame_that_is_none_costs_its_sender_the_connection(one: Fleet, client: Agent, frame: bytes):
    with connect(one) as sock:
        wire.introduce(sock, one.token)
        sock.sendall(frame)
        assert sock.recv(1) == b""
    assert used_bytes(client) == 0


def test_a_payload_beyond_the_limit_is_read_past_without_being_kept(one: Fleet, client: Agent):
    before = resident_bytes(one)
    with connect(one) as sock:
        wire.introduce(sock, one.token)
        text = json.dumps({"op": "write", "path": "a", "tag": ""}).encode()
        sock.sendall(wire._FRAME.pack(len(text), 2**60) + text)
        for _ in range(32):
            sock.sendall(bytes(MIB))
        assert used_bytes(client) == 0
        assert resident_bytes(one) - before < 4 * MIB


def test_bytes_that_trickle_in_have_a_deadline():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"slow")
        with pytest.raises(TimeoutError):
            wire.receive_into(ours, memoryview(bytearray(5)), within_s=0.01)


def test_a_message_that_ends_early_is_no_message():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(wire._FRAME.pack(10, 0) + b"{}")
        theirs.close()
        with pytest.raises(ConnectionError, match="ended amid a message"):
            wire.receive(ours, 100)


def test_what_listens_but_is_no_agent_is_told_apart():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"HTTP/1.1 400 Bad Request\r\n".ljust(40))
        with pytest.raises(Refused, match="no agent of this version"):
            wire.introduce(ours, b"x" * 32)


def test_bytes_outside_of_an_upload_are_rejected():
    store = Store(MIB)
    upload = store.create("a", 10)
    for offset, nbytes in ((8, 3), (-1, 2), (11, 0)):
        with pytest.raises(Rejected, match="of a file of 10"), store.put(upload, offset, nbytes):
            pass


# Life


def test_an_agent_is_there_without_torch_in_a_few_mebibytes(one: Fleet):
    assert "torch" not in Path(f"/proc/{one.agents[0].pid}/maps").read_text()
    assert resident_bytes(one) < 40 * MIB


def test_it_ends_by_itself_when_it_has_had_no_client_for_its_lease(tmp_path: Path):
    agent = hosts.start(tmp_path, limit_bytes=MIB, idle_s=0.3)
    log = tmp_path / "agent.log"
    wait_until(lambda: "had no client for 0.3 s" in log.read_text())
    agent.stop()


@pytest.mark.parametrize("holds", [False, True])
def test_without_a_file_it_does_not_wait_for_its_whole_lease(holds: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(agent_module, "_EMPTY_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = agent_module.Server(listener, b"x" * wire.TOKEN_BYTES, MIB, idle_s=1.0)
        if holds:
            server._store.commit(server._store.create("file", 0), "tag")
        began_s = time.monotonic()
        assert server.run() == f"had no client for {1 if holds else 0.2:g} s"
        assert time.monotonic() - began_s >= (1.0 if holds else 0.2)


def test_it_lives_while_a_client_is_connected(tmp_path: Path):
    agent = hosts.start(tmp_path, limit_bytes=MIB, idle_s=0.3)
    token = wire.read_token(agent.token)
    client = Agent(agent.address, token)
    client.call({"op": "about"})  # the connection is kept
    second = hosts.start(tmp_path / "second", limit_bytes=MIB, idle_s=0.6)
    wait_until(lambda: "had no client" in (tmp_path / "second" / "agent.log").read_text())
    assert client.call({"op": "about"})[0]["pid"] == agent.pid
    client.close()
    wait_until(lambda: "had no client" in (tmp_path / "agent.log").read_text())
    second.stop()


def test_it_is_stopped_by_its_handle_and_stopping_again_does_nothing(tmp_path: Path):
    agent = hosts.start(tmp_path, limit_bytes=MIB)
    agent.stop()
    agent.stop()
    with pytest.raises(StorageError, match=f"agent {agent.address}"):
        Agent(agent.address, wire.read_token(agent.token)).call({"op": "about"})


def test_it_runs_as_a_module(tmp_path: Path):
    token = tmp_path / "token"
    token.touch(mode=0o600)
    token.write_bytes(b"x" * 32)
    command = [sys.executable, "-m", "checkpoint.agent", "--token", str(token), "--limit-bytes", "1000000"]
    with subprocess.Popen([*command, "--idle-s", "60"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = f"127.0.0.1:{int(process.stdout.readline())}"
        hosts.HostAgent(address, token, process.pid).stop()
        assert process.wait(20) == 0


@pytest.mark.parametrize(("mode", "content"), [(0o644, b"x" * 32), (0o600, b"short")])
def test_a_token_that_others_may_read_or_that_is_none_is_refused(tmp_path: Path, mode: int, content: bytes):
    path = tmp_path / "token"
    path.write_bytes(content)
    path.chmod(mode)
    with pytest.raises(PermissionError, match="token: "):
        wire.read_token(path)
    with pytest.raises(StorageError, match="cannot start an agent"):
        hosts.start(tmp_path, limit_bytes=MIB)
