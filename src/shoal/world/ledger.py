"""The ledger: what nodes and clients need of whoever keeps their money, wherever that is."""

from __future__ import annotations

from typing import Protocol

from shoal.errors import LinkError
from shoal.ledger.book import Book
from shoal.ledger.commands import Command
from shoal.ledger.escrows import Escrow
from shoal.ledger.fees import Announced
from shoal.ledger.moves import Move
from shoal.ledger.moves import account as account_name
from shoal.protocol.money import LedgerName
from shoal.world.clock import Clock


class OutcomeUnknown(LinkError):
    """A ledger was asked to move money, and its answer was lost: it may have done so or not."""

    code = "SH-340"


class Ledger(Protocol):
    """One ledger, in one currency. Its rules are those of `shoal.ledger`, whoever runs it."""

    @property
    def name(self) -> LedgerName:
        """What signatures for it name."""
        ...

    async def apply(self, command: Command) -> tuple[Move, ...]:
        """What it moved, once that is durable. Raises ShoalError, and nothing has moved then; OutcomeUnknown, or
        another LinkError, where it is not known whether it has."""
        ...

    async def balance(self, account: bytes) -> int:
        """Of an address, in millionths; 0 for one that never had anything. Raises ShoalError."""
        ...

    async def escrow(self, escrow_id: bytes) -> Escrow | None:
        """As it stands after all that was acknowledged; None where there is none. Raises ShoalError."""
        ...

    async def fees(self) -> tuple[Announced, ...]:
        """What it takes of what escrows pay: the table that holds, if any, and the one that is to follow. Raises
        ShoalError."""
        ...


class MemoryLedger:
    """A ledger without a journal: for tests and simulations."""

    def __init__(self, ledger: LedgerName, clock: Clock) -> None:
        self.book, self._clock = Book(ledger), clock

    @property
    def name(self) -> LedgerName:
        return self.book.ledger

    async def apply(self, command: Command) -> tuple[Move, ...]:
        self._pass()
        return self.book.apply(command)

    async def balance(self, account: bytes) -> int:
        self._pass()
        return self.book.balances.get(account_name(account), 0)

    async def escrow(self, escrow_id: bytes) -> Escrow | None:
        self._pass()
        return self.book.escrows.get(escrow_id)

    async def fees(self) -> tuple[Announced, ...]:
        return self.book.fees

    def _pass(self) -> None:
        """What the time has brought comes first."""
        self.book.at(self._clock.now_ms())
        for command in self.book.due():
            self.book.apply(command)
