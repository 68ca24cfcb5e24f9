"""The ledger: what nodes and clients need of whoever keeps their money, wherever that is."""

from __future__ import annotations

from typing import Protocol

from shoal.ledger.commands import Command
from shoal.ledger.escrows import Escrow
from shoal.ledger.moves import Move
from shoal.protocol.money import LedgerName


class Ledger(Protocol):
    """One ledger, in one currency. Its rules are those of `shoal.ledger`, whoever runs it."""

    @property
    def name(self) -> LedgerName:
        """What signatures for it name."""
        ...

    async def apply(self, command: Command) -> tuple[Move, ...]:
        """What it moved, once that is durable. Raises ShoalError, and nothing has moved then; LinkError where it is
        not known whether it has."""
        ...

    async def balance(self, account: bytes) -> int:
        """Of an address, in millionths; 0 for one that never had anything. Raises ShoalError."""
        ...

    async def escrow(self, escrow_id: bytes) -> Escrow | None:
        """As it stands after all that was acknowledged; None where there is none. Raises ShoalError."""
        ...
