"""Files in the RAM of agents: a copy on this host, others on its peers.

What one rank writes as a large file lies on its own host's agent and on `peers` more, the next ones in the ring
of hosts; small files (votes, records, marks, objects) lie on all agents that can be reached. A reader asks all,
the nearest first. So a lost host takes no checkpoint with it, and whoever commits, reads, verifies or removes
does as it does on a disk.

    agent 0    r0  r2  COMMIT…         three hosts, a rank each, peers = 1
    agent 1    r1  r0  COMMIT…
    agent 2    r2  r1  COMMIT…
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import xxhash

from checkpoint.client import Agent, Request
from checkpoint.errors import StorageError
from checkpoint.storage import BlockSink, Entry, Sink, Source, check_written, named
from checkpoint.wire import read_token

SCHEME = "agents://"
_PUT_BYTES = 8 << 20
"""Largest piece in which a file of unknown size is handed over."""
_POLL_S = 0.02
"""Pause between two looks, for each agent."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class _Target:
    """An agent to which a file is being written."""

    agent: Agent
    upload: int


_Require = Callable[[Sequence[Agent], Sequence[StorageError]], None]


class _Blocks:
    """A large file on its way to several agents, in any order, by any number of threads."""

    in_order = False

    def __init__(self, targets: Sequence[_Target], lost: Sequence[StorageError], require: _Require) -> None:
        """`require` raises unless the agents left make the file as safe as was asked; `lost` are its reasons."""
        self._targets = list(targets)
        self._lost = list(lost)
        self._require = require
        self._lock = threading.Lock()
        self.written = 0

    @property
    def targets(self) -> list[_Target]:
        """The agents that have got all so far."""
        with self._lock:
            return list(self._targets)

    def write_at(self, offset: int, data: memoryview) -> None:
        with contextlib.ExitStack() as links:
            waiting = []
            for target in self.targets:
                request = {"op": "put", "upload": target.upload, "offset": offset}
                with self._losing(target):
                    link = links.enter_context(target.agent.link())
                    waiting.append((target, target.agent.begin(link, request, data)))
            for target, answer in waiting:
                with self._losing(target):
                    answer(None)
        with self._lock:
            self.written += data.nbytes

    def commit(self) -> None:
        """Let the file appear; raises StorageError unless it does on enough agents."""
        self._require([t.agent for t in self.targets], self._lost)
        for target in self.targets:
            with self._losing(target):
                target.agent.call({"op": "commit", "upload": target.upload, "tag": ""})

    @contextlib.contextmanager
    def _losing(self, target: _Target) -> Iterator[None]:
        """Go on without an agent that fails, if enough are left."""
        try:
            yield
        except StorageError as error:
            with self._lock:
                self._lost.append(error)
                self._targets = [t for t in self._targets if t is not target]
            self._require([t.agent for t in self.targets], self._lost)


class _Whole:
    """A file whose size is known when all of it is there."""

    def __init__(self) -> None:
        self.data = bytearray()

    def write(self, data: Any) -> None:
        self.data += memoryview(data).cast("B")


class _Copies:
    """A file on the agents that have it, nearest first."""

    def __init__(self, path: str, full: str, holders: Sequence[Agent]) -> None:
        self._path = path
        self._full = full
        self._holders = holders

    def read_into(self, offset: int, buffer: memoryview) -> int:
        request = {"op": "read", "path": self._full, "offset": offset, "nbytes": buffer.nbytes}
        reasons = []
        for agent in self._holders:
            try:
                return agent.call(request, buffer=buffer)[1]
            except StorageError as error:
                reasons.append(str(error))
        raise StorageError(f"{self._path}: cannot read: {'; '.join(reasons)}")

    def copies(self) -> Sequence[Source]:
        rest = self._holders[1:]  # each copy falls back to those behind it
        return [_Copies(self._path, self._full, rest[first:]) for first in range(len(rest))]


