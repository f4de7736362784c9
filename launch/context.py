"""What an entry function receives: its place, its heartbeat, the wish to stop, the process group."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from faulttol import Heartbeat
from faulttol.recovery import Assignment, Member
from launch import signals
from launch.rankenv import RankEnv

_HEARTBEAT_INTERVAL_S = 0.5

T = TypeVar("T")


class RankContext:
    """One rank's link to its launcher. The launcher makes it; under torchrun or plain Python, `open` does."""

    def __init__(self, env: RankEnv, heartbeat: Heartbeat, stop: threading.Event, member: Member | None = None) -> None:
        self.env = env
        """Under recovery: of the current generation."""
        self.heartbeat = heartbeat
        self.generation = 0
        """How often the job was formed anew, without its processes being started again."""
        self._member = member
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

    def run(self, work: Callable[[], T]) -> T | None:
        """Return what `work` returns. In a job with recovery it is called again in every generation.

        There it must restore by itself what it had done, and make its process groups inside `making_groups`. This
        process may then be a spare that waits for its first generation, and returns None if none came.
        """
        if self._member is None:
            return work()
        self.heartbeat.beat(step=self.heartbeat.step, phase="standby")
        return self._member.run(lambda assignment: self._take_part(assignment, work))

    def making_groups(self) -> contextlib.AbstractContextManager[None]:
        """A block in which process groups are made, so that recovery can break their connections."""
        return contextlib.nullcontext() if self._member is None else self._member.connections.recording()

    def releasing(self, release: Callable[[], None]) -> contextlib.AbstractContextManager[None]:
        """A block in which recovery calls `release` to end waits that are no collective; perhaps often."""
        return contextlib.nullcontext() if self._member is None else self._member.releasing(release)

    def _take_part(self, assignment: Assignment, work: Callable[[], T]) -> T:
        self.env = RankEnv(**assignment.place)
        self.generation = assignment.generation
        self._joined, self._num_joined = False, 0
        os.environ.update(self.env.to_environ())
        result = work()
        self.close()
        return result

    def init_process_group(self, backend: str, timeout_s: float) -> None:
        """Join `torch.distributed` with all ranks of the job, every rank calling; a single rank joins alone.

        `timeout_s` bounds the joining and every later collective. `close` leaves the group.
        """
        import torch.distributed as dist
        from torch.distributed import PrefixStore  # type: ignore[attr-defined]  # public, not in its __all__

        self.heartbeat.beat(step=self.heartbeat.step, phase="rendezvous")
        with self.making_groups():
            store = _connect_store(self.env, timeout_s)
            dist.init_process_group(
                backend,
                # New keys for every joining: of a group that was left, the store still has the addresses.
                store=PrefixStore(f"attempt{self.env.attempt}.{self.generation}/{self._num_joined}", store),
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
