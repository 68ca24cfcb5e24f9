"""Frames: what a link's bytes look like inside the encryption.

A frame is a header (type: 1 byte, stream: 8 bytes, payload length: 4 bytes, most significant first) and a payload.

    type     payload                        sent by    says
    OPEN     opening, start of the body     caller     a request begins; streams of the dialling side are odd
    BODY     bytes                          caller     more of the request's body
    CREDIT   4 bytes                        caller     so many more reply bytes may be sent
    CANCEL   nothing                        caller     the reply is no longer wanted; still ends with END or REFUSE
    DATA     bytes                          answerer   a part of the reply
    END      bytes                          answerer   the last part of the reply
    REFUSE   code, sentence                 answerer   there is no reply, and why
    PING     8 bytes                        either     are you there; stream 0
    PONG     8 bytes                        either     the same 8 bytes back; stream 0
    RETIRE   nothing                        either     the sender opens no more streams on this connection; stream 0
    CLOSE    sentence                       either     the connection ends now, and why; stream 0

A stream is one request. Every OPEN is answered by exactly one END or REFUSE, and only then its place is free again,
so both sides always agree on how many are open.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

from shoal.errors import LinkError

FRAME_MAX_BYTES = 256 * 1024
"""No payload is larger."""
SMALL_BYTES = 16 * 1024
"""Bodies and replies up to this travel in one frame, ahead of bulk."""
KIND_MAX_BYTES = 64
REASON_MAX_BYTES = 600
CODE_MAX_BYTES = 16

HEADER = struct.Struct(">BQI")
CREDIT = struct.Struct(">I")
_OPENING = struct.Struct(">BQII")


class FrameType(IntEnum):
    OPEN = 1
    BODY = 2
    CREDIT = 3
    CANCEL = 4
    DATA = 5
    END = 6
    REFUSE = 7
    PING = 8
    PONG = 9
    RETIRE = 10
    CLOSE = 11


PAYLOAD_LIMITS: dict[int, tuple[int, int]] = {
    FrameType.OPEN: (_OPENING.size + 1, _OPENING.size + KIND_MAX_BYTES + SMALL_BYTES),
    FrameType.BODY: (1, FRAME_MAX_BYTES),
    FrameType.CREDIT: (4, 4),
    FrameType.CANCEL: (0, 0),
    FrameType.DATA: (1, FRAME_MAX_BYTES),
    FrameType.END: (0, FRAME_MAX_BYTES),
    FrameType.REFUSE: (1, 1 + CODE_MAX_BYTES + REASON_MAX_BYTES),
    FrameType.PING: (8, 8),
    FrameType.PONG: (8, 8),
    FrameType.RETIRE: (0, 0),
    FrameType.CLOSE: (0, REASON_MAX_BYTES),
}
"""Smallest and largest payload of each type; anything else, and any other type, breaks the framing."""

CONNECTION_FRAMES = frozenset({FrameType.PING, FrameType.PONG, FrameType.RETIRE, FrameType.CLOSE})


class BrokenFraming(LinkError):
    """A peer sent what no correct peer sends: unknown or oversized frames, data beyond its credit, too many streams."""

    code = "SH-310"


@dataclass(frozen=True)
class Opening:
    """How a request begins."""

    kind: str
    reply_max_bytes: int
    credit_bytes: int
    """Reply bytes that may be sent before the first CREDIT."""
    body_bytes: int


def frame(kind: FrameType, stream: int, payload: bytes = b"") -> bytes:
    return HEADER.pack(kind, stream, len(payload)) + payload


def check_header(kind: int, stream: int, length: int) -> None:
    """Raises BrokenFraming for a header that no correct peer sends; nothing is read into memory before this."""
    limits = PAYLOAD_LIMITS.get(kind)
    if limits is None:
        raise BrokenFraming(f"sent a frame of the unknown type {kind}")
    if not limits[0] <= length <= limits[1]:
        raise BrokenFraming(
            f"sent a {FrameType(kind).name} frame of {length} bytes; {limits[0]} to {limits[1]} are allowed"
        )
    if (kind in CONNECTION_FRAMES) != (stream == 0):
        raise BrokenFraming(f"sent a {FrameType(kind).name} frame on stream {stream}")


def pack_opening(opening: Opening, start: bytes) -> bytes:
    kind = opening.kind.encode()
    return _OPENING.pack(len(kind), opening.reply_max_bytes, opening.credit_bytes, opening.body_bytes) + kind + start


def unpack_opening(payload: bytes) -> tuple[Opening, bytes]:
    """Raises BrokenFraming."""
    kind_bytes, reply_max, credit, body_bytes = _OPENING.unpack_from(payload)
    start = _OPENING.size + kind_bytes
    try:
        kind = payload[_OPENING.size : start].decode("ascii")
    except UnicodeDecodeError as error:
        raise BrokenFraming("opened a stream of a kind that is not ASCII") from error
    first = payload[start:]
    if not 1 <= kind_bytes <= KIND_MAX_BYTES or len(kind) != kind_bytes or not kind.isprintable():
        raise BrokenFraming("opened a stream whose kind is empty, too long or not printable")
    if len(first) != min(body_bytes, SMALL_BYTES):
        raise BrokenFraming(f"opened a stream with {len(first)} of {body_bytes} body bytes")
    return Opening(kind, reply_max, credit, body_bytes), first


def pack_refusal(code: str, sentence: str) -> bytes:
    name = code.encode("ascii", "replace")[:CODE_MAX_BYTES]
    return bytes((len(name),)) + name + clip(sentence)


def unpack_refusal(payload: bytes) -> tuple[str, str]:
    """The peer's code and sentence, with everything taken out that a terminal might act on."""
    size = min(payload[0], CODE_MAX_BYTES)
    return printable(payload[1 : 1 + size]) or "SH-000", printable(payload[1 + size :])


