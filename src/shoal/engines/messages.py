"""What every engine is told and answers, on its pipes: strict, bounded msgspec messages.

A frame is a 4-byte big-endian length and that many bytes of msgpack.
"""

from __future__ import annotations

import struct
from typing import Annotated

import msgspec
from msgspec import Meta

FRAME_MAX_BYTES = 4 << 20
FRAME = struct.Struct(">I")
SENTENCE_MAX = 400


class EngineMessage(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True, tag=True
):
    """Tagged with the name of its class."""


class Stop(EngineMessage, frozen=True, kw_only=True):
    """Finish and exit."""


class Done(EngineMessage, frozen=True, kw_only=True):
    pass


class Failed(EngineMessage, frozen=True, kw_only=True):
    """The command was refused or could not be done; the engine goes on."""

    code: Annotated[str, Meta(max_length=16)]
    sentence: Annotated[str, Meta(max_length=SENTENCE_MAX)]
