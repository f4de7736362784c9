"""Where nodes leave messages for each other: a folder or bucket, an actor of a Ray cluster, or this process.

A store keeps named bytes for a while. It promises little, so that many things can be one: it may lose messages, list
them late, or be out of reach; whoever reads from it believes nothing (`trainsys.rl.validation`) and waits for nobody
(`trainsys.rl.sharing`).
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import fsspec
from fsspec.implementations.local import LocalFileSystem

from trainsys.rl import schema
from trainsys.rl.errors import SharingError

log = logging.getLogger(__name__)
Clock = Callable[[], float]
"""Unix time in seconds."""
_SUFFIX = ".arrows"


class Store(Protocol):
    """Messages by name; any thread may call any method, which may take long and raise whatever its medium does."""

    def publish(self, name: str, message: bytes) -> None:
        """Make a message readable under its name: all of its bytes or none."""

    def names(self) -> list[str]:
        """Return the names of the messages kept now, in any order; those of other nodes may be anything."""

    def fetch(self, name: str, limit: int) -> bytes | None:
        """Return the bytes of a message, of a longer one the first `limit` + 1; None where it is gone."""

    def close(self) -> None:
        """Let go of the medium; idempotent."""


def open_store(url: str, *, keep_s: float) -> Store:
    """Return the store at `url`: `ray-actor://HOST:PORT/NAME`, or a folder or bucket as fsspec knows it.

    Raises:
        SharingError: there is no such actor, or fsspec cannot open the URL.
    """
    if url.startswith("ray-actor://"):
        from trainsys.rl.ray_mailbox import RayStore

        return RayStore(url)
    return FolderStore(url, keep_s=keep_s)


class FolderStore:
    """A folder on any file system of fsspec: `URL/<minute>/<name>.arrows`.

    Messages lie in a folder of the minute they were published in, by the store's clock, so that a listing reads only
    the minutes that count, and nodes whose own clocks are hours apart hear each other. A node removes its own messages
    when they are too old; what a node that died leaves behind is not listed, and may be removed by hand or by a
    lifecycle rule of the bucket.
    """

    _BUCKET_S = 60
    _CLOCK_TOLERANCE_S = 5.0

    def __init__(
        self, url: str, *, keep_s: float, clock: Clock = time.time, options: dict[str, Any] | None = None
    ) -> None:
        """Open the folder, which need not be there; `options` go to fsspec. Raises: SharingError."""
        try:
            self._fs, root = fsspec.core.url_to_fs(url, **(options or {}))
        except (ImportError, ValueError, OSError) as error:
            raise SharingError(f"{url}: cannot be a store: {error}") from error
        self._root = root.rstrip("/")
        self._keep_s = keep_s
        self._clock = clock
        self._ahead_s = 0.0
        """Of our clock, the store's."""
        self._compared = -1
        """Bucket in which the clocks were compared last."""
        self._own: deque[tuple[int, str]] = deque()
        self._places: dict[str, str] = {}
        self._lock = threading.Lock()

    def publish(self, name: str, message: bytes) -> None:
        bucket = self._bucket()
        began_s = self._clock()
        path = self._write(bucket, name, message)
        if bucket != self._compared:
            self._compare_clocks(path, began_s)
            if self._bucket() != bucket:  # there nobody would look for it
                self._fs.rm_file(path)
                bucket = self._bucket()
                path = self._write(bucket, name, message)
            self._compared = bucket
        with self._lock:
            self._own.append((bucket, path))
        self._retire()

    def _write(self, bucket: int, name: str, message: bytes) -> str:
        folder = f"{self._root}/{bucket}"
        path = f"{folder}/{name}{_SUFFIX}"
        self._fs.makedirs(folder, exist_ok=True)
        if isinstance(self._fs, LocalFileSystem):  # others show an object whole or not at all
            hidden = f"{folder}/.{name}.partial"
            self._fs.pipe_file(hidden, message)
            self._fs.mv(hidden, path)
        else:
            self._fs.pipe_file(path, message)
        return path

    def _bucket(self, before_s: float = 0.0) -> int:
        """Return the bucket of now, or of a time before, by the store's clock."""
        return int((self._clock() + self._ahead_s - before_s) // self._BUCKET_S)

    def _compare_clocks(self, written: str, began_s: float) -> None:
        """Take the store's time from a file written since `began_s`: nodes whose clocks differ agree on it.

        A file system that does not tell, or not in which time zone, leaves each node to its own clock. So does a time
        that our clock may have had while we wrote: a slow store, or a stalled machine, is no other clock.
        """
        try:
            modified = self._fs.modified(written)
        except (NotImplementedError, OSError, KeyError):
            return
        if modified.tzinfo is None:
            return
        stored_s = modified.timestamp()
        least_s, most_s = stored_s - self._clock(), stored_s - began_s
        if not least_s - self._CLOCK_TOLERANCE_S <= self._ahead_s <= most_s + self._CLOCK_TOLERANCE_S:
            ahead_s = (least_s + most_s) / 2
            log.warning("%s: its clock is %.0f s ahead of this machine's, and counts", self._root, ahead_s)
            self._ahead_s = ahead_s

    def names(self) -> list[str]:
        # A bucket more than the age says, and one ahead: clocks differ, if only a little.
        now, first = self._bucket(), self._bucket(before_s=self._keep_s) - 1
        places: dict[str, str] = {}
        for bucket in range(now + 1, first - 1, -1):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                for path in self._fs.ls(f"{self._root}/{bucket}", detail=False, refresh=True):
                    file_name = path.rpartition("/")[2]
                    if file_name.endswith(_SUFFIX):
                        places.setdefault(file_name.removesuffix(_SUFFIX), path)
        with self._lock:
            self._places = places
        return list(places)

    def fetch(self, name: str, limit: int) -> bytes | None:
        with self._lock:
            path = self._places.get(name)
        if path is None:
            return None
        if isinstance(self._fs, LocalFileSystem) and not Path(path).is_file():  # a pipe would never be read to its end
            return None
        try:
            with self._fs.open(path, "rb", block_size=2**20, cache_type="none") as file:
                message: bytes = file.read(limit + 1)
        except (FileNotFoundError, IsADirectoryError):
            return None
        return message

    def close(self) -> None:
        return

    def _retire(self) -> None:
        """Remove own messages that are too old."""
        oldest = self._bucket(before_s=self._keep_s) - 1
        while True:
            with self._lock:
                if not self._own or self._own[0][0] >= oldest:
                    return
                _, path = self._own.popleft()
            with contextlib.suppress(FileNotFoundError):
                self._fs.rm_file(path)
            with contextlib.suppress(OSError):  # others' messages are still in it
                self._fs.rmdir(path.rpartition("/")[0])


class Mailbox:
    """Messages in memory within a budget of bytes, shared fairly: who has most there loses its oldest first."""

    def __init__(self, *, keep_s: float, budget_bytes: int, clock: Clock = time.monotonic) -> None:
        self._keep_s = keep_s
        self._budget_bytes = budget_bytes
        self._clock = clock
        self._messages: OrderedDict[str, tuple[float, bytes]] = OrderedDict()
        self._bytes_of: dict[str, int] = {}
        self._lock = threading.Lock()

    def publish(self, name: str, message: bytes) -> None:
        if not message:
            raise SharingError(f"{name[:80]}: nothing in it; allowed: a message")
        with self._lock:
            self._drop([old for old, (since, _) in self._messages.items() if since < self._clock() - self._keep_s])
            self._drop([name] if name in self._messages else [])
            self._messages[name] = (self._clock(), message)
            sender = _sender(name)
            self._bytes_of[sender] = self._bytes_of.get(sender, 0) + len(message)
            while sum(self._bytes_of.values()) > self._budget_bytes:
                greediest = max(self._bytes_of, key=self._bytes_of.__getitem__)
                self._drop([next(old for old in self._messages if _sender(old) == greediest)])

    def names(self) -> list[str]:
        with self._lock:
            since = self._clock() - self._keep_s
            return [name for name, (published, _) in self._messages.items() if published >= since]

    def fetch(self, name: str, limit: int) -> bytes | None:
        with self._lock:
            found = self._messages.get(name)
        return None if found is None else found[1][: limit + 1]

    def close(self) -> None:
        return

    def _drop(self, names: Iterable[str]) -> None:
        for name in names:
            sender = _sender(name)
            self._bytes_of[sender] -= len(self._messages.pop(name)[1])
            if not self._bytes_of[sender]:
                del self._bytes_of[sender]


def _sender(name: str) -> str:
    parsed = schema.parse_name(name)
    return parsed.node if parsed else ""