class MemoryStorage:
    """The storage over a set of agents, as one host sees it."""

    rereads_cheaply = False

    def __init__(self, addresses: Sequence[str], token: bytes | Path, name: str, *, peers: int = 0) -> None:
        """Use the agents at `host:port` addresses: this host's first, then the others in the order of the ring.

        `token` is theirs, or the file that has it; `name` keeps apart what several runs leave in one agent. A file
        counts as written when `peers` agents of other hosts have it, and this host's too if that can be reached.
        """
        if not 0 <= peers < len(addresses):
            raise ValueError(f"peers: {peers} copies on other hosts, and there are {len(addresses) - 1} others")
        self._token = token
        self._secret = read_token(token) if isinstance(token, Path) else token
        self._agents = tuple(Agent(address, self._secret) for address in addresses)
        self._name = name.strip("/")
        self._peers = peers

    @classmethod
    def of_url(cls, url: str, options: Mapping[str, Any]) -> MemoryStorage:
        """Return the storage whose `url` this is; `options["token"]` where the url names no file that has it."""
        authority, _, name = url.removeprefix(SCHEME).partition("/")
        who, _, addresses = authority.rpartition("@")
        file, _, peers = who.rpartition(":")
        token = Path(unquote(file)) if file else options.get("token")
        if not name or not peers.isdecimal() or not isinstance(token, bytes | Path):
            raise StorageError(f"{url}: cannot open: {SCHEME}TOKEN_FILE:PEERS@HOST:PORT,…/NAME is the form")
        with named(url, "open", (OSError, ValueError)):
            return cls(addresses.split(","), token, name, peers=int(peers))

    @property
    def url(self) -> str:
        file = quote(os.fspath(self._token), safe="") if isinstance(self._token, Path) else ""
        return f"{SCHEME}{file}:{self._peers}@{','.join(a.address for a in self._agents)}/{self._name}"

    @property
    def longest_poll_s(self) -> float:
        return min(1.0, _POLL_S * len(self._agents))  # of as many hosts' ranks, each asks every agent

    @property
    def reopening(self) -> Mapping[str, Any] | None:
        return {"root": self.url} if isinstance(self._token, Path) else None

    def entries(self, folder: str) -> list[Entry]:
        answers = self._ask_all({"op": "list", "folder": self._full(folder)}, folder, "list")
        found: dict[str, Entry] = {}
        for answer in answers.values():
            for name, is_folder, nbytes, modified_s in answer["entries"]:
                found.setdefault(name, Entry(name, is_folder, nbytes, modified_s))
        return [found[name] for name in sorted(found)]

    def size(self, path: str) -> int | None:
        answers = self._ask_all({"op": "stat", "path": self._full(path)}, path, "look at")
        return next((a["nbytes"] for a in answers.values() if a["nbytes"] is not None), None)

    def read(self, path: str) -> bytes:
        damaged = None
        for agent, answer in self._holders(path, "read"):
            buffer = bytearray(answer["nbytes"])
            request = {"op": "read", "path": self._full(path), "offset": 0, "nbytes": len(buffer)}
            with contextlib.suppress(StorageError):  # the next one has it too, or the end of the loop tells
                agent.call(request, buffer=memoryview(buffer))
                if not answer["tag"] or answer["tag"] == _tag(buffer):
                    return bytes(buffer)
                _log.warning("%s: the copy of agent %s is damaged", path, agent.address)
                damaged = damaged or bytes(buffer)
        if damaged is None:
            raise StorageError(f"{path}: cannot read: every agent that had it has gone")
        return damaged  # whoever reads it finds so by its fingerprint

    @contextlib.contextmanager
    def open(self, path: str) -> Iterator[Source]:
        yield _Copies(path, self._full(path), [agent for agent, _ in self._holders(path, "open")])

    def write(self, path: str, data: bytes) -> None:
        request = {"op": "write", "path": self._full(path), "tag": _tag(data)}
        answers, lost = self._ask(request, data)
        self._require(path, list(answers), lost)

    def show(self, path: str, data: bytes) -> None:
        self.write(path, data)

    def write_new(self, path: str, data: bytes) -> None:
        request = {"op": "write", "path": self._full(path), "tag": _tag(data), "new": True}
        done: list[Agent] = []
        lost: list[StorageError] = []
        # One after the other, in an order that is the same on every host: of several writers the first agent takes one.
        for agent in sorted(self._agents, key=lambda a: a.address):
            try:
                agent.call(request, data)
            except StorageError as error:
                if isinstance(error.__cause__, FileExistsError):
                    with named(path, "write"):
                        raise error.__cause__ from error
                lost.append(error)
            else:
                done.append(agent)
        self._require(path, done, lost)

    @contextlib.contextmanager
    def create(self, path: str) -> Iterator[Sink]:
        whole = _Whole()
        yield whole
        view = memoryview(whole.data)
        with self.create_at(path, view.nbytes) as sink:
            for start in range(0, view.nbytes, _PUT_BYTES):
                sink.write_at(start, view[start : start + _PUT_BYTES])

    @contextlib.contextmanager
    def create_at(self, path: str, nbytes: int) -> Iterator[BlockSink]:
        def require(left: Sequence[Agent], lost: Sequence[StorageError]) -> None:
            self._require(path, left, lost)

        with contextlib.ExitStack() as uploads:
            targets, lost = self._reserve(uploads, path, nbytes)
            sink = _Blocks(targets, lost, require)
            yield sink
            check_written(path, sink.written, nbytes)
            sink.commit()

    def remove(self, path: str) -> None:
        self._ask_all({"op": "remove", "path": self._full(path)}, path, "remove")

    def close(self) -> None:
        """Close the idle connections. Idempotent."""
        for agent in self._agents:
            agent.close()

    def _reserve(
        self, uploads: contextlib.ExitStack, path: str, nbytes: int
    ) -> tuple[list[_Target], list[StorageError]]:
        """Set memory aside on this host's agent and on as many others as are asked for, the next in the ring."""
        targets: list[_Target] = []
        lost: list[StorageError] = []
        home = self._agents[0]
        for agent in self._agents:
            if sum(t.agent is not home for t in targets) == self._peers and agent is not home:
                break
            try:
                targets.append(uploads.enter_context(_upload(agent, self._full(path), nbytes)))
            except StorageError as error:
                lost.append(error)
        self._require(path, [t.agent for t in targets], lost)
        return targets, lost

    def _require(self, path: str, done: Sequence[Agent], lost: Sequence[StorageError]) -> None:
        """Raise unless these agents make a file as safe as was asked."""
        away = sum(agent is not self._agents[0] for agent in done)
        if away < self._peers or not done or (away == len(done) and not self._peers):
            asked = f"{self._peers} on other hosts" if self._peers else "one on this host"
            raise StorageError(f"{path}: cannot write: too few copies ({asked} asked for): {_list(lost)}")

    def _ask(self, request: Request, payload: Any = b"") -> tuple[dict[Agent, dict[str, Any]], list[StorageError]]:
        """Ask all agents at once; return the answers, nearest first, and the errors of those that gave none."""
        answers: dict[Agent, dict[str, Any]] = {}
        lost: list[StorageError] = []
        with contextlib.ExitStack() as links:
            waiting = []
            for agent in self._agents:
                try:
                    link = links.enter_context(agent.link())
                    waiting.append((agent, agent.begin(link, request, payload)))
                except StorageError as error:
                    lost.append(error)
            for agent, answer in waiting:
                try:
                    answers[agent] = answer(None)[0]
                except StorageError as error:
                    lost.append(error)
        return answers, lost

    def _ask_all(self, request: Request, path: str, verb: str) -> dict[Agent, dict[str, Any]]:
        """As `_ask`, of whom one answer is enough."""
        answers, lost = self._ask(request)
        if not answers:
            raise StorageError(f"{path or self._name}: cannot {verb}: {_list(lost)}")
        return answers

    def _holders(self, path: str, verb: str) -> list[tuple[Agent, dict[str, Any]]]:
        """Return the agents that have a file, nearest first, and what they say of it."""
        answers, lost = self._ask({"op": "stat", "path": self._full(path)})
        found = [(agent, answer) for agent, answer in answers.items() if answer["nbytes"] is not None]
        if not found:
            raise StorageError(f"{path}: cannot {verb}: no agent has it{'; ' * bool(lost)}{_list(lost)}")
        return found

    def _full(self, path: str) -> str:
        return f"{self._name}/{path}" if path else self._name


@contextlib.contextmanager
def _upload(agent: Agent, full: str, nbytes: int) -> Iterator[_Target]:
    """Set memory aside for a file; given back at the end of the block, unless the file was committed.

    The connection stays lent: when this process dies, the agent gives the memory back.
    """
    with agent.link() as link:
        header, _ = agent.begin(link, {"op": "create", "path": full, "nbytes": nbytes})(None)
        try:
            yield _Target(agent, header["upload"])
        finally:
            with contextlib.suppress(StorageError):  # the agent has gone, and the memory with it
                agent.begin(link, {"op": "drop", "upload": header["upload"]})(None)


def _list(errors: Sequence[StorageError]) -> str:
    return "; ".join(dict.fromkeys(map(str, errors)))


def _tag(data: Any) -> str:
    return xxhash.xxh3_64_hexdigest(data)
