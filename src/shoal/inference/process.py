"""The engine of a stage, seen from the agent."""

from __future__ import annotations

from typing import ClassVar

from shoal.engines import ChildEngine, Done
from shoal.inference.commands import Advance, Advanced, Answered, CloseSession, LoadStage, StageLoaded


class StageProcess(ChildEngine):
    """One child process with one stage in it."""

    ANSWERED: ClassVar[type] = Answered
    WORKER: ClassVar[str] = "shoal.inference.worker"

    async def load(self, command: LoadStage) -> StageLoaded:
        return await self._ask(command, StageLoaded)

    async def advance(self, command: Advance) -> Advanced:
        return await self._ask(command, Advanced)

    async def close_session(self, session: int, *, keep: bool = False) -> None:
        await self._ask(CloseSession(session=session, keep=keep), Done)
