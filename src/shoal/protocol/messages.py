"""What every message is: strict, bounded, versioned.

A `Message` is a body that travels: a request or reply on an authenticated link, or (as a `Record`) the body of a signed
envelope that anyone may carry. Its `MAX_BYTES` is checked before a byte of it is parsed, and a field that a version
does not know is refused.

**Versions.** A network speaks protocol `N` and still understands `N-1`. A field added in `N` is named in the type's
`SINCE` map and has a default; as defaults are never written, a message that leaves it alone is byte for byte one of
`N-1`. So two neighbours talk in the lower version of the two, and `encode` refuses to say in `N-1` what only `N` can.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, ClassVar, TypeVar

import msgspec

from shoal.errors import BadRecord
from shoal.identity import Envelope, KeyPair, record_id, seal

PROTOCOL_VERSION = 1
"""The newest version this code speaks. It understands this and the one before."""
OLDEST_VERSION = 1
DEFAULT_NETWORK = "shoal"


class BadMessage(BadRecord):
    """A message is oversized, malformed, or has a field that its version does not know."""

    code = "SH-210"


class UnknownKind(BadRecord):
    """A record is of a kind that its receiver cannot act on."""

    code = "SH-211"


class VersionMismatch(BadRecord):
    """Two sides have no protocol version in common, or a message says what the agreed version cannot."""

    code = "SH-212"


class Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A body that travels on a link."""

    KIND: ClassVar[str]
    """Of requests and records; answers have none."""
    MAX_BYTES: ClassVar[int] = 64 * 1024
    SINCE: ClassVar[Mapping[str, int]] = {}


class Record(Message, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A body that travels signed, in an Envelope of the same kind."""


M = TypeVar("M", bound=Message)
R = TypeVar("R", bound=Record)


@cache
def _encoder() -> msgspec.msgpack.Encoder:
    return msgspec.msgpack.Encoder()


@cache
def _decoder(kind: type[Any]) -> msgspec.msgpack.Decoder[Any]:
    return msgspec.msgpack.Decoder(kind)


def encode(message: Message, version: int = PROTOCOL_VERSION) -> bytes:
    """Message -> bytes. Raises VersionMismatch for a field that `version` does not have, BadMessage when too large."""
    _refuse_newer_fields(message, version)
    body = _encoder().encode(message)
    if len(body) > message.MAX_BYTES:
        raise BadMessage(f"{type(message).__name__} of {len(body)} bytes exceeds its limit of {message.MAX_BYTES}.")
    return body


def decode(kind: type[M], body: bytes, version: int = PROTOCOL_VERSION) -> M:
    """Bytes -> message. Raises BadMessage; oversized bytes are refused unparsed."""
    if len(body) > kind.MAX_BYTES:
        raise BadMessage(f"{kind.__name__} of {len(body)} bytes was refused: its limit is {kind.MAX_BYTES}.")
    try:
        message: M = _decoder(kind).decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadMessage(f"Bytes that should be {kind.__name__} are not: {error}.") from error
    _refuse_newer_fields(message, version)
    return message


def _refuse_newer_fields(message: Message, version: int) -> None:
    if not message.SINCE:
        return
    defaults = {field.name: field.default for field in msgspec.structs.fields(message)}
    for field, since in message.SINCE.items():
        if since > version and getattr(message, field) != defaults[field]:
            raise VersionMismatch(
                f"{type(message).__name__}.{field} exists since protocol {since}; this side speaks {version}."
            )


def common_version(ours: tuple[int, int], theirs: tuple[int, int]) -> int:
    """The newest version in both (oldest, newest) ranges. Raises VersionMismatch."""
    newest = min(ours[1], theirs[1])
    if newest < max(ours[0], theirs[0]):
        raise VersionMismatch(
            f"This side speaks protocol {ours[0]} to {ours[1]}, the other {theirs[0]} to {theirs[1]}; update the older."
        )
    return newest


def sign(key: KeyPair, record: Record, network: str = DEFAULT_NETWORK, version: int = PROTOCOL_VERSION) -> Envelope:
    """Put a record into an envelope signed by `key`."""
    return seal(key, network, record.KIND, version, encode(record, version))


def record_id_of(
    record: Record, signer: bytes, network: str = DEFAULT_NETWORK, version: int = PROTOCOL_VERSION
) -> bytes:
    """The id that `record` has once `signer` has signed it with the same arguments; so rules can chain records
    without holding a key."""
    return record_id(network, record.KIND, version, signer, encode(record, version))


def open_record(envelope: Envelope, kind: type[R], network: str = DEFAULT_NETWORK) -> R:
    """Verify an envelope and decode its body as `kind`.

    Raises UnknownKind for another kind, VersionMismatch for an unknown version or another network, BadSignature,
    BadMessage. The signature is checked before the body is parsed.
    """
    if envelope.kind != kind.KIND:
        raise UnknownKind(f"A {kind.KIND} record was expected, a {envelope.kind!r} record came.")
    if envelope.network != network:
        raise VersionMismatch(f"A record of network {envelope.network!r} was refused: this is {network!r}.")
    if envelope.version > PROTOCOL_VERSION:
        raise VersionMismatch(
            f"A {envelope.kind} record of protocol {envelope.version} was refused: this side speaks "
            f"{OLDEST_VERSION} to {PROTOCOL_VERSION}; update it."
        )
    if len(envelope.body) > kind.MAX_BYTES:
        raise BadMessage(f"A {kind.KIND} record of {len(envelope.body)} bytes was refused: limit {kind.MAX_BYTES}.")
    envelope.verify()
    return decode(kind, envelope.body, envelope.version)
