"""The envelope in which every signed record travels. Its form never changes.

What is signed is, in this order: `shoal/envelope/1` and a zero byte; the network's name and the record's kind, each
with one byte of length before it; the version as two bytes, most significant first; the signer's 32 bytes; the body.
The domain string in front keeps a signature made for one purpose, network, kind or version from being good for another.
"""

from __future__ import annotations

from functools import cached_property
from typing import Annotated

import msgspec
from msgspec import Meta

from shoal.errors import BadRecord
from shoal.identity.hashing import blake3_hash
from shoal.identity.keys import KeyPair, NodeId, short_id, verify

_DOMAIN = b"shoal/envelope/1\x00"
ENVELOPE_OVERHEAD_BYTES = 256
"""An encoded envelope is at most this much larger than its body."""


class BadEnvelope(BadRecord):
    """Bytes are not an envelope, or larger than anything that may stand here."""

    code = "SH-201"


class BadSignature(BadRecord):
    """A record was not signed by the one it names."""

    code = "SH-202"


class Envelope(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, dict=True):
    """A signed record as it travels: exact body bytes, and who vouches for them in which domain."""

    network: Annotated[str, Meta(min_length=1, max_length=32)]
    kind: Annotated[str, Meta(min_length=1, max_length=32)]
    version: Annotated[int, Meta(ge=1, le=65535)]
    signer: NodeId
    body: bytes
    signature: Annotated[bytes, Meta(min_length=64, max_length=64)]

    @cached_property
    def record_id(self) -> bytes:
        """BLAKE3 of what was signed: the record's name. The signature is not part of it."""
        return record_id(self.network, self.kind, self.version, self.signer, self.body)

    def verify(self) -> None:
        """Raises BadSignature unless `signer` signed exactly this."""
        if not verify(self.signer, self.signature,
                      _signed_bytes(self.network, self.kind, self.version, self.signer, self.body)):  # fmt: skip
            raise BadSignature(f"A {self.kind} record does not carry the signature of {short_id(self.signer)}.")

    def to_bytes(self) -> bytes:
        return _encoder.encode(self)

    @classmethod
    def from_bytes(cls, data: bytes, max_body_bytes: int) -> Envelope:
        """Parse without verifying. Raises BadEnvelope; oversized bytes are refused before they are parsed."""
        if len(data) > max_body_bytes + ENVELOPE_OVERHEAD_BYTES:
            raise BadEnvelope(f"A record of {len(data)} bytes was refused: at most {max_body_bytes} may stand here.")
        try:
            return _decoder.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise BadEnvelope(f"Bytes that should be a signed record are not one: {error}.") from error


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Envelope)


def record_id(network: str, kind: str, version: int, signer: bytes, body: bytes) -> bytes:
    """The id that an Envelope of exactly this has, whether or not it has been signed yet."""
    return blake3_hash(_signed_bytes(network, kind, version, signer, body))


def seal(key: KeyPair, network: str, kind: str, version: int, body: bytes) -> Envelope:
    """Sign `body` as a `kind` record of `version` on `network`."""
    signature = key.sign(_signed_bytes(network, kind, version, key.node_id, body))
    return Envelope(network, kind, version, key.node_id, body, signature)


def _signed_bytes(network: str, kind: str, version: int, signer: bytes, body: bytes) -> bytes:
    name, what = network.encode(), kind.encode()
    return b"".join(
        (_DOMAIN, bytes((len(name),)), name, bytes((len(what),)), what, version.to_bytes(2, "big"), signer, body)
    )
