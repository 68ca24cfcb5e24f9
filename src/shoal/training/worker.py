"""The child process: `python -m shoal.training.worker PARENT_PID`, or forked (`template`).

One thread: a round gives way between its steps, and only there, so that applying a Commit or cancelling never touches
numbers that a step is using.
"""

from __future__ import annotations

import asyncio
import gc
import sys
from typing import assert_never

from shoal.engines import Done, Stop, worker
from shoal.engines.failures import FAILURES, failed
from shoal.training.commands import (
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
from shoal.training.ranks import RankLost
from shoal.world import Clock, SystemClock
from shoal.world.processes import stay_within_memory


class Worker:
    def __init__(self, pipe: worker.Pipe, clock: Clock) -> None:
        self._pipe, self._clock = pipe, clock
        self._engine: LanguageEngine | None = None
        self._round: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Until Stop or the end of stdin. Raises whatever a round raises that is no answer: then this process is of no
        more use."""
        try:
            async with asyncio.TaskGroup() as rounds:
                while (asked := await self._pipe.next()) is not None:
                    if isinstance(asked.command, RunRound) and not self._computing:
                        self._round = rounds.create_task(self._run(asked.number, asked.command))
                        await asyncio.sleep(0)  # a task that is cancelled before it begins would never answer
                        continue
                    await self._pipe.send(asked.number, await self._answer(asked))
                    if isinstance(asked.command, Stop):
                        break
                await self._cancel_round()
        finally:
            if self._engine is not None:
                self._engine.close()

    @property
    def _computing(self) -> bool:
        return self._round is not None and not self._round.done()

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
        await self._pipe.send(number, reply)

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


def work(parent: int) -> None:
    """Be the engine of the process `parent`, until the end."""
    worker.work(parent, Asked, lambda pipe: Worker(pipe, SystemClock()).run())


if __name__ == "__main__":
    work(int(sys.argv[1]))
