"""A question over a link, and its answer, as messages."""

from __future__ import annotations

from typing import TypeVar

from shoal.protocol.messages import Message, decode, encode
from shoal.world.network import Link

M = TypeVar("M", bound=Message)


async def ask(link: Link, question: Message, answer: type[M], deadline_s: float) -> M:
    """Raises LinkError, and BadRecord where the answer is none."""
    body = await link.request(
        question.KIND, encode(question, link.version), deadline_s=deadline_s, reply_max_bytes=answer.MAX_BYTES
    )
    return decode(answer, body, link.version)
