"""What is said between an agent and its engine of a stage.

Positions travel as they are: token ids, and from the second stage on the hidden states of the stage before, as raw
little-endian float32 [positions, hidden].
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from shoal.engines.messages import Done, EngineMessage, Failed, Stop
from shoal.protocol.serving import (
    LAYERS_MAX,
    PIECE_MAX,
    Arithmetic,
    Choosing,
    Chosen,
    Count,
    Milliseconds,
    Part,
    Session,
    States,
    Tokens,
)

FilePath = Annotated[str, Meta(min_length=1, max_length=4096)]


class LoadStage(EngineMessage, frozen=True, kw_only=True):
    """Read the layers of a stage and try them. First command, once."""

    config: Annotated[str, Meta(max_length=64 * 1024)]
    files: Annotated[tuple[FilePath, ...], Meta(min_length=1, max_length=1024)]
    parts: Annotated[tuple[Part, ...], Meta(max_length=1024)] = ()
    """Which bytes of each file are there; without any, all. Nothing is read outside of them."""
    first: Annotated[int, Meta(ge=0, le=LAYERS_MAX)]
    stop: Annotated[int, Meta(ge=1, le=LAYERS_MAX)]
    memory_bytes: Count
    """For sessions."""
    device: Annotated[str, Meta(max_length=32)] = "cpu"
    threads: Annotated[int, Meta(ge=1, le=4096)] = 1
    speed_limit: Annotated[float, Meta(gt=0, le=1)] = 1.0


class Advance(EngineMessage, frozen=True, kw_only=True):
    """Take positions of a session through the layers. `states` are for any but the first stage. In the last stage the
    tokens that follow the last `choose` of the positions are chosen, or their final states given."""

    session: Session
    start: Count
    tokens: Tokens
    states: States = b""
    choose: Annotated[int, Meta(ge=0, le=PIECE_MAX)] = 0
    states_wanted: bool = False
    sampling: Choosing = Choosing()
    source: Session | None = None
    """Of a session that begins: the one of which it takes over the positions before `start`."""


class CloseSession(EngineMessage, frozen=True, kw_only=True):
    """Forget a session, also one that is not known. With `keep`, only when its memory is needed."""

    session: Session
    keep: bool = False


Command = LoadStage | Advance | CloseSession | Stop


class StageLoaded(EngineMessage, frozen=True, kw_only=True):
    arithmetic: Arithmetic
    layer_ms: float
    """A decode step of one position through one layer, measured with the speed limit in force."""
    last_ms: float
    """The same through final norm and head; 0 in any but the last stage."""
    weights_bytes: Count


class Advanced(EngineMessage, frozen=True, kw_only=True):
    """Hidden states for the next stage, or what was wanted of the last one."""

    states: States = b""
    chosen: Annotated[tuple[Chosen, ...], Meta(max_length=PIECE_MAX)] = ()
    computed_ms: Milliseconds = 0.0
    """What the step took in which it was; of a ring, those of all its stages."""


Reply = Done | StageLoaded | Advanced | Failed


class Asked(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    number: Count
    command: Command


class Answered(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    number: Count
    reply: Reply