def clip(sentence: str) -> bytes:
    """UTF-8, at most REASON_MAX_BYTES, never cut inside a character."""
    return sentence.encode("utf-8", "replace")[:REASON_MAX_BYTES].decode("utf-8", "ignore").encode()


def printable(text: bytes) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in text.decode("utf-8", "replace"))


_PARTS_MAX = 64
"""Pieces of one frame that are kept apart; a peer that sends it byte by byte costs no more than its size."""


class FrameReader:
    """Cuts a stream of bytes into frames; each payload is copied once."""

    def __init__(self) -> None:
        self._rest = b""
        self._parts: list[memoryview] = []
        self._missing = 0
        self._kind = 0
        self._stream = 0

    def feed(self, data: bytes) -> list[tuple[int, int, bytes]]:
        """The frames that `data` completes: (type, stream, payload). Raises BrokenFraming."""
        if self._missing:
            if len(data) < self._missing:
                self._parts.append(memoryview(data))
                if len(self._parts) > _PARTS_MAX:
                    self._parts = [memoryview(b"".join(self._parts))]
                self._missing -= len(data)
                return []
            position = self._missing
            self._parts.append(memoryview(data)[:position])
            self._missing = 0
            frames = [(self._kind, self._stream, b"".join(self._parts))]
            self._parts.clear()
        else:
            frames = []
            position = 0
            if self._rest:
                data = self._rest + data
                self._rest = b""
        end = len(data)
        while end - position >= HEADER.size:
            kind, stream, length = HEADER.unpack_from(data, position)
            check_header(kind, stream, length)
            position += HEADER.size
            if end - position < length:
                self._kind, self._stream = kind, stream
                self._parts.append(memoryview(data)[position:])
                self._missing = length - (end - position)
                return frames
            frames.append((kind, stream, data[position : position + length]))
            position += length
        self._rest = data[position:]
        return frames
