"""Ed25519 signatures on rows: a node that signs is called by its public key, so that a name proves itself.

Extra `rl` (the `cryptography` package), imported by what needs it.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from trainsys.errors import MissingExtraError
from trainsys.rl.errors import SharingError
from trainsys.rl.schema import Row

_KEY_BYTES = 32


class Signer:
    """Signs a node's rows with its private key."""

    def __init__(self, private_key: bytes) -> None:
        """Take the 32 bytes of a private key. Raises: SharingError where they are not that."""
        if len(private_key) != _KEY_BYTES:
            raise SharingError(f"private key: {len(private_key)} bytes; an Ed25519 key has {_KEY_BYTES}")
        self._key = _ed25519().Ed25519PrivateKey.from_private_bytes(private_key)
        self.node: str = self._key.public_key().public_bytes_raw().hex()
        """What the node is called: its public key in hexadecimal."""

    def sign(self, row: Row) -> Row:
        """Return the row as this node's, signed."""
        own = replace(row, node=self.node, signature=b"")
        return replace(own, signature=self._key.sign(own.digest))


def is_signed(row: Row) -> bool:
    """Return whether the key that names the row's node signed exactly this content."""
    if not row.signature or len(row.node) != 2 * _KEY_BYTES:
        return False
    try:
        key = _ed25519().Ed25519PublicKey.from_public_bytes(bytes.fromhex(row.node))
        key.verify(row.signature, row.digest)
    except (ValueError, _invalid_signature()):
        return False
    return True


def open_signer(path: Path) -> Signer:
    """Return the signer of the key in `path`; a file that is not there gets a new key, readable by its owner alone.

    Raises:
        SharingError: the file is no key, or cannot be read or written.
    """
    try:
        try:
            text = path.read_text(encoding="ascii").strip()
        except FileNotFoundError:
            text = _ed25519().Ed25519PrivateKey.generate().private_bytes_raw().hex()
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w", encoding="ascii") as file:
                file.write(text + "\n")
        return Signer(bytes.fromhex(text))
    except (OSError, ValueError) as error:
        raise SharingError(f"{path}: is no private key in hexadecimal that can be used: {error}") from error


def _ed25519() -> Any:
    try:
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise MissingExtraError("signed rollouts", "rl") from error
    return ed25519


def _invalid_signature() -> type[Exception]:
    from cryptography.exceptions import InvalidSignature

    return InvalidSignature
