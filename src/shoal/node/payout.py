"""Where a node is paid."""

from __future__ import annotations

from dataclasses import dataclass

from shoal.protocol.ledgers import LedgerTicket


@dataclass(frozen=True)
class PaidAt:
    ledger: LedgerTicket
    account: bytes
    """The address."""
