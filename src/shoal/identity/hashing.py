"""BLAKE3, 32 bytes, everywhere."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

from blake3 import blake3
from msgspec import Meta
from typing_extensions import Buffer

from shoal.errors import BadInput

HASH_BYTES = 32

Hash = Annotated[bytes, Meta(min_length=HASH_BYTES, max_length=HASH_BYTES)]


def blake3_hash(data: Buffer) -> bytes:
    """BLAKE3 of `data`, 32 bytes. Above 1 MiB all cores are used; the result is the same."""
    view = memoryview(data)
    return blake3(view, max_threads=blake3.AUTO if view.nbytes > 1 << 20 else 1).digest()


def hash_of_parts(domain: str, parts: Iterable[bytes]) -> bytes:
    """BLAKE3 over length-prefixed parts in a domain of their own, so that no two lists of parts collide."""
    hasher = blake3(derive_key_context=f"shoal {domain}")
    for part in parts:
        hasher.update(len(part).to_bytes(8, "big"))
        hasher.update(part)
    return hasher.digest()


def hash_from_hex(text: str) -> bytes:
    """64 hexadecimal digits -> 32 bytes. Raises BadInput."""
    try:
        value = bytes.fromhex(text)
    except ValueError:
        value = b""
    if len(value) != HASH_BYTES:
        raise BadInput(f"{text!r} is not a hash: 64 hexadecimal digits are expected.")
    return value
