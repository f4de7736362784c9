"""Agents on hosts: started once, found again by whoever comes after, and met by all ranks.

A host's agent has a folder there, on a disk of the host or in its memory, that only the owner may open:

    token         the secret that the agents and clients of one run share
    agent.json    the address of this host's agent
    ring.json     the addresses of all agents when ranks last met: whoever starts anew here looks for these too
    agent.log     why the agent ended, if it did
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import checkpoint
from checkpoint import wire
from checkpoint.client import Agent
from checkpoint.errors import StorageError
from checkpoint.memory import MemoryStorage
from checkpoint.storage import named

_START = """
import json, sys, types
package = types.ModuleType("checkpoint")
package.__path__ = json.loads(sys.argv[1])
sys.modules["checkpoint"] = package
from checkpoint.agent import main
sys.exit(main(sys.argv[2:]))
"""
"""Runs an agent without the `__init__` of the package, which imports torch."""
_START_S = 30.0
"""Time a new agent has to listen."""
_TOKEN, _RECORD, _RING, _LOCK, _LOG = "token", "agent.json", "ring.json", "lock", "agent.log"

_T = TypeVar("_T")
Gather = Callable[[Any], Sequence[Any]]
"""Gives a JSON value of this rank to all, and returns those of all ranks, by rank."""


@dataclass(frozen=True, slots=True)
class HostAgent:
    """The agent of this host."""

    address: str
    """`host:port`, where all hosts reach it."""
    token: Path
    """The file that has its secret."""
    pid: int

    def stop(self) -> None:
        """End it; what it holds is lost. Nothing happens if it has ended."""
        with closing(Agent(self.address, wire.read_token(self.token))) as client:
            try:
                with client.link() as link:
                    client.begin(link, {"op": "stop"})(None)
                    link.await_end()
            except StorageError as error:
                if not isinstance(error.__cause__, ConnectionError):
                    raise


def start(
    folder: str | os.PathLike[str],
    *,
    limit_bytes: int,
    host: str = "127.0.0.1",
    idle_s: float = 3600.0,
    token: bytes | None = None,
) -> HostAgent:
    """Return the agent that the folder records, or start one; every rank of a host may call it at once.

    Args:
        folder: this host's, for one run. Whatever it records belongs to the agent that is there.
        limit_bytes: memory for files; of a new agent.
        host: the address to listen at, by which other hosts reach this one; of a new agent.
        idle_s: the agent ends when it has had no client for so long, at most a minute if it holds nothing; of a new
            agent.
        token: the secret; without it the folder's, or a new one.

    Raises:
        StorageError: it cannot be started.
    """
    place = Path(folder).absolute()
    with named(place, "start an agent", (OSError, subprocess.SubprocessError)):
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        wire.check_private(place, place.stat(follow_symlinks=False))
        with _locked(place / _LOCK):
            secret = _keep_token(place / _TOKEN, token)
            found = _find(place, secret)
            if found is None:
                _spawn(place, limit_bytes=limit_bytes, host=host, idle_s=idle_s)
                found = _find(place, secret)
    if found is None:
        raise StorageError(f"{place}: cannot start an agent: it does not answer at {host}; {place / _LOG} may say why")
    return found


def join(
    folder: str | os.PathLike[str],
    name: str,
    gather: Gather,
    *,
    peers: int,
    limit_bytes: int,
    host: str = "127.0.0.1",
    idle_s: float = 3600.0,
) -> MemoryStorage:
    """Start or find this host's agent, meet the other ranks', and return the storage over all of them.

    Every rank calls it, with the same `name` and `peers`; `gather` is the only communication. Agents that earlier
    launches of this run left behind are found if one host's folder still knows them, and come last in the ring.

    Raises:
        StorageError: the agent of some host cannot be started; on every rank.
    """
    place = Path(folder).absolute()
    old, unread = _tried(lambda: _hex(place / _TOKEN))
    offers = gather([old, secrets.token_hex(wire.TOKEN_BYTES), unread])
    _raise_any([problem for *_, problem in offers])
    known = [old for old, *_ in offers if old]
    token = bytes.fromhex(known[0] if known else offers[0][1])

    def begin() -> tuple[HostAgent, list[str]]:
        return start(place, limit_bytes=limit_bytes, host=host, idle_s=idle_s, token=token), _ring(place / _RING)

    begun, problem = _tried(begin)
    told = gather([begun[0].address if begun else None, begun[1] if begun else [], problem])
    _raise_any([problem for *_, problem in told])
    assert begun is not None
    own, met = begun[0], [(address, addresses) for address, addresses, _ in told]
    ring = list(dict.fromkeys(address for address, _ in met))
    older = dict.fromkeys(address for _, addresses in met for address in addresses if address not in ring)
    ring += [address for address in older if _about(address, token)]
    with named(place, "record the agents"), _locked(place / _LOCK):
        _replace(place / _RING, json.dumps(ring).encode())
    here = ring.index(own.address)
    return MemoryStorage(ring[here:] + ring[:here], own.token, name, peers=peers)


def _tried(act: Callable[[], _T]) -> tuple[_T | None, str]:
    """Return what `act` does and no text, or nothing and why not: the other ranks are to know before one raises."""
    try:
        return act(), ""
    except (StorageError, OSError, ValueError) as error:
        return None, str(error) or type(error).__name__


def _raise_any(problems: Sequence[str]) -> None:
    """Raise if a rank has a problem."""
    text = "; ".join(f"rank {rank}: {problem}" for rank, problem in enumerate(problems) if problem)
    if text:
        raise StorageError(f"the agents of the hosts cannot be joined: {text}")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock that ends with this process."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _keep_token(path: Path, token: bytes | None) -> bytes:
    """Return the secret, which the file has from then on."""
    if path.exists() and (token is None or wire.read_token(path) == token):
        return wire.read_token(path)
    token = token or secrets.token_bytes(wire.TOKEN_BYTES)
    _replace(path, token)
    return token


def _find(place: Path, token: bytes) -> HostAgent | None:
    """Return the agent that the folder records, if it answers."""
    try:
        address = json.loads((place / _RECORD).read_bytes())["address"]
    except FileNotFoundError:
        return None
    about = _about(address, token)
    return HostAgent(address, place / _TOKEN, about["pid"]) if about else None


def _spawn(place: Path, *, limit_bytes: int, host: str, idle_s: float) -> None:
    """Start an agent, detached from this process, and record its address."""
    command = [
        sys.executable,
        "-c",
        _START,
        json.dumps(list(checkpoint.__path__)),
        "--detach",
        "--token",
        str(place / _TOKEN),
        "--host",
        host,
    ]
    command += ["--limit-bytes", str(limit_bytes), "--idle-s", str(idle_s)]
    with (place / _LOG).open("wb") as log:
        ended = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, timeout=_START_S)
    if ended.returncode:
        lines = (place / _LOG).read_text(errors="replace").split("\n")
        raise StorageError(f"{place}: cannot start an agent: {' '.join(lines[-2:]).strip()}")
    name = f"[{host}]" if ":" in host else host
    _replace(place / _RECORD, json.dumps({"address": f"{name}:{int(ended.stdout)}"}).encode())


def _ring(path: Path) -> list[str]:
    return [str(address) for address in json.loads(path.read_bytes())] if path.exists() else []


def _hex(path: Path) -> str | None:
    return wire.read_token(path).hex() if path.exists() else None


def _about(address: str, token: bytes) -> dict[str, Any] | None:
    """Return what an agent says of itself; None if there is none any more."""
    with closing(Agent(address, token)) as client:
        try:
            return client.call({"op": "about"})[0]
        except StorageError:
            return None


def _replace(path: Path, data: bytes) -> None:
    """Write a file that only its owner may read, whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
    temporary.rename(path)
