"""What an entry function receives: its place, its heartbeat, the wish to stop, the process group."""

from __future__ import annotations

import contextlib
import socket
import tempfile
import threading
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from faulttol import Heartbeat
from launch import signals
from launch.rankenv import RankEnv

_HEARTBEAT_INTERVAL_S = 0.5


class RankContext:
    """One rank's link to its launcher. The launcher makes it; under torchrun or plain Python, `open` does."""

    def __init__(self, env: RankEnv, heartbeat: Heartbeat, stop: threading.Event) -> None:
        self.env = env
        self.heartbeat = heartbeat
        self._stop = stop
        self._joined = False
        self._num_joined = 0

    @classmethod
    @contextlib.contextmanager
    def open(cls, environ: Mapping[str, str]) -> Iterator[Self]:
        """The context of this process, when no launcher of ours started it: under torchrun or plain Python.

        SIGTERM and SIGINT become `stop_requested` while it is open, if this is the main thread.
        """
        env = RankEnv.from_environ(environ)
        with tempfile.TemporaryDirectory(prefix="launch-") as folder:
            path = Path(folder) / f"rank{env.rank}.heartbeat"
            stop = threading.Event()
            with (
                Heartbeat(path, _HEARTBEAT_INTERVAL_S) as heartbeat,
                signals.caught(lambda number: stop.set()),
                cls(env, heartbeat, stop) as context,
            ):
                yield context

    def stop_requested(self) -> bool:
        """Whether this rank was asked to save and leave: by its launcher, by SIGTERM or by SIGINT.

        Ranks hear of it at different steps: agree on it (an all-reduce of the flag) before acting on it.
        """
        return self._stop.is_set()

    def init_process_group(self, backend: str, timeout_s: float) -> None:
        """Join `torch.distributed` with all ranks of the job, every rank calling; a single rank joins alone.

        `timeout_s` bounds the joining and every later collective. `close` leaves the group.
        """
        import torch.distributed as dist
        from torch.distributed import PrefixStore  # type: ignore[attr-defined]  # public, not in its __all__

        self.heartbeat.beat(step=self.heartbeat.step, phase="rendezvous")
        store = _connect_store(self.env, timeout_s)
        dist.init_process_group(
            backend,
            # New keys for every joining: of a group that was left, the store still has the addresses.
            store=PrefixStore(f"attempt{self.env.attempt}/{self._num_joined}", store),
            rank=self.env.rank,
            world_size=self.env.world_size,
            timeout=timedelta(seconds=timeout_s),
        )
        self._joined = True
        self._num_joined += 1

    def close(self) -> None:
        """Leave the process group that `init_process_group` joined. Idempotent."""
        if not self._joined:
            return
        import torch.distributed as dist

        if dist.is_initialized():  # the entry may have left by itself
            dist.destroy_process_group()
        self._joined = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After an error the group may hold collectives that never end: leaving it could wait for them.
        if error is None:
            self.close()


def listen(host: str) -> socket.socket:
    """A listening socket on a free port of `host`; clients may connect before a store serves it."""
    return socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)


def serve_store(listener: socket.socket, world_size: int) -> object:
    """A rendezvous store behind `listener`, which it takes over; it serves as long as the object lives."""
    host, port = listener.getsockname()[:2]
    return _store(host, port, world_size, is_master=True, master_listen_fd=listener.detach())


def _connect_store(env: RankEnv, timeout_s: float) -> Any:
    if not env.store_host:
        return serve_store(listen("127.0.0.1"), env.world_size)
    return _store(
        env.store_host,
        env.store_port,
        env.world_size,
        is_master=env.rank == 0 and not env.store_is_served,
        timeout=timedelta(seconds=timeout_s),
    )


def _store(host: str, port: int, world_size: int, **options: Any) -> Any:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, though not in its __all__

    return TCPStore(host, port, world_size, wait_for_workers=False, **options)
