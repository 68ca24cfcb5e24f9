"""The engine's side of the pipes: commands come on stdin, replies go out on what was stdout, and anything that a
library prints goes to stderr. It ends when told to, when stdin closes, or when its parent dies."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from shoal.engines.lifetime import die_with_parent
from shoal.engines.messages import FRAME, FRAME_MAX_BYTES

_encoder = msgspec.msgpack.Encoder()


class Answered(msgspec.Struct, frozen=True):
    number: int
    reply: Any


class Pipe:
    """Commands and replies of one engine. `asked`: what comes in a frame, a strict type with `number` and `command`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, asked: type) -> None:
        self._reader, self._writer = reader, writer
        self._decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(asked)

    async def next(self) -> Any | None:
        """The next command; None when there will be no more."""
        try:
            (length,) = FRAME.unpack(await self._reader.readexactly(FRAME.size))
            if length > FRAME_MAX_BYTES:
                raise msgspec.ValidationError(f"A command of {length} bytes exceeds the limit of {FRAME_MAX_BYTES}.")
            return self._decoder.decode(await self._reader.readexactly(length))
        except asyncio.IncompleteReadError:
            return None

    async def send(self, number: int, reply: msgspec.Struct) -> None:
        body = _encoder.encode(Answered(number, reply))
        self._writer.write(FRAME.pack(len(body)) + body)
        await self._writer.drain()


def work(parent: int, asked: type, run: Callable[[Pipe], Awaitable[None]]) -> None:
    """Be an engine of the process `parent`: `run` over its pipe, until the end."""
    die_with_parent(parent)
    replies = os.dup(1)
    os.dup2(2, 1)
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING)
    try:
        asyncio.run(_serve(replies, asked, run))
    except ExceptionGroup as group:
        raise group.exceptions[0] from None  # so that the last line on stderr, which the parent reports, says it


async def _serve(replies: int, asked: type, run: Callable[[Pipe], Awaitable[None]]) -> None:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=FRAME_MAX_BYTES + FRAME.size)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    transport, protocol = await loop.connect_write_pipe(asyncio.streams.FlowControlMixin, os.fdopen(replies, "wb"))
    writer = asyncio.StreamWriter(transport, protocol, None, loop)
    await run(Pipe(reader, writer, asked))
    writer.close()
