"""The child process: `python -m shoal.training.worker PARENT_PID`, or forked (`template`).

Commands come on stdin, replies go out on what was stdout; anything that a library prints goes to stderr. One thread:
a round gives way between its steps, and only there, so that applying a Commit or cancelling never touches numbers that
a step is using. It ends when told to, when stdin closes, or when its parent dies.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import sys
from typing import assert_never

import msgspec

from shoal.engines import FRAME, FRAME_MAX_BYTES, Done, Stop, die_with_parent
from shoal.training.commands import (
    Answered,
    ApplyCommit,
    Asked,
    CancelRound,
    Evaluate,
    ExportCheckpoint,
    Generate,
    LoadPrivate,
    LoadState,
    Prepare,
    Reply,
    RollBack,
    RoundCancelled,
    RunRound,
    WritePrivate,
    WriteState,
)
from shoal.training.engine import LanguageEngine
from shoal.training.member import OutOfTurn
from shoal.training.member_engine import FAILURES, failed
from shoal.training.ranks import RankLost
from shoal.world import Clock, SystemClock
from shoal.world.processes import stay_within_memory

_decoder = msgspec.msgpack.Decoder(Asked)
_encoder = msgspec.msgpack.Encoder()


class Worker:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, clock: Clock) -> None:
        self._reader, self._writer, self._clock = reader, writer, clock
        self._engine: LanguageEngine | None = None
        self._round: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Until Stop or the end of stdin. Raises whatever a round raises that is no answer: then this process is of no
        more use."""
        try:
            async with asyncio.TaskGroup() as rounds:
                while (asked := await self._next()) is not None:
                    if isinstance(asked.command, RunRound) and not self._computing:
                        self._round = rounds.create_task(self._run(asked.number, asked.command))
                        await asyncio.sleep(0)  # a task that is cancelled before it begins would never answer
                        continue
                    await self._send(asked.number, await self._answer(asked))
                    if isinstance(asked.command, Stop):
                        break
                await self._cancel_round()
        finally:
            if self._engine is not None:
                self._engine.close()

    @property
    def _computing(self) -> bool:
        return self._round is not None and not self._round.done()

    async def _next(self) -> Asked | None:
        try:
            (length,) = FRAME.unpack(await self._reader.readexactly(FRAME.size))
            if length > FRAME_MAX_BYTES:
                raise msgspec.ValidationError(f"A command of {length} bytes exceeds the limit of {FRAME_MAX_BYTES}.")
            return _decoder.decode(await self._reader.readexactly(length))
        except asyncio.IncompleteReadError:
            return None

    async def _send(self, number: int, reply: Reply) -> None:
        body = _encoder.encode(Answered(number, reply))
        self._writer.write(FRAME.pack(len(body)) + body)
        await self._writer.drain()

    async def _run(self, number: int, command: RunRound) -> None:
        reply: Reply
        try:
            reply = await self._prepared_engine().run_round(command)
        except asyncio.CancelledError:
            reply = RoundCancelled(round=command.round)
        except RankLost:
            raise
        except FAILURES as error:
            reply = failed(error)
        await self._send(number, reply)

    async def _cancel_round(self) -> None:
        if self._round is not None:
            self._round.cancel()
            await asyncio.wait([self._round])
            self._round = None

    def _prepared_engine(self) -> LanguageEngine:
        if self._engine is None:
            raise OutOfTurn("The engine was asked to work before it was prepared.")
        return self._engine

    async def _answer(self, asked: Asked) -> Reply:
        try:
            return await self._do(asked)
        except RankLost:
            raise
        except FAILURES as error:
            return failed(error)

    async def _do(self, asked: Asked) -> Reply:
        command = asked.command
        match command:
            case Prepare():
                if self._engine is not None:
                    raise OutOfTurn("The engine is prepared already; another job needs another engine.")
                if command.device == "cpu":
                    stay_within_memory()
                self._engine = LanguageEngine(command, self._clock)
                gc.freeze()  # a model's libraries are a million objects that no collection need look at again
                return await self._engine.prepared(command.measure)
            case Stop():
                return Done()
            case CancelRound():
                await self._cancel_round()
                return Done()
            case RollBack():
                await self._cancel_round()
                return self._prepared_engine().roll_back(command.private)
            case LoadPrivate():
                return self._prepared_engine().load_private(command.path)
            case WritePrivate():
                return self._prepared_engine().write_private(command.path)
            case ApplyCommit():
                return self._prepared_engine().apply_commit(command)
            case LoadState():
                return self._prepared_engine().load_state(command.path)
            case WriteState():
                return self._prepared_engine().write_state(command.state, command.path)
            case Evaluate():
                return self._prepared_engine().evaluate(command)
            case Generate():
                return self._prepared_engine().generate(command)
            case ExportCheckpoint():
                self._prepared_engine().export_checkpoint(command)
                return Done()
            case RunRound():
                raise OutOfTurn("A round is running already; cancel it or wait for it.")
            case _:
                assert_never(command)


async def serve(replies: int) -> None:
    """Answer commands from stdin on file descriptor `replies`."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=FRAME_MAX_BYTES + FRAME.size)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    transport, protocol = await loop.connect_write_pipe(asyncio.streams.FlowControlMixin, os.fdopen(replies, "wb"))
    writer = asyncio.StreamWriter(transport, protocol, None, loop)
    await Worker(reader, writer, SystemClock()).run()
    writer.close()


def work(parent: int) -> None:
    """Be the engine of the process `parent`, until the end."""
    die_with_parent(parent)
    replies = os.dup(1)
    os.dup2(2, 1)
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING)
    try:
        asyncio.run(serve(replies))
    except ExceptionGroup as group:
        raise group.exceptions[0] from None  # so that the last line on stderr, which the parent reports, says it


if __name__ == "__main__":
    work(int(sys.argv[1]))
