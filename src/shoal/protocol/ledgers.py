"""How a house ledger is named for people. What is asked of one stands in `house.messages`, as it speaks of the words of
`ledger`, which this room does not see."""

from __future__ import annotations

import msgspec

from shoal.identity import NodeId
from shoal.identity.accounts import Address
from shoal.protocol.hubs import BadTicket, who_and_where
from shoal.protocol.money import HouseLedger
from shoal.protocol.prices import Currency

SCHEME = "shoal-ledger://"
MINTED = "development mint"
"""How the reference of a deposit begins that came from one."""


class LedgerTicket(msgspec.Struct, frozen=True):
    """Who runs a house ledger, where to try it, and in which currency it is:
    `shoal-ledger://<64 hexadecimal digits>@host:port[,host:port...]/CURRENCY`.

    The NodeId is what is trusted, and what signatures for the ledger name, with the currency; whoever answers at an
    address must prove to be it.
    """

    operator: NodeId
    currency: Currency
    addresses: tuple[str, ...]
    """`tcp://host:port` each, at least one."""

    @property
    def ledger(self) -> HouseLedger:
        return HouseLedger(self.operator, self.currency)

    @classmethod
    def parse(cls, text: str) -> LedgerTicket:
        """Text -> ticket. Raises BadTicket with what is wrong in it."""
        expected = (
            f"a ledger's ticket looks like {SCHEME}<64 hexadecimal digits>@host:port/USD; it prints it at its start"
        )
        text = text.strip()
        place, _, currency = text.removeprefix(SCHEME).partition("/")
        whole = f"{SCHEME}{place}" if text.startswith(SCHEME) else text
        operator, addresses = who_and_where(whole, SCHEME, "ledger", expected)
        try:
            msgspec.convert(currency, Currency)
        except msgspec.ValidationError as error:
            raise BadTicket(f"{currency[:20]!r} at the end of a ledger's ticket is no currency; {expected}.") from error
        return cls(operator, currency, addresses)

    def __str__(self) -> str:
        places = ",".join(address.removeprefix("tcp://") for address in self.addresses)
        return f"{SCHEME}{self.operator.hex()}@{places}/{self.currency}"


class PaidAt(msgspec.Struct, frozen=True):
    """Where a node gets its money."""

    ledger: LedgerTicket
    account: Address
