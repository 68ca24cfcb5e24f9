"""Typed data as wallets and contracts sign it (EIP-712), as far as Shoal needs it.

What is signed is 0x19 0x01, the domain's separator and the hash of a struct. The domain says for which ledger a
signature is good; a struct is the hash of its type and of its fields, 32 bytes each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from shoal.identity.accounts import ADDRESS_BYTES, keccak_256

WORD = 32


@dataclass(frozen=True)
class StructType:
    """The type of a struct: its name and fields, as (type, name)."""

    name: str
    fields: tuple[tuple[str, str], ...]

    @cached_property
    def hash(self) -> bytes:
        return keccak_256(f"{self.name}({','.join(f'{kind} {name}' for kind, name in self.fields)})".encode())

    def hash_of(self, values: Sequence[int | bytes | str]) -> bytes:
        """Raises ValueError for a value that does not fit its field."""
        words = [word(kind, name, value) for (kind, name), value in zip(self.fields, values, strict=True)]
        return keccak_256(self.hash + b"".join(words))


def word(kind: str, name: str, value: int | bytes | str) -> bytes:
    """A value of an atomic type, a string or bytes, in 32 bytes."""
    if kind == "string" and isinstance(value, str):
        return keccak_256(value.encode())
    if kind == "bytes" and isinstance(value, bytes):
        return keccak_256(value)
    if kind == "address" and isinstance(value, bytes) and len(value) == ADDRESS_BYTES:
        return value.rjust(WORD, b"\0")
    if kind == "bytes32" and isinstance(value, bytes) and len(value) == WORD:
        return value
    if kind == "uint256" and isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 256:
        return value.to_bytes(WORD)
    raise ValueError(f"{name} is no {kind}: {value!r}")


@dataclass(frozen=True)
class Domain:
    """For what a signature is good. Which fields there are is a part of the type."""

    name: str
    version: str
    chain_id: int | None = None
    contract: bytes | None = None
    salt: bytes | None = None

    @cached_property
    def separator(self) -> bytes:
        given = [
            (kind, name, value)
            for kind, name, value in (
                ("string", "name", self.name),
                ("string", "version", self.version),
                ("uint256", "chainId", self.chain_id),
                ("address", "verifyingContract", self.contract),
                ("bytes32", "salt", self.salt),
            )
            if value is not None
        ]
        kind = StructType("EIP712Domain", tuple((kind, name) for kind, name, _ in given))
        return kind.hash_of([value for _, _, value in given])

    def digest(self, struct_hash: bytes) -> bytes:
        """What is signed."""
        return keccak_256(b"\x19\x01" + self.separator + struct_hash)
