"""The engine of training, seen from the agent."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from shoal.engines import ChildEngine, Done
from shoal.errors import EngineError
from shoal.training.commands import (
    Answered,
    ApplyCommit,
    CancelRound,
    Evaluate,
    Evaluated,
    ExportCheckpoint,
    Generate,
    Generated,
    LoadPrivate,
    LoadState,
    Prepare,
    Prepared,
    PrivateNow,
    RollBack,
    RoundCancelled,
    RoundDone,
    RunRound,
    StateHeld,
    WritePrivate,
    WriteState,
)


class RoundCancelledError(EngineError):
    """The running round was cancelled or rolled back; the member is as before it."""

    code = "SH-522"


class EngineProcess(ChildEngine):
    """One child process with one member in it."""

    ANSWERED: ClassVar[type] = Answered
    WORKER: ClassVar[str] = "shoal.training.worker"

    async def prepare(self, command: Prepare) -> Prepared:
        return await self._ask(command, Prepared)

    async def run_round(self, command: RunRound) -> RoundDone:
        """Raises RoundCancelledError when `cancel_round` or `roll_back` came in between. Cancelling this call does not
        cancel the round."""
        reply = await self._reply_to(command)
        if isinstance(reply, RoundCancelled):
            raise RoundCancelledError(f"Round {command.round} of {self._name} was cancelled.")
        return self._expect(reply, RoundDone)

    async def cancel_round(self) -> None:
        await self._ask(CancelRound(), Done)

    async def roll_back(self, private: bytes) -> PrivateNow:
        return await self._ask(RollBack(private=private), PrivateNow)

    async def apply_commit(self, command: ApplyCommit) -> StateHeld:
        return await self._ask(command, StateHeld)

    async def load_private(self, path: Path | None) -> PrivateNow:
        return await self._ask(LoadPrivate(path=None if path is None else str(path)), PrivateNow)

    async def write_private(self, path: Path) -> PrivateNow:
        return await self._ask(WritePrivate(path=str(path)), PrivateNow)

    async def load_state(self, path: Path) -> StateHeld:
        return await self._ask(LoadState(path=str(path)), StateHeld)

    async def write_state(self, state: bytes, path: Path) -> StateHeld:
        return await self._ask(WriteState(state=state, path=str(path)), StateHeld)

    async def evaluate(self, command: Evaluate) -> Evaluated:
        return await self._ask(command, Evaluated)

    async def generate(self, command: Generate) -> Generated:
        return await self._ask(command, Generated)

    async def export_checkpoint(self, command: ExportCheckpoint) -> None:
        await self._ask(command, Done)
