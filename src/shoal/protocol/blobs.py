"""How immutable bytes are named, and asked for."""

from __future__ import annotations

from typing import Annotated, ClassVar

import msgspec
from msgspec import Meta

from shoal.identity import Hash, NodeId
from shoal.protocol.messages import Message

CHUNK_BYTES = 1 << 20
"""Bytes are verified in pieces of this size: a bad peer costs at most one piece."""
BLOB_MAX_BYTES = 1 << 44
Size = Annotated[int, Meta(ge=0, le=BLOB_MAX_BYTES)]


class Sealing(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """How the stored bytes were encrypted; the key is known to those who may read. Nothing writes it yet."""

    scheme: Annotated[str, Meta(max_length=32)]
    key_id: Annotated[bytes, Meta(max_length=64)]
    nonce: Annotated[bytes, Meta(max_length=32)] = b""


class BlobRef(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The name of immutable bytes. `hash` is BLAKE3 over the bytes as they are stored (encrypted ones if sealed).

    `chunks` is BLAKE3 over the concatenated BLAKE3 hashes of the pieces of CHUNK_BYTES; it is set for anything larger
    than one piece, so that each piece can be verified by itself while it comes from several peers.
    """

    hash: Hash
    size: Size
    media_type: Annotated[str, Meta(max_length=64)] = "application/octet-stream"
    chunks: Hash | None = None
    sealing: Sealing | None = None


class BlobRead(Message, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Request `blob.read`: the bytes [offset, offset + length) of a blob; they come back as a stream."""

    KIND: ClassVar[str] = "blob.read"
    MAX_BYTES: ClassVar[int] = 256

    hash: Hash
    offset: Size = 0
    length: Size


class BlobChunkList(Message, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Request `blob.chunks`: the concatenated hashes of a blob's pieces; they come back as a stream."""

    KIND: ClassVar[str] = "blob.chunks"
    MAX_BYTES: ClassVar[int] = 256

    hash: Hash


class BlobHolder(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Somebody who has said to hold a blob, and where they may be dialled."""

    node: NodeId
    addresses: Annotated[tuple[Annotated[str, Meta(max_length=128)], ...], Meta(max_length=8)] = ()
