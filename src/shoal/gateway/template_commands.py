"""What is said between the gateway and the process in which a model's chat template runs."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from shoal.engines.messages import FRAME_MAX_BYTES, Done, EngineMessage, Failed, Stop

PROMPT_MAX_BYTES = FRAME_MAX_BYTES - 1024
"""Of UTF-8; a request's body is half as long."""
TEMPLATE_MAX_BYTES = 256 * 1024

Number = Annotated[int, Meta(ge=0)]


class LoadTemplate(EngineMessage, frozen=True, kw_only=True):
    """Read the template. First command, once."""

    source: Annotated[str, Meta(max_length=TEMPLATE_MAX_BYTES)]
    special: dict[str, str]
    """Special tokens by the names that templates have for them, as `bos_token`."""


class TemplateMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of a conversation, as templates know it."""

    role: str
    content: str


class RenderTemplate(EngineMessage, frozen=True, kw_only=True):
    """Make a prompt of a conversation whose next message is the model's."""

    messages: list[TemplateMessage]
    now_ms: Number = 0
    """Some templates tell the model what day it is."""


Command = LoadTemplate | RenderTemplate | Stop


class Rendered(EngineMessage, frozen=True, kw_only=True):
    text: Annotated[str, Meta(max_length=PROMPT_MAX_BYTES)]


Reply = Done | Rendered | Failed


class Asked(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    number: Number
    command: Command


class Answered(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    number: Number
    reply: Reply
