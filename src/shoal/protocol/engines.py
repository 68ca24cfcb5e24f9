"""What is said about whole replicas in a server of their own beside a node: a continuation is asked for, and comes in
pieces.

The reply to EngineAsk is a stream on the link. So order and back-pressure are the link's, nobody but who asked gets a
piece, and who leaves the stream has cancelled it.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import msgspec
from msgspec import Meta

from shoal.identity import Hash
from shoal.protocol.messages import BadMessage, Message, decode, encode
from shoal.protocol.offers import ModelName
from shoal.protocol.serving import LAYERS_MAX, Choosing, Count, RingId, Session, TokenId

PROMPT_MAX = 1 << 20
"""Tokens."""
PROMPT_TEXT_MAX = 4 << 20
"""Characters."""
PIECE_TEXT_MAX = 16 * 1024
PIECE_TOKENS_MAX = 4096
_SIZE_BYTES = 4


class EngineSession(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a receipt is to name. An engine is a ring of one stage, which has all layers."""

    job: Hash
    ring: RingId
    session: Session
    layers: Annotated[int, Meta(ge=1, le=LAYERS_MAX)]
    positions: Annotated[int, Meta(ge=1, le=PROMPT_MAX)]
    """Tokens to go on from, as the gateway counts them: a text does not say."""


class EngineAsk(Message, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Request `engine.generate`, gateway to node: go on from here. The reply is a stream of EnginePiece."""

    KIND: ClassVar[str] = "engine.generate"
    MAX_BYTES: ClassVar[int] = 6 << 20

    model: ModelName
    tokens: Annotated[tuple[TokenId, ...], Meta(max_length=PROMPT_MAX)] = ()
    text: Annotated[str, Meta(max_length=PROMPT_TEXT_MAX)] = ""
    """In place of tokens, where the engine takes text alone."""
    tokens_max: Annotated[int, Meta(ge=1, le=1 << 24)]
    choosing: Choosing = Choosing()
    session: EngineSession | None = None
    """None where no receipt is wanted."""


class EngineEnd(Message, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Request `engine.end`, gateway to node: the stream of a session has ended, or was left. The reply is
    StageForgotten, with the receipt."""

    KIND: ClassVar[str] = "engine.end"
    MAX_BYTES: ClassVar[int] = 1024

    ring: RingId
    session: Session
    generated: Count
    """Tokens that arrived, as `EnginePiece.counts` has them."""


class EnginePiece(Message, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What followed. An empty one says that the node is there and its engine has nothing yet."""

    MAX_BYTES: ClassVar[int] = 128 * 1024

    text: Annotated[str, Meta(max_length=PIECE_TEXT_MAX)] = ""
    tokens: Annotated[tuple[TokenId, ...], Meta(max_length=PIECE_TOKENS_MAX)] = ()
    """Of an engine that says them."""
    finish: Literal["", "stop", "length"] = ""
    """Why it ended, in the last piece."""

    def counts(self, gives_tokens: bool) -> int:
        """How many tokens it is to node and gateway alike: of an engine that says no ids, each piece of text is one."""
        return len(self.tokens) if gives_tokens else int(bool(self.text))


def pack(piece: EnginePiece, version: int) -> bytes:
    """A piece as part of a stream: its size, big-endian, and the message."""
    body = encode(piece, version)
    return len(body).to_bytes(_SIZE_BYTES) + body


class PieceReader:
    """Pieces out of a stream that may be cut anywhere."""

    def __init__(self, version: int) -> None:
        self._version = version
        self._rest = b""

    def feed(self, data: bytes) -> list[EnginePiece]:
        """Raises BadMessage; what is announced to be too large is not waited for."""
        self._rest += data
        found = []
        while len(self._rest) >= _SIZE_BYTES:
            size = int.from_bytes(self._rest[:_SIZE_BYTES])
            if size > EnginePiece.MAX_BYTES:
                raise BadMessage(f"A piece of {size} bytes was refused: its limit is {EnginePiece.MAX_BYTES}.")
            if len(self._rest) < _SIZE_BYTES + size:
                break
            found.append(decode(EnginePiece, self._rest[_SIZE_BYTES : _SIZE_BYTES + size], self._version))
            self._rest = self._rest[_SIZE_BYTES + size :]
        return found
