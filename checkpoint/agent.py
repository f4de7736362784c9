"""A process that holds files in RAM for the processes that train, and outlives them.

One runs on every host, at an address of its own; `checkpoint.memory` is its client, `checkpoint.hosts` starts it,
`checkpoint.wire` is what they say to each other. It needs nothing but the standard library: a host's agent is there
in a tenth of a second and costs a few MiB beside the files it holds. Run as `python -m checkpoint.agent` it also has
what the package imports.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import resource
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from checkpoint.ram import Rejected, Store
from checkpoint.wire import (
    MAX_REQUEST_BYTES,
    TOKEN_BYTES,
    Refused,
    greet,
    read_token,
    receive,
    receive_into,
    send,
    tune,
)

_STALL_S = 30.0
"""Time after which a connection that stands still amid a frame is given up."""
_MAX_CLIENTS = 4096
_MAX_STRANGERS = 64
"""Connections at once that have proved themselves, and that have not; more are refused."""
_DRAIN_BYTES = 64 << 10
_EMPTY_S = 60.0
"""Longest time without a client for an agent that holds no file, which is of no use to whoever comes later."""


class _Connection:
    """One client that has proved itself, served by a thread of its own."""

    def __init__(self, sock: socket.socket, store: Store, stop: Callable[[], None]) -> None:
        self._sock = sock
        self._store = store
        self._stop = stop
        self._uploads: set[int] = set()
        self._unread = 0

    def serve(self) -> None:
        """Answer until the client goes. Raises Refused, OSError where it goes badly."""
        try:
            while self._await_request():
                request, self._unread = receive(self._sock, MAX_REQUEST_BYTES)
                try:
                    self._answer(request)
                except Rejected as error:
                    self._drain()
                    send(self._sock, {"error": str(error), "errno": error.number})
        finally:
            for upload in self._uploads:
                self._store.drop(upload)

    def _await_request(self) -> bool:
        """Wait for the next frame; False when the client has gone."""
        self._sock.settimeout(None)
        more = bool(self._sock.recv(1, socket.MSG_PEEK))
        self._sock.settimeout(_STALL_S)
        return more

    def _answer(self, request: dict[str, Any]) -> None:
        op = request.get("op")
        if op in ("put", "write"):
            self._take(request)
        elif op == "read":
            part = self._store.read(_path(request), _count(request, "offset"), _count(request, "nbytes"))
            with part as view:
                send(self._sock, {}, view)
        elif self._unread:
            raise Rejected(errno.EINVAL, f"{op!r} has no payload")
        else:
            send(self._sock, self._simple(str(op), request))
            if op == "stop":
                self._stop()

    def _take(self, request: dict[str, Any]) -> None:
        """Receive a payload: a part of an upload, or a small file."""
        nbytes = self._unread
        if request["op"] == "put":
            self._receive(_count(request, "upload"), _count(request, "offset"))
        else:
            upload = self._store.create(_path(request), nbytes)
            try:
                self._receive(upload, 0)
                self._store.commit(upload, _text(request, "tag"), new=request.get("new") is True)
            finally:
                self._store.drop(upload)
        send(self._sock, {})

    def _receive(self, upload: int, offset: int) -> None:
        with self._store.put(upload, offset, self._unread) as view:
            receive_into(self._sock, view)
            self._unread = 0

    def _simple(self, op: str, request: dict[str, Any]) -> dict[str, Any]:
        """Return the answer to a request that moves no bytes."""
        store = self._store
        if op == "create":
            upload = store.create(_path(request), _count(request, "nbytes"))
            self._uploads.add(upload)
            return {"upload": upload}
        if op in ("commit", "drop"):
            upload = _count(request, "upload")
            if op == "commit":
                store.commit(upload, _text(request, "tag"))
            store.drop(upload)
            self._uploads.discard(upload)
        elif op == "stat":
            nbytes, tag = store.stat(_path(request))
            return {"nbytes": nbytes, "tag": tag}
        elif op == "list":
            return {"entries": store.entries(_text(request, "folder"))}
        elif op == "remove":
            store.remove(_path(request))
        elif op == "about":
            return {"pid": os.getpid(), **store.about()}
        elif op != "stop":
            raise Rejected(errno.ENOSYS, f"there is no request {op!r}")
        return {}

    def _drain(self) -> None:
        """Read past the payload of a rejected request."""
        scratch = memoryview(bytearray(min(self._unread, _DRAIN_BYTES)))
        while self._unread:
            part = scratch[: min(self._unread, _DRAIN_BYTES)]
            receive_into(self._sock, part)
            self._unread -= part.nbytes


def _text(request: dict[str, Any], key: str) -> str:
    value = request.get(key)
    if not isinstance(value, str):
        raise Rejected(errno.EINVAL, f"{key}: {value!r} is not text")
    return value


def _path(request: dict[str, Any]) -> str:
    path = _text(request, "path")
    if not path or path.startswith("/") or path.endswith("/") or "//" in path:
        raise Rejected(errno.EINVAL, f"path: {path!r} is not the path of a file")
    return path


def _count(request: dict[str, Any], key: str) -> int:
    value = request.get(key)
    if type(value) is not int or value < 0:
        raise Rejected(errno.EINVAL, f"{key}: {value!r} is not a count")
    return value


class Server:
    """Accepts clients until it is told to stop, or has had none for `idle_s`; holding no file, for a minute."""

    def __init__(self, listener: socket.socket, token: bytes, limit_bytes: int, idle_s: float) -> None:
        self._listener = listener
        self._token = token
        self._store = Store(limit_bytes)
        self._idle_s = idle_s
        self._lock = threading.Lock()
        self._num_strangers = 0
        self._num_clients = 0
        self._last_client_s = time.monotonic()
        self._woken, self._wake = socket.socketpair()

    def run(self) -> str:
        """Serve; return why it ended."""
        with self._woken, self._wake, selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._woken, selectors.EVENT_READ)
            while True:
                left_s = self._left_s()
                if left_s <= 0:
                    return f"had no client for {self._lease_s():g} s"
                ready = [key.fileobj for key, _ in selector.select(left_s)]
                if self._woken in ready:
                    return "was told to stop"
                if self._listener in ready:
                    self._accept()

    def _left_s(self) -> float:
        with self._lock:
            if self._num_clients:  # it is looked again when one has gone, or so often
                return min(self._idle_s, _EMPTY_S)
            return self._last_client_s + self._lease_s() - time.monotonic()

    def _lease_s(self) -> float:
        return self._idle_s if self._store.about()["num_files"] else min(self._idle_s, _EMPTY_S)

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError:  # it has gone again, or this process is out of descriptors: the others are served on
            time.sleep(0.01)
            return
        with self._lock:
            full = self._num_strangers >= _MAX_STRANGERS or self._num_clients >= _MAX_CLIENTS
            self._num_strangers += not full
        if full:
            sock.close()
            return
        try:
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()
        except RuntimeError:  # the host has no more threads: the others are served on
            sock.close()
            self._count(strangers=-1, clients=0)

    def _serve(self, sock: socket.socket) -> None:
        """Be the thread of one connection; a client that errs loses it, and nothing else happens."""
        is_client = False
        try:
            with sock, contextlib.suppress(Refused, OSError):
                tune(sock)
                greet(sock, self._token)
                is_client = True
                self._count(strangers=-1, clients=1)
                _Connection(sock, self._store, lambda: self._wake.sendall(b"!")).serve()
        finally:
            self._count(strangers=0 if is_client else -1, clients=-1 if is_client else 0)

    def _count(self, *, strangers: int, clients: int) -> None:
        with self._lock:
            self._num_strangers += strangers
            self._num_clients += clients
            if clients:
                self._last_client_s = time.monotonic()


def main(arguments: list[str]) -> int:
    """Run an agent: its port goes to standard output as soon as it listens, to standard error why it ended."""
    parser = argparse.ArgumentParser(prog="python -m checkpoint.agent", description=__doc__.splitlines()[0])
    parser.add_argument("--token", type=Path, required=True, help=f"file of mode 600 with {TOKEN_BYTES} random bytes")
    parser.add_argument("--limit-bytes", type=int, required=True, help="memory for files")
    parser.add_argument("--idle-s", type=float, required=True, help="end after so long without a client")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; other hosts must reach it")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--detach", action="store_true", help="serve in the background, in a session of its own")
    chosen = parser.parse_args(arguments)
    token = read_token(chosen.token)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a connection each; shells often start with 1024
    family = socket.AF_INET6 if ":" in chosen.host else socket.AF_INET
    with socket.create_server((chosen.host, chosen.port), family=family, backlog=256) as listener:
        server = Server(listener, token, chosen.limit_bytes, chosen.idle_s)
        sys.stdout.write(f"{listener.getsockname()[1]}\n")
        sys.stdout.flush()
        if chosen.detach:
            _detach()
        sys.stderr.write(f"ended: {server.run()}\n")
    return 0


def _detach() -> None:
    """Go on as a process that no other waits for; there are no threads yet."""
    if os.fork():
        os._exit(0)
    os.setsid()
    os.chdir("/")
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, sys.stdin.fileno())
    os.dup2(nowhere, sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
