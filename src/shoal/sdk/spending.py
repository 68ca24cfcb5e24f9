"""What a job or an endpoint may cost."""

from __future__ import annotations

from dataclasses import dataclass

from shoal.identity import KeyPair
from shoal.identity.accounts import AccountKey
from shoal.protocol.ledgers import LedgerTicket
from shoal.purse.purse import AUDIT_MS, ENDS_LEAST_MS, NOTICE_MS, Funds
from shoal.quantities import BadQuantity
from shoal.quantities.money import AMOUNT_MAX
from shoal.world import Ledger


@dataclass(frozen=True)
class Lent:
    """What an owner who is away lets a driver pay with: an escrow that is open, by a key that it names."""

    payer: bytes
    signer: AccountKey
    client: KeyPair
    """Whom nodes keep their places for."""
    ledger: LedgerTicket
    budget_micro: int

    def funds(self, ledger: Ledger) -> Funds:
        return Funds(ledger, self.payer, self.signer, self.budget_micro)


@dataclass(frozen=True)
class Spending:
    """What may be spent, and whose money it is. Raises BadQuantity for a budget that no escrow can hold."""

    account: AccountKey
    ledger: LedgerTicket
    budget_micro: int
    notice_ms: int = NOTICE_MS
    audit_ms: int = AUDIT_MS

    def __post_init__(self) -> None:
        if type(self.budget_micro) is not int or not 0 < self.budget_micro <= AMOUNT_MAX:
            raise BadQuantity(
                f"A budget is a whole number of millionths, from 1 to {AMOUNT_MAX}, and not {self.budget_micro!r}."
            )

    def funds(self, ledger: Ledger, ends_least_ms: int = ENDS_LEAST_MS) -> Funds:
        """The same at the ledger itself; its escrow is to last so long at least."""
        return Funds.own(
            ledger, self.account, self.budget_micro, notice_ms=self.notice_ms,
            audit_ms=self.audit_ms, ends_least_ms=ends_least_ms,
        )  # fmt: skip
