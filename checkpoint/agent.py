"""A process that holds files in RAM for the processes that train, and outlives them.

One runs on every host, at an address of its own; `checkpoint.memory` is its client, `checkpoint.hosts` starts it.
This file needs nothing but the standard library and runs by its path, without the package: a host's agent is
there in a tenth of a second and costs a few MiB beside the files it holds.

A connection begins with a challenge to both sides: each proves by HMAC that it has the token, which never
travels. Nothing is encrypted; what travels is found damaged by the digests of the checkpoint, not by the agent.
Until a client has proved itself, the agent reads 64 bytes from it and allocates nothing.

Then, in both directions, frames of `u32 header bytes | u64 payload bytes | JSON header | payload`. The client
asks, the agent answers; an error is `{"error": text, "errno": number}`.

    create {path, nbytes}            set memory aside -> {upload}; nobody sees the file yet
    put    {upload, offset} + bytes  from any connection, in any order, each byte once
    commit {upload, tag}             all bytes came: the file appears, in the place of the one before
    drop   {upload}                  or it never does; so too when the connection that created it ends
    write  {path, tag, new} + bytes  create, put and commit of a small file; a new one replaces none
    read   {path, offset, nbytes}    -> bytes, fewer only at the end of the file
    stat   {path}                    -> {nbytes, tag}, nbytes is null if there is no such file
    list   {folder}                  -> {entries: [[name, is_folder, nbytes, modified_s], …]}
    remove {path}                    a file or a whole folder; nothing happens if it is absent
    about                            -> {pid, limit_bytes, used_bytes, num_files}
    stop                             end the agent
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import hashlib
import hmac
import json
import mmap
import os
import resource
import secrets
import selectors
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_REQUEST_BYTES = 64 << 10
"""Largest header of a request; an answer's may be larger."""
TOKEN_BYTES = 32
"""Bytes of the secret that an agent and its clients share."""
_MAGIC = b"ckagent1"
_FRAME = struct.Struct("!IQ")
_NONCE_BYTES = 32
_PROOF_BYTES = hashlib.sha256().digest_size
_PROVE_S = 5.0
"""Time a client has to prove itself."""
_STALL_S = 30.0
"""Time after which a connection that stands still amid a frame is given up."""
_MAX_CLIENTS = 4096
_MAX_STRANGERS = 64
"""Connections at once that have proved themselves, and that have not; more are refused."""
_DRAIN_BYTES = 64 << 10
_PAGE_BYTES = mmap.PAGESIZE
"""Every file is counted in whole pages, at least one."""
_HUGE_BYTES = 2 << 20


class Refused(Exception):
    """The other side does not have the token, or does not speak this protocol: the connection ends."""


class Rejected(Exception):
    """A request that cannot be fulfilled; the connection goes on."""

    def __init__(self, number: int, text: str) -> None:
        super().__init__(text)
        self.number = number
        """The errno that comes nearest."""


def tune(sock: socket.socket) -> None:
    """Make a connection quick for small frames, and quick to notice a lost host."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3), ("TCP_USER_TIMEOUT", 30_000)):
        if hasattr(socket, name):  # Linux has all of them
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def receive_into(sock: socket.socket, view: memoryview, within_s: float | None = None) -> None:
    """Fill a buffer. Raises ConnectionError if the other side ends before it is full, TimeoutError if time does."""
    end_s = None if within_s is None else time.monotonic() + within_s
    while view.nbytes:
        if end_s is not None:
            sock.settimeout(max(end_s - time.monotonic(), 0.001))
        count = sock.recv_into(view)
        if not count:
            raise ConnectionError("the connection ended amid a message")
        view = view[count:]


def send(sock: socket.socket, header: dict[str, Any], payload: Any = b"") -> None:
    """Send one frame."""
    view = memoryview(payload).cast("B")
    text = json.dumps(header, separators=(",", ":")).encode()
    sock.sendall(_FRAME.pack(len(text), view.nbytes) + text)
    if view.nbytes:
        sock.sendall(view)


def receive(sock: socket.socket, max_header_bytes: int) -> tuple[dict[str, Any], int]:
    """Return the header of the next frame and the bytes of the payload that follows it.

    Raises:
        Refused: it is not a frame, or its header is too large. ConnectionError: there is none any more.
    """
    head = bytearray(_FRAME.size)
    receive_into(sock, memoryview(head))
    header_bytes, payload_bytes = _FRAME.unpack(head)
    if header_bytes > max_header_bytes:
        raise Refused(f"a header of {header_bytes} bytes; at most {max_header_bytes} are allowed")
    text = bytearray(header_bytes)
    receive_into(sock, memoryview(text))
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Refused(f"a header that is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise Refused("a header that is not an object")
    return header, payload_bytes


def _proof(token: bytes, side: bytes, asked: bytes, own: bytes) -> bytes:
    return hmac.digest(token, side + asked + own, "sha256")


def greet(sock: socket.socket, token: bytes) -> None:
    """Be the agent's side of the challenge. Raises Refused."""
    nonce = secrets.token_bytes(_NONCE_BYTES)
    sock.sendall(_MAGIC + nonce)
    answer = bytearray(_NONCE_BYTES + _PROOF_BYTES)
    receive_into(sock, memoryview(answer), _PROVE_S)
    theirs, proof = bytes(answer[:_NONCE_BYTES]), bytes(answer[_NONCE_BYTES:])
    if not hmac.compare_digest(proof, _proof(token, b"client", nonce, theirs)):
        raise Refused("the client does not have the token")
    sock.sendall(_proof(token, b"agent", theirs, nonce))


