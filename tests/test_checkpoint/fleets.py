"""Agents for the tests: several "hosts" of this machine, each with a folder and an agent of its own."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

from checkpoint import hosts
from checkpoint.client import Agent
from checkpoint.hosts import HostAgent
from checkpoint.memory import MemoryStorage
from tests.test_checkpoint.worlds import wait_until

IDLE_S = 120.0
"""An agent that a killed test leaves behind ends by itself."""


class Fleet:
    """Agents that share a token."""

    def __init__(self, folder: Path, size: int, limit_bytes: int = 256 << 20) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes
        self.token = secrets.token_bytes(32)
        self.agents: list[HostAgent] = []
        for _ in range(size):
            self.add()

    def add(self) -> HostAgent:
        """Start one more."""
        place = self.folder / f"host{len(self.agents)}"
        agent = hosts.start(place, limit_bytes=self.limit_bytes, idle_s=IDLE_S, token=self.token)
        self.agents.append(agent)
        return agent

    def kill(self, index: int) -> None:
        """End one as a lost host does; return when nothing listens there any more."""
        os.kill(self.agents[index].pid, signal.SIGKILL)
        wait_until(lambda: not self._listens(index))

    def _listens(self, index: int) -> bool:
        host, _, port = self.agents[index].address.rpartition(":")
        with socket.socket() as sock:
            return sock.connect_ex((host, int(port))) == 0

    def storage(self, home: int = 0, *, peers: int = 0, name: str = "run") -> MemoryStorage:
        """Return the storage as the ranks of a host see it."""
        addresses = [agent.address for agent in self.agents]
        return MemoryStorage(addresses[home:] + addresses[:home], self.agents[home].token, name, peers=peers)

    @contextlib.contextmanager
    def client(self, index: int) -> Iterator[Agent]:
        """Talk to one agent alone."""
        with contextlib.closing(Agent(self.agents[index].address, self.token)) as agent:
            yield agent

    def holders(self, path: str, name: str = "run") -> list[int]:
        """Return which agents have a file."""
        found = []
        for index in range(len(self.agents)):
            with self.client(index) as agent:
                if agent.call({"op": "stat", "path": f"{name}/{path}"})[0]["nbytes"] is not None:
                    found.append(index)
        return found

    def damage(self, index: int, path: str, at: int, name: str = "run") -> None:
        """Flip a bit in one agent's copy of a file."""
        with self.client(index) as agent:
            about, _ = agent.call({"op": "stat", "path": f"{name}/{path}"})
            data = bytearray(about["nbytes"])
            agent.call(
                {"op": "read", "path": f"{name}/{path}", "offset": 0, "nbytes": len(data)}, b"", memoryview(data)
            )
            data[at] ^= 1
            agent.call({"op": "write", "path": f"{name}/{path}", "tag": about["tag"]}, data)


@contextlib.contextmanager
def fleet(folder: Path, size: int, limit_bytes: int = 256 << 20) -> Iterator[Fleet]:
    """Run agents for the length of a block."""
    made = Fleet(folder, 0, limit_bytes)
    try:
        for _ in range(size):
            made.add()
        yield made
    finally:
        for agent in made.agents:
            agent.stop()
