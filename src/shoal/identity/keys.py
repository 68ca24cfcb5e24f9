"""Ed25519 key pairs and their files."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from msgspec import Meta

from shoal.errors import BadInput
from shoal.identity.secrets import write_secret

NodeId = Annotated[bytes, Meta(min_length=32, max_length=32)]
"""An Ed25519 public key: who a node is."""


class BadKeyFile(BadInput):
    """A key file is not an Ed25519 private key, or others than its owner can read it."""

    code = "SH-110"


class KeyPair:
    """An Ed25519 private key and the NodeId that goes with it."""

    def __init__(self, private: Ed25519PrivateKey) -> None:
        self._private = private
        self.node_id: bytes = private.public_key().public_bytes_raw()

    @classmethod
    def generate(cls) -> KeyPair:
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def from_seed(cls, seed: bytes) -> KeyPair:
        """The key that 32 secret bytes stand for (RFC 8032, section 5.1.5)."""
        return cls(Ed25519PrivateKey.from_private_bytes(seed))

    def sign(self, message: bytes) -> bytes:
        return self._private.sign(message)

    def to_pem(self) -> bytes:
        return self._private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )

    @property
    def private_key(self) -> Ed25519PrivateKey:
        """The key object itself, for the transport's certificate."""
        return self._private

    def __repr__(self) -> str:
        return f"KeyPair({short_id(self.node_id)})"


def verify(node_id: bytes, signature: bytes, message: bytes) -> bool:
    """Whether `signature` over `message` was made by `node_id`."""
    try:
        Ed25519PublicKey.from_public_bytes(node_id).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


def short_id(node_id: bytes) -> str:
    """The first eight hexadecimal digits, for people; never for comparing."""
    return node_id.hex()[:8]


def node_id_from_hex(text: str) -> bytes:
    """64 hexadecimal digits -> NodeId. Raises BadInput."""
    try:
        value = bytes.fromhex(text)
    except ValueError:
        value = b""
    if len(value) != 32:
        raise BadInput(f"{text!r} is not a NodeId: 64 hexadecimal digits are expected.")
    return value


def load_key(path: Path) -> KeyPair:
    """Read a key file. Raises BadKeyFile when it is missing, unreadable, not Ed25519, or readable by others."""
    try:
        mode = path.stat().st_mode
        pem = path.read_bytes()
    except OSError as error:
        raise BadKeyFile(f"The key file {path} cannot be read: {error.strerror}.") from error
    if mode & 0o077:
        raise BadKeyFile(f"The key file {path} can be read by others; run: chmod 600 {path}")
    try:
        private = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError) as error:
        raise BadKeyFile(f"The key file {path} is not a private key in PEM form; restore it or delete it.") from error
    if not isinstance(private, Ed25519PrivateKey):
        raise BadKeyFile(f"The key file {path} holds a key that is not Ed25519.")
    return KeyPair(private)


def load_or_create_key(path: Path) -> KeyPair:
    """Read a key file, or make one that only its owner can read. Safe when two processes start at once."""
    if not path.exists():
        with suppress(FileExistsError):  # another process was first: its key counts
            write_secret(path, KeyPair.generate().to_pem())
    return load_key(path)