def introduce(sock: socket.socket, token: bytes) -> None:
    """Be the client's side of the challenge. Raises Refused."""
    hello = bytearray(len(_MAGIC) + _NONCE_BYTES)
    receive_into(sock, memoryview(hello))
    if hello[: len(_MAGIC)] != _MAGIC:
        raise Refused("what listens there is no agent of this version")
    theirs, nonce = bytes(hello[len(_MAGIC) :]), secrets.token_bytes(_NONCE_BYTES)
    sock.sendall(nonce + _proof(token, b"client", theirs, nonce))
    proof = bytearray(_PROOF_BYTES)
    try:
        receive_into(sock, memoryview(proof))
    except ConnectionError as error:
        raise Refused("the agent closed the connection: it has another token, or too many clients") from error
    if not hmac.compare_digest(proof, _proof(token, b"agent", nonce, theirs)):
        raise Refused("what listens there does not have the token")


@dataclass(eq=False, slots=True)
class _File:
    """A file, or one that is being written."""

    path: str
    memory: memoryview
    cost: int
    tag: str = ""
    modified_s: float = 0.0
    arrived: int = 0
    """Bytes received so far."""
    users: int = 1
    """Who needs the memory: the table of files or of uploads, and each transfer under way."""


class Store:
    """Files in RAM, within a limit. Every method may be called from any thread, and raises Rejected.

    The memory of a large file that goes is kept for the next one of its size, which the next checkpoint's is: to
    touch fresh memory costs several times what it costs to fill it.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._used_bytes = 0
        self._spare: dict[int, list[memoryview]] = {}
        self._spare_bytes = 0
        self._files: dict[str, _File] = {}
        self._uploads: dict[int, _File] = {}
        self._num_uploads = 0
        self._lock = threading.Lock()

    def create(self, path: str, nbytes: int) -> int:
        """Set memory aside for a file and return the upload's number; raises ENOSPC over the limit."""
        cost = max(1, -(-nbytes // _PAGE_BYTES)) * _PAGE_BYTES
        with self._lock:
            if self._used_bytes + cost > self._limit_bytes:
                text = f"{nbytes} bytes do not fit: {self._used_bytes} of {self._limit_bytes} are in use"
                raise Rejected(errno.ENOSPC, text)
            self._used_bytes += cost
            memory = self._take_spare(nbytes)
        try:
            memory = _memory(nbytes) if memory is None else memory
        except (OSError, ValueError, OverflowError, MemoryError) as error:
            with self._lock:
                self._used_bytes -= cost
            raise Rejected(errno.ENOMEM, f"{nbytes} bytes: the host has no memory for them ({error})") from error
        with self._lock:
            self._num_uploads += 1
            self._uploads[self._num_uploads] = _File(path, memory, cost)
            return self._num_uploads

    def _take_spare(self, nbytes: int) -> memoryview | None:
        """Return spare memory of that size if there is some, and let go of what is over the limit."""
        found = self._spare[nbytes].pop() if self._spare.get(nbytes) else None
        self._spare_bytes -= found.nbytes if found is not None else 0
        while self._used_bytes + self._spare_bytes > self._limit_bytes:
            size = next(iter(self._spare))
            self._spare_bytes -= size * len(self._spare.pop(size))
        return found

    @contextlib.contextmanager
    def put(self, upload: int, offset: int, nbytes: int) -> Iterator[memoryview]:
        """Lend the memory of a part of an upload, which has arrived when the block ends."""
        with self._lock:
            file = self._upload(upload)
            if not 0 <= offset <= file.memory.nbytes - nbytes:
                raise Rejected(errno.EINVAL, f"bytes [{offset}, {offset + nbytes}) of a file of {file.memory.nbytes}")
            file.users += 1
        try:
            yield file.memory[offset : offset + nbytes]
            with self._lock:
                file.arrived += nbytes
        finally:
            self._leave(file)

    def commit(self, upload: int, tag: str, *, new: bool = False) -> None:
        """Let the file appear; a `new` one only where there is none."""
        with self._lock:
            file = self._upload(upload)
            if new and file.path in self._files:
                raise Rejected(errno.EEXIST, "the file exists")
            if file.arrived != file.memory.nbytes:
                raise Rejected(errno.EIO, f"{file.arrived} of {file.memory.nbytes} bytes arrived")
            del self._uploads[upload]
            file.tag, file.modified_s = tag, time.time()
            before = self._files.get(file.path)
            self._files[file.path] = file
        if before is not None:
            self._leave(before)

    def drop(self, upload: int) -> None:
        """Forget an upload; nothing happens if there is none."""
        with self._lock:
            file = self._uploads.pop(upload, None)
        if file is not None:
            self._leave(file)

    @contextlib.contextmanager
    def read(self, path: str, offset: int, nbytes: int) -> Iterator[memoryview]:
        """Lend a part of a file, which stays as it is until the block ends, even if the file is removed."""
        with self._lock:
            file = self._files.get(path)
            if file is None:
                raise Rejected(errno.ENOENT, "no such file")
            file.users += 1
        try:
            start = min(max(offset, 0), file.memory.nbytes)
            yield file.memory[start : start + max(nbytes, 0)].toreadonly()
        finally:
            self._leave(file)

    def stat(self, path: str) -> tuple[int | None, str]:
        """Return a file's bytes and its tag; None if there is no such file."""
        with self._lock:
            file = self._files.get(path)
            return (file.memory.nbytes, file.tag) if file else (None, "")

    def entries(self, folder: str) -> list[tuple[str, bool, int, float | None]]:
        """Return what a folder holds."""
        prefix = f"{folder}/" if folder else ""
        found: dict[str, tuple[str, bool, int, float | None]] = {}
        with self._lock:
            for path, file in self._files.items():
                if path.startswith(prefix):
                    name, slash, _ = path[len(prefix) :].partition("/")
                    is_file = (name, False, file.memory.nbytes, file.modified_s)
                    found[name] = (name, True, 0, None) if slash else is_file
        return [found[name] for name in sorted(found)]

    def remove(self, path: str) -> None:
        """Remove a file or a whole folder."""
        with self._lock:
            gone = [p for p in self._files if p == path or p.startswith(f"{path}/")]
            files = [self._files.pop(p) for p in gone]
        for file in files:
            self._leave(file)

    def about(self) -> dict[str, int]:
        """Return what the store holds, in numbers."""
        with self._lock:
            return {
                "limit_bytes": self._limit_bytes,
                "used_bytes": self._used_bytes,
                "num_files": len(self._files),
                "num_uploads": len(self._uploads),
            }

    def _upload(self, upload: int) -> _File:
        file = self._uploads.get(upload)
        if file is None:
            raise Rejected(errno.EBADF, f"there is no upload {upload}: the connection that created it has ended")
        return file

    def _leave(self, file: _File) -> None:
        with self._lock:
            file.users -= 1
            if not file.users:
                self._used_bytes -= file.cost
                if file.memory.nbytes >= _HUGE_BYTES:
                    self._spare.setdefault(file.memory.nbytes, []).append(file.memory)
                    self._spare_bytes += file.memory.nbytes


def _memory(nbytes: int) -> memoryview:
    """Return memory for a file; whole pages go back to the host when the last view of them goes."""
    if nbytes < _HUGE_BYTES:
        return memoryview(bytearray(nbytes))
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # only quicker: a kernel may have no huge pages
        pages.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(pages)


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
    """Accepts clients until it is told to stop, or has had none for `idle_s`."""

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
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._woken, selectors.EVENT_READ)
            while True:
                left_s = self._left_s()
                if left_s <= 0:
                    return f"had no client for {self._idle_s:g} s"
                ready = [key.fileobj for key, _ in selector.select(left_s)]
                if self._woken in ready:
                    return "was told to stop"
                if self._listener in ready:
                    self._accept()

    def _left_s(self) -> float:
        with self._lock:
            if self._num_clients:
                return self._idle_s
            return self._last_client_s + self._idle_s - time.monotonic()

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
                sock.settimeout(_PROVE_S)
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


def read_token(path: Path) -> bytes:
    """Return the secret in a file that its owner alone may read. Raises OSError, PermissionError."""
    with path.open("rb") as file:
        mode = os.fstat(file.fileno()).st_mode & 0o777
        if mode & 0o077:
            raise PermissionError(f"{path}: mode {mode:o}: others may read the token; chmod 600 it")
        token = file.read()
    if len(token) != TOKEN_BYTES:
        raise PermissionError(f"{path}: {len(token)} bytes are no token; {TOKEN_BYTES} are one")
    return token


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
    if "torch" in sys.modules:  # started as `-m checkpoint.agent`, which imports the package: start anew without it
        os.execv(sys.executable, [sys.executable, "-P", __file__, *sys.argv[1:]])
    sys.exit(main(sys.argv[1:]))
