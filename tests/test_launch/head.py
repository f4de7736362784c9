"""A real Ray cluster for tests: `ray start --block` processes with ports, folder and token of their own."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from tests.test_launch.client import runs, wait_for

_RAY = Path(sys.executable).with_name("ray")
_START_S = 120.0
_STOP_S = 20.0


class Cluster:
    """A head, and nodes that join it, all on this machine; use as a context manager."""

    def __init__(self, *, num_cpus: int) -> None:
        # Ray keeps Unix sockets in its folder, whose path may not be long.
        self._folder = Path(tempfile.mkdtemp(prefix="ray-"))
        self._nodes: list[subprocess.Popen[bytes]] = []
        self.token_path = self._folder / "token"
        self.token_path.write_text(secrets.token_hex(32))
        self.environ = {
            "HOME": str(self._folder),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token_path),
        }
        gcs_port, http_port, client_port = (_free_port() for _ in range(3))
        self.url = f"http://127.0.0.1:{http_port}"
        self._start(
            "--head",
            f"--port={gcs_port}",
            f"--dashboard-port={http_port}",
            "--dashboard-host=127.0.0.1",
            f"--ray-client-server-port={client_port}",
            f"--temp-dir={self._folder / 'ray'}",
            "--disable-usage-stats",
            num_cpus=num_cpus,
        )
        wait_for(lambda: _listens(http_port), "the head's HTTP address", _START_S)
        (self.address,) = {
            argument.partition("=")[2]
            for process in psutil.Process(self._nodes[0].pid).children(recursive=True)
            for argument in _command(process)
            if argument.startswith("--gcs-address=")
        }

    def add_node(self, *, num_cpus: int) -> None:
        """Join a second node; it is up when the cluster says so."""
        self._start(f"--address={self.address}", num_cpus=num_cpus)

    def kill_added_node(self) -> set[int]:
        """End the node that was added first with all that is there, as a power cut would; return who was there."""
        node = psutil.Process(self._nodes[1].pid)
        there = [node, *node.children(recursive=True)]
        _kill(there)
        return {process.pid for process in there}

    def pids(self, name: str) -> list[int]:
        """The processes of the cluster that call themselves so."""
        nodes = [psutil.Process(node.pid) for node in self._nodes if node.poll() is None]
        found = [child for node in nodes for child in node.children(recursive=True)]
        return [process.pid for process in found if name in " ".join(_command(process))]

    def _start(self, *arguments: str, num_cpus: int) -> None:
        with open(self._folder / f"node{len(self._nodes)}.log", "wb") as log:
            self._nodes.append(
                subprocess.Popen(
                    [
                        str(_RAY),
                        "start",
                        "--block",
                        *arguments,
                        f"--num-cpus={num_cpus}",
                        "--num-gpus=0",
                        f"--dashboard-agent-listen-port={_free_port()}",
                        "--object-store-memory=100000000",
                    ],
                    env={**os.environ, **self.environ},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        processes = [psutil.Process(node.pid) for node in self._nodes if node.poll() is None]
        processes += [child for process in processes for child in process.children(recursive=True)]
        _kill(processes)
        for node in self._nodes:
            node.wait(_STOP_S)
        wait_for(lambda: not any(runs(process.pid) for process in processes), "the cluster to end", _STOP_S)
        shutil.rmtree(self._folder)


def _kill(processes: Iterable[psutil.Process]) -> None:
    for process in processes:  # a gentle stop takes Ray half a minute
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True
