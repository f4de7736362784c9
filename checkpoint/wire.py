"""What an agent and its clients say to each other, and how each proves to the other who it is.

A connection begins with a challenge to both sides: each proves by HMAC that it has the token, which never
travels. Nothing is encrypted; what travels is found damaged by the digests of the checkpoint, not here. Until a
client has proved itself, the agent reads 64 bytes from it and allocates nothing.

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
    about                            -> {pid, limit_bytes, used_bytes, num_files, num_uploads}
    stop                             end the agent
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import socket
import struct
import time
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


class Refused(Exception):
    """The other side does not have the token, or does not speak this protocol: the connection ends."""


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
    sock.settimeout(_PROVE_S)
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


def read_token(path: Path) -> bytes:
    """Return the secret in a file that its owner alone may read. Raises OSError, PermissionError."""
    with path.open("rb") as file:
        check_private(path, os.fstat(file.fileno()))
        token = file.read(TOKEN_BYTES + 1)
    if len(token) != TOKEN_BYTES:
        raise PermissionError(f"{path}: is no token: it does not have {TOKEN_BYTES} bytes")
    return token


def check_private(path: Path, found: os.stat_result) -> None:
    """Raise PermissionError unless a file or folder belongs to this user, and to nobody else."""
    if found.st_uid != os.getuid():
        raise PermissionError(f"{path}: belongs to another user")
    if found.st_mode & 0o077:
        raise PermissionError(f"{path}: mode {found.st_mode & 0o777:o}: others may use it; take their rights away")
