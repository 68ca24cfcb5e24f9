"""The engine as a child process, seen from the agent: commands go in, replies come out, and when it dies the agent
lives and is told why."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from shoal.errors import EngineError
from shoal.training.commands import (
    ApplyCommit,
    Evaluate,
    Evaluated,
    ExportCheckpoint,
    Generate,
    Generated,
    Prepare,
    Prepared,
    PrivateNow,
    RoundDone,
    RunRound,
    StateHeld,
)


class EngineDied(EngineError):
    """The child process is gone: killed, crashed or out of memory."""

    code = "SH-520"


class EngineFailed(EngineError):
    """The engine refused a command or could not do it; it goes on. `cause_code` is the code of its own error."""

    code = "SH-521"

    def __init__(self, sentence: str, cause_code: str) -> None:
        super().__init__(sentence)
        self.cause_code = cause_code


class RoundCancelledError(EngineError):
    """The running round was cancelled or rolled back; the member is as before it."""

    code = "SH-522"


class EngineProcess:
    """One child process with one member in it. All methods raise EngineDied and EngineFailed."""

    @classmethod
    async def start(cls, name: str, *, threads: int = 1, log: Callable[[str], None] | None = None) -> EngineProcess:
        """Start `python -m shoal.training.worker`. `name` is who it computes for, for sentences; `log` is given each
        line that it writes to stderr."""
        raise NotImplementedError

    @property
    def pid(self) -> int:
        raise NotImplementedError

    @property
    def died(self) -> asyncio.Future[EngineDied]:
        """Done when the process has ended without being told to."""
        raise NotImplementedError

    async def prepare(self, command: Prepare) -> Prepared:
        raise NotImplementedError

    async def run_round(self, command: RunRound) -> RoundDone:
        """Raises RoundCancelledError when `cancel_round` or `roll_back` came in between."""
        raise NotImplementedError

    async def cancel_round(self) -> None:
        raise NotImplementedError

    async def roll_back(self, private: bytes) -> PrivateNow:
        raise NotImplementedError

    async def apply_commit(self, command: ApplyCommit) -> StateHeld:
        raise NotImplementedError

    async def load_private(self, path: Path | None) -> PrivateNow:
        raise NotImplementedError

    async def write_private(self, path: Path) -> PrivateNow:
        raise NotImplementedError

    async def load_state(self, path: Path) -> StateHeld:
        raise NotImplementedError

    async def write_state(self, state: bytes, path: Path) -> StateHeld:
        raise NotImplementedError

    async def evaluate(self, command: Evaluate) -> Evaluated:
        raise NotImplementedError

    async def generate(self, command: Generate) -> Generated:
        raise NotImplementedError

    async def export_checkpoint(self, command: ExportCheckpoint) -> None:
        raise NotImplementedError

    async def stop(self) -> None:
        """Ask it to exit; kill it when it does not within 5 s."""
        raise NotImplementedError

    async def kill(self) -> None:
        raise NotImplementedError
