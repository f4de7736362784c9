"""The client of an agent: connections that are kept, and errors that say whose they are."""

from __future__ import annotations

import contextlib
import errno
import queue
import socket
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from checkpoint import wire
from checkpoint.errors import StorageError

Request = dict[str, Any]
Answer = tuple[dict[str, Any], int]
"""The answer's header, and the bytes of its payload."""

_CONNECT_S = 3.0
_STALL_S = 60.0
"""Time after which an agent that does not connect, or stands still, is taken for gone."""
_RETRY_S = 10.0
"""Time for which an agent that was gone is not asked again."""
_MAX_ANSWER_BYTES = 256 << 20
_REMEDIES = {
    errno.ENOSPC: "; give the agent more memory, or keep less in it",
    errno.EEXIST: "; another process wrote it",
}


class Link:
    """One connection to an agent; one thread at a time."""

    def __init__(self, address: str, token: bytes) -> None:
        self.is_clean = True
        """Whether every request has been answered, so that the next one may follow."""
        host, _, port = address.rpartition(":")
        self._sock = socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S)
        try:
            wire.tune(self._sock)
            wire.introduce(self._sock, token)
            self._sock.settimeout(_STALL_S)
        except BaseException:
            self._sock.close()
            raise

    def ask(self, request: Request, payload: Any = b"") -> None:
        """Send a request, whose answer `answer` waits for; one at a time."""
        self.is_clean = False
        wire.send(self._sock, request, payload)

    def answer(self, buffer: memoryview | None = None) -> Answer:
        """Return the answer, and the bytes that came with it into the buffer."""
        header, nbytes = wire.receive(self._sock, _MAX_ANSWER_BYTES)
        if nbytes > (buffer.nbytes if buffer is not None else 0):
            raise wire.Refused(f"an answer of {nbytes} bytes that nobody asked for")
        if buffer is not None:
            wire.receive_into(self._sock, buffer[:nbytes])
        self.is_clean = True
        return header, nbytes

    def await_end(self) -> None:
        """Return when the agent has closed the connection."""
        self.is_clean = False
        with contextlib.suppress(ConnectionError):
            while self._sock.recv(1):
                pass

    def close(self) -> None:
        self._sock.close()


class Agent:
    """The client of one agent. Methods may be called from any thread, and raise StorageError."""

    def __init__(self, address: str, token: bytes, clock: Callable[[], float] = time.monotonic) -> None:
        self.address = address
        """`host:port`."""
        self._token = token
        self._clock = clock
        self._idle: queue.LifoQueue[Link] = queue.LifoQueue()
        weakref.finalize(self, _close_all, self._idle)  # a storage that is only read from has no end of its own
        self._gone_until_s = -1.0
        self._reason = ""

    def call(self, request: Request, payload: Any = b"", buffer: memoryview | None = None) -> Answer:
        """Return the answer to one request, and the bytes that came into the buffer."""
        with self.link() as link:
            return self.begin(link, request, payload)(buffer)

    def begin(self, link: Link, request: Request, payload: Any = b"") -> Callable[[memoryview | None], Answer]:
        """Send a request and return what waits for its answer, so that several agents can work at once."""
        with self._told():
            link.ask(request, payload)
        return lambda buffer: self._checked(link, buffer)

    @contextlib.contextmanager
    def link(self) -> Iterator[Link]:
        """Lend a connection."""
        link = self._take()
        try:
            yield link
        finally:
            if link.is_clean:
                self._idle.put(link)
            else:
                link.close()

    def close(self) -> None:
        """Close the idle connections. Idempotent; a later call opens new ones."""
        _close_all(self._idle)

    def _take(self) -> Link:
        with contextlib.suppress(queue.Empty):
            return self._idle.get_nowait()
        if self._clock() < self._gone_until_s:
            raise StorageError(f"agent {self.address}: {self._reason}")
        with self._told():
            return Link(self.address, self._token)

    def _checked(self, link: Link, buffer: memoryview | None) -> Answer:
        with self._told():
            header, nbytes = link.answer(buffer)
        if "error" in header:
            number = int(header.get("errno", errno.EIO))
            message = f"agent {self.address}: {header['error']}{_REMEDIES.get(number, '')}"
            raise StorageError(message) from OSError(number, header["error"])
        return header, nbytes

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Turn the errors of a connection into StorageError; what waits in the pool is as dead as it is."""
        try:
            yield
        except (OSError, wire.Refused) as error:
            self.close()
            self._reason = str(error) or type(error).__name__
            self._gone_until_s = self._clock() + _RETRY_S
            raise StorageError(f"agent {self.address}: {self._reason}") from error


def _close_all(links: queue.LifoQueue[Link]) -> None:
    with contextlib.suppress(queue.Empty):
        while True:
            links.get_nowait().close()
