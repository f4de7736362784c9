"""Freeing a rank from collectives that will never end, and leaving its process groups behind.

NCCL's communicators can be aborted. Gloo's cannot: `abort` and `shutdown` of its groups return and the rank stays
stuck until the timeout, and even a rank that got an error keeps its peers stuck as long as a traceback holds its
groups. What works is to shut the connections down under it, after which every pending operation fails at once, on both
ends. Only connections: shutting a listening socket ends the process. So whoever makes groups does it while connections
are recorded.
"""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import threading
import traceback
from collections.abc import Iterator


class Connections:
    """The TCP connections that were opened while groups were made, and the store's among them.

    Thread-safe. What other threads open inside a recording is taken for a group's: record around the making of
    groups alone.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[int, int] = {}  # descriptor -> inode: a number that was closed and given anew is a stranger
        self._baselines: list[dict[int, int]] = []

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Note what is opened inside the block; `shut` from another thread sees it at once."""
        baseline = _sockets()
        with self._lock:
            self._baselines.append(baseline)
        try:
            yield
        finally:
            with self._lock:
                self._baselines.remove(baseline)
                self._note(baseline)

    def shut(self) -> int:
        """Shut every noted connection that is still open; return their number. Waits for nobody."""
        with self._lock:
            for baseline in self._baselines:
                self._note(baseline)
            now = _sockets()
            return sum(_shut(fd) for fd, inode in self._known.items() if now.get(fd) == inode)

    def forget(self) -> None:
        """Start anew: the groups are gone."""
        with self._lock:
            self._known.clear()

    def _note(self, baseline: dict[int, int]) -> None:
        self._known.update((fd, inode) for fd, inode in _sockets().items() if baseline.get(fd) != inode)


def abort_devices() -> None:
    """Abort the communicators of every group whose backend can be: NCCL's. From any thread."""
    import torch.distributed as dist
    from torch.distributed import distributed_c10d as c10d

    if not dist.is_initialized():
        return
    for group, (backend, _) in list(c10d._world.pg_map.items()):
        if "nccl" in backend:
            group.abort()


def quiesce(error: BaseException | None) -> None:
    """Leave every process group, after `error` or in peace: nothing of them stays open in this process.

    Drops what the tracebacks of `error` and of those it came from hold on to: the frames of a failed collective keep
    its group, and with that the connections for which others wait.
    """
    seen: set[int] = set()
    link = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        if link.__traceback__ is not None:
            traceback.clear_frames(link.__traceback__)
            link.__traceback__ = None
        link = link.__cause__ or link.__context__
    gc.collect()
    import torch.distributed as dist

    if dist.is_initialized():
        abort_devices()
        dist.destroy_process_group()
    else:
        # Torch names groups by a count that it starts anew where it destroys the world, not where that never came to
        # be: this rank would wait for the next one under a name that no fresh rank has.
        from torch.distributed import distributed_c10d as c10d

        c10d._world.group_count = 0
    gc.collect()


def _sockets() -> dict[int, int]:
    """Return this process's open sockets: descriptor -> inode."""
    found: dict[int, int] = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:  # closed meanwhile
            continue
        if target.startswith("socket:["):
            found[int(name)] = int(target[8:-1])
    return found


def _shut(fd: int) -> bool:
    """Shut the connection behind a descriptor down, if it is one; whether it was."""
    try:
        # A duplicate: closing our object must not close the owner's descriptor.
        with socket.socket(fileno=os.dup(fd)) as duplicate:
            is_listening = duplicate.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            if duplicate.type != socket.SOCK_STREAM or is_listening:
                return False
            if duplicate.family not in (socket.AF_INET, socket.AF_INET6):
                return False
            duplicate.shutdown(socket.SHUT_RDWR)
            return True
    except OSError:  # not connected (any more), or closed meanwhile
        return False
