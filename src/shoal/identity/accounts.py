"""Accounts: who pays and who earns. A secp256k1 key, so that a signature is good on an EVM chain, too.

An account is named by its address: the last 20 bytes of Keccak-256 of its public key (Ethereum yellow paper, appendix
F), written with a checksum in its capitals (EIP-55). Signatures are 65 bytes, r, s and v (27 or 28); of the two that
say the same, only the one with the smaller s counts (EIP-2): a signature cannot be made into another one.
"""

from __future__ import annotations

from functools import cached_property, lru_cache
from pathlib import Path
from typing import Annotated

import coincurve
import sha3
from msgspec import Meta

from shoal.errors import BadInput
from shoal.identity.secrets import write_secret

ADDRESS_BYTES = 20
SIGNATURE_BYTES = 65
Address = Annotated[bytes, Meta(min_length=ADDRESS_BYTES, max_length=ADDRESS_BYTES)]
AccountSignature = Annotated[bytes, Meta(min_length=SIGNATURE_BYTES, max_length=SIGNATURE_BYTES)]
ORDER = 0xFFFFFFFF_FFFFFFFF_FFFFFFFF_FFFFFFFE_BAAEDCE6_AF48A03B_BFD25E8C_D0364141
"""Of the curve's group (SEC 2, section 2.4.1)."""
_HALF_ORDER = (ORDER // 2).to_bytes(32)
KEY_FILE_MAX = 256


class BadAccountKey(BadInput):
    """A key file is no secp256k1 private key in hexadecimal digits, or others than its owner can read it."""

    code = "SH-118"


class BadAccount(BadInput):
    """A text is not the address of an account."""

    code = "SH-119"


def keccak_256(data: bytes) -> bytes:
    digest: bytes = sha3.keccak_256(data).digest()
    return digest


class AccountKey:
    """The private key of an account."""

    def __init__(self, secret: bytes) -> None:
        """Raises BadAccountKey unless it is 32 bytes of a number from 1 to ORDER - 1."""
        try:
            if len(secret) != 32:
                raise ValueError
            self._key = coincurve.PrivateKey(secret)
        except ValueError as error:
            raise BadAccountKey(
                "The key of an account is a number of 32 bytes below the order of the curve."
            ) from error

    @classmethod
    def generate(cls) -> AccountKey:
        return cls(coincurve.PrivateKey().secret)

    @cached_property
    def address(self) -> bytes:
        return address_of(self._key.public_key)

    def sign(self, digest: bytes) -> bytes:
        """Of 32 bytes that are a hash already."""
        signature = self._key.sign_recoverable(digest, hasher=None)
        return signature[:64] + bytes((27 + signature[64],))

    @property
    def secret(self) -> bytes:
        return self._key.secret

    def __repr__(self) -> str:
        return f"AccountKey({address_text(self.address)})"


def address_of(public: coincurve.PublicKey) -> bytes:
    return keccak_256(public.format(compressed=False)[1:])[-ADDRESS_BYTES:]


def signer_of(digest: bytes, signature: bytes) -> bytes | None:
    """The address whose key signed this digest; None where nobody's did, or the signature has its other form."""
    if len(signature) != SIGNATURE_BYTES or signature[64] not in (27, 28):
        return None
    if signature[32:64] > _HALF_ORDER:
        return None
    compact = signature[:64] + bytes((signature[64] - 27,))
    try:
        public = coincurve.PublicKey.from_signature_and_message(compact, digest, hasher=None)
    except ValueError:
        return None
    return address_of(public)


@lru_cache(maxsize=4096)
def address_text(address: bytes) -> str:
    """`0x` and 40 hexadecimal digits, with EIP-55's checksum in their capitals."""
    digits = address.hex()
    hashed = keccak_256(digits.encode()).hex()
    return "0x" + "".join(
        digit.upper() if int(nibble, 16) >= 8 else digit for digit, nibble in zip(digits, hashed, strict=False)
    )


def parse_address(text: str) -> bytes:
    """Raises BadAccount: also for capitals that are there and no checksum."""
    try:
        address = bytes.fromhex(text[2:]) if text[:2] in ("0x", "0X") and text.isascii() else b""
    except ValueError:
        address = b""
    if len(address) != ADDRESS_BYTES or len(text) != 2 + 2 * ADDRESS_BYTES:
        raise BadAccount(f"{text!r} is not the address of an account: 0x and 40 hexadecimal digits are expected.")
    digits = text[2:]
    if digits not in (digits.lower(), digits.upper()) and digits != address_text(address)[2:]:
        raise BadAccount(f"{text!r} has a wrong letter: its checksum does not fit. Copy the whole address again.")
    return address


def load_account(path: Path) -> AccountKey:
    """Read a key file: 64 hexadecimal digits, `0x` before them or not. Raises BadAccountKey."""
    try:
        mode = path.stat().st_mode
        with path.open("rb") as file:
            text = file.read(KEY_FILE_MAX).decode("ascii", errors="replace").strip()
    except OSError as error:
        raise BadAccountKey(f"The key file {path} cannot be read: {error.strerror}.") from error
    if mode & 0o077:
        raise BadAccountKey(f"The key file {path} can be read by others; run: chmod 600 {path}")
    try:
        return AccountKey(bytes.fromhex(text.removeprefix("0x")))
    except (ValueError, BadAccountKey) as error:
        raise BadAccountKey(
            f"The key file {path} holds no secp256k1 key: 64 hexadecimal digits are expected. Restore it."
        ) from error


def create_account(path: Path) -> AccountKey:
    """Make a key and its file, which only its owner can read. Raises BadAccountKey where there is a file already: money
    may belong to it."""
    key = AccountKey.generate()
    try:
        write_secret(path, f"0x{key.secret.hex()}\n".encode())
    except FileExistsError as error:
        raise BadAccountKey(f"There is an account at {path} already; it is left as it is.") from error
    return key
