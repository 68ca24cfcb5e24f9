"""Many who wait for one ledger share its transactions: while one is written, the commands for the next one gather.

Making a transaction durable takes as long for five hundred commands as for one. Each caller hears of its own command
alone, and not before it is durable.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import TypeVar

from shoal.errors import ShoalError
from shoal.ledger.commands import Command
from shoal.ledger.escrows import Escrow
from shoal.ledger.fees import Announced
from shoal.ledger.moves import Move
from shoal.ledger.moves import account as account_name
from shoal.protocol.money import LedgerName
from shoal.storage.faults import LedgerBusy
from shoal.storage.ledgers import COMMANDS_MAX, SqlLedger
from shoal.world import OutcomeUnknown

WAITING_MAX = 8 * COMMANDS_MAX
LOOKED_AGAIN_S = (0.25, 0.5, 1.0, 2.0, 4.0)
"""After so long each, where a database went away while it was writing: a server that starts again is there within
seconds, and then knows."""
T = TypeVar("T")


class GroupCommit:
    """A ledger for the tasks of one event loop: `world.Ledger`. The ledger is its own from here on."""

    def __init__(self, ledger: SqlLedger) -> None:
        self.ledger = ledger
        self._waiting: deque[tuple[Command, asyncio.Future[tuple[Move, ...]]]] = deque()
        self._writing: asyncio.Task[None] | None = None
        self._turn = asyncio.Lock()
        self._readers = 0

    @property
    def name(self) -> LedgerName:
        return self.ledger.ledger

    async def apply(self, command: Command) -> tuple[Move, ...]:
        """What it moved, once that is durable. Raises what `SqlLedger.apply` does, and LedgerBusy. A caller that is
        cancelled, or hears OutcomeUnknown, does not know whether its command was carried out."""
        if len(self._waiting) >= WAITING_MAX:
            raise LedgerBusy(f"{WAITING_MAX} commands wait for this ledger already; try again in a moment.")
        future: asyncio.Future[tuple[Move, ...]] = asyncio.get_running_loop().create_future()
        self._waiting.append((command, future))
        if self._writing is None or self._writing.done():
            self._writing = asyncio.create_task(self._write())
        return await future

    async def balance(self, account: bytes) -> int:
        return await self.ask(lambda ledger: ledger.balance(account_name(account)))

    async def escrow(self, escrow_id: bytes) -> Escrow | None:
        return await self.ask(lambda ledger: ledger.escrow(escrow_id))

    async def fees(self) -> tuple[Announced, ...]:
        return await self.ask(lambda ledger: ledger.fees())

    async def ask(self, question: Callable[[SqlLedger], T]) -> T:
        """Whatever the ledger answers, in its turn. Raises LedgerFailed, LedgerBusy."""
        if self._readers >= WAITING_MAX:
            raise LedgerBusy(f"{WAITING_MAX} questions wait for this ledger already; try again in a moment.")
        self._readers += 1
        try:
            async with self._turn:
                asking = asyncio.ensure_future(asyncio.to_thread(question, self.ledger))
                try:
                    return await asyncio.shield(asking)
                finally:  # whoever asked may have gone: the thread has not, and the turn is its own until then
                    await asyncio.gather(asking, return_exceptions=True)
        finally:
            self._readers -= 1

    async def close(self) -> None:
        """When what waits is written."""
        if self._writing is not None:
            await self._writing
        async with self._turn:
            self.ledger.close()

    async def _write(self) -> None:
        while self._waiting:
            some = [self._waiting.popleft() for _ in range(min(COMMANDS_MAX, len(self._waiting)))]
            some = [(command, future) for command, future in some if not future.done()]  # whose caller still waits
            async with self._turn:
                found = await self._written([command for command, _ in some])
            # Whatever went wrong, those who wait hear of it, and the next ones get their turn.
            outcomes = [found] * len(some) if isinstance(found, BaseException) else found
            for (_, future), outcome in zip(some, outcomes, strict=True):
                if future.done():
                    continue
                if isinstance(outcome, BaseException):
                    future.set_exception(outcome)
                else:
                    future.set_result(outcome)

    async def _written(self, commands: list[Command]) -> list[tuple[Move, ...] | ShoalError] | BaseException:
        for wait_s in (*LOOKED_AGAIN_S, None):
            writing = asyncio.to_thread(self.ledger.apply_all, commands)
            (found,) = await asyncio.gather(writing, return_exceptions=True)
            if not isinstance(found, OutcomeUnknown) or wait_s is None:
                break
            await self.ledger.clock.sleep(wait_s)
        return found
