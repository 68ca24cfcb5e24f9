"""What was set aside and paid, as a file keeps it; and the bill that follows from it."""

from __future__ import annotations

import contextlib
from collections.abc import Container
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from shoal.identity import Hash
from shoal.identity.accounts import AccountSignature, Address
from shoal.ledger.commands import HoldBytes
from shoal.ledger.escrows import Escrow, Paid
from shoal.protocol.money import Amount, EscrowTerms, LedgerName, SignedVoucher
from shoal.quantities.money import share

FILE = "payments.json"
ELSEWHERE = "signed by another driver"


class BillLine(msgspec.Struct, frozen=True, kw_only=True):
    """One node of a bill; millionths."""

    name: str
    node_id: str
    paid: Amount
    """What its vouchers say, less what was withheld; the ledger's fee is part of it."""
    withheld: Amount
    reason: str


class Bill(msgspec.Struct, frozen=True, kw_only=True):
    """What all of it cost; whole millionths of the currency. `quoted` is `charged` and `refunded` together."""

    quoted: Amount
    """What was set aside at most."""
    charged: Amount
    refunded: Amount
    fee: Amount = 0
    """Of what was charged, to the ledger: nodes get that much less."""
    currency: str
    nodes: tuple[BillLine, ...]


class PaidNode(msgspec.Struct, frozen=True, kw_only=True):
    """A node that is paid out of an escrow."""

    name: str
    payee: Address
    micro_per_h: Annotated[int, Meta(ge=0)]
    paid_micro: Amount = 0
    voucher: SignedVoucher | None = None
    withheld_micro: Amount = 0
    reason: str = "worked"
    hold: HoldBytes = b""
    """The node's newest Hold for this client, as it signed it: one half of the proof if it has sold the place twice.
    None of a node that drives: it finds its vouchers in its copy of this."""

    def __post_init__(self) -> None:
        if self.withheld_micro > self.paid_micro:
            raise ValueError(f"{self.withheld_micro} are withheld of {self.paid_micro} millionths")


class OwedTo(msgspec.Struct, frozen=True):
    """What a node has earned in all, and the voucher for it."""

    paid_micro: Amount
    voucher: SignedVoucher


class Owed(msgspec.Struct, frozen=True):
    """What is earned by a record that is about to be written: it counts where the record is there. So whoever is killed
    between the two owes nothing that is not written down, and has signed for nothing that never came to be."""

    record: Hash
    nodes: dict[str, OwedTo]
    """By NodeId, in hexadecimal digits."""


class TermPayments(msgspec.Struct, frozen=True, kw_only=True):
    """All that one run of a client sets aside and pays. It is written down before the ledger is asked."""

    terms: EscrowTerms
    ledger: LedgerName
    signature: AccountSignature
    nodes: dict[str, PaidNode] = {}
    """By NodeId, in hexadecimal digits; by its account what another driver has signed for."""
    owed: Owed | None = None
    closed: bool = False
    """The payer has asked for the rest."""
    added_micro: Amount = 0
    """What the payer has put into the escrow since it was opened, as the ledger said when it was last asked."""
    moved_ms: Annotated[int, Meta(ge=0)] = 0
    """When the escrow ends, as the ledger said; 0: as its terms say."""

    @property
    def amount_micro(self) -> int:
        """What is in the escrow, in all."""
        return self.terms.amount_micro + self.added_micro

    @property
    def ends_ms(self) -> int:
        return self.moved_ms or self.terms.expires_ms

    def as_at(self, escrow: Escrow) -> TermPayments:
        """With what the ledger says of its escrow. What it has paid beyond the vouchers that stand here was signed by
        another driver, which could not be reached, or did not say so: it is spent as well."""
        moved_ms = 0 if escrow.ends_ms == self.terms.expires_ms else escrow.ends_ms
        nodes = dict(self.nodes)
        for payee, got in escrow.paid.items():
            more = got.redeemed_micro - sum(one.paid_micro for one in nodes.values() if one.payee == payee)
            if more > 0:
                known = nodes.get(payee.hex(), PaidNode(name=ELSEWHERE, payee=payee, micro_per_h=0, reason=ELSEWHERE))
                nodes[payee.hex()] = msgspec.structs.replace(known, paid_micro=known.paid_micro + more)
        return msgspec.structs.replace(self, added_micro=escrow.added_micro, moved_ms=moved_ms, nodes=nodes)

    def ended_as(self, escrow: Escrow) -> TermPayments:
        """The same, once nothing more is withheld: no more was than the ledger says."""
        now = self.as_at(escrow)
        nodes, left = dict[str, PaidNode](), {payee: got.withheld_micro for payee, got in escrow.paid.items()}
        for node, one in now.nodes.items():
            withheld = min(one.withheld_micro, left.get(one.payee, 0))
            left[one.payee] = left.get(one.payee, 0) - withheld
            nodes[node] = msgspec.structs.replace(one, withheld_micro=withheld)
        return msgspec.structs.replace(now, nodes=nodes)

    def settled(self, written: Container[bytes]) -> TermPayments:
        """With what is owed, if its record is among those that are written."""
        if self.owed is None:
            return self
        nodes = dict(self.nodes)
        if self.owed.record in written:
            for node, to in self.owed.nodes.items():
                nodes[node] = msgspec.structs.replace(nodes[node], paid_micro=to.paid_micro, voucher=to.voucher)
        return msgspec.structs.replace(self, nodes=nodes, owed=None)

    @property
    def escrow(self) -> bytes:
        return self.terms.escrow_id(self.ledger)

    @property
    def fee_micro(self) -> int:
        """To the ledger, when all is paid: of what is paid at once, and of what is held back first."""
        by_payee = dict[bytes, Paid]()
        for one in self.nodes.values():
            known = by_payee.get(one.payee, Paid())
            earned = known.redeemed_micro + one.paid_micro
            held, withheld = share(earned, self.terms.holdback_ppm), known.withheld_micro + one.withheld_micro
            by_payee[one.payee] = Paid(earned, held, withheld)
        parts = [part for one in by_payee.values() for part in (one.free_micro, one.waiting_micro)]
        return sum(share(part, self.terms.fee_ppm) for part in parts)

    @property
    def charged_micro(self) -> int:
        return sum(one.paid_micro - one.withheld_micro for one in self.nodes.values())


class Payments(msgspec.Struct, frozen=True, kw_only=True):
    """`payments.json`, in the folder of a run or of a gateway."""

    budget_micro: Amount
    """What it may cost in all: with what was added to it on the way."""
    terms: tuple[TermPayments, ...] = ()

    @property
    def owes(self) -> bool:
        """Whether something is owed that depends on what is written."""
        return any(one.owed is not None for one in self.terms)

    def settled(self, written: Container[bytes]) -> Payments:
        return msgspec.structs.replace(self, terms=tuple(one.settled(written) for one in self.terms))

    @property
    def spent_micro(self) -> int:
        return sum(one.charged_micro for one in self.terms)


def budget_of(folder: Path) -> int | None:
    """What the run in a folder may cost, as it was begun; None for one that costs nothing, and where that cannot be
    read: whoever opens the folder says so."""
    with contextlib.suppress(OSError, msgspec.DecodeError):
        return msgspec.json.decode((folder / FILE).read_bytes(), type=Payments).budget_micro
    return None


def bill(payments: Payments) -> Bill | None:
    """Adds up by its making: what is neither paid nor withheld goes back. None where nothing was set aside."""
    if not payments.terms:
        return None
    lines: dict[str, BillLine] = {}
    for term in payments.terms:
        for node, one in term.nodes.items():
            known = lines.get(node)
            lines[node] = BillLine(
                name=one.name, node_id=node, paid=(known.paid if known else 0) + one.paid_micro - one.withheld_micro,
                withheld=(known.withheld if known else 0) + one.withheld_micro, reason=one.reason,
            )  # fmt: skip
    charged = sum(line.paid for line in lines.values())
    quoted = max(payments.budget_micro, charged)
    return Bill(
        quoted=quoted,
        charged=charged,
        refunded=quoted - charged,
        fee=sum(term.fee_micro for term in payments.terms),
        currency=payments.terms[0].ledger.currency,
        nodes=tuple(lines.values()),
    )


def newest_vouchers(term: TermPayments) -> list[PaidNode]:
    """Of each account the node with the highest voucher."""
    best: dict[bytes, PaidNode] = {}
    for one in term.nodes.values():
        known = best.get(one.payee)
        if one.voucher is not None and (known is None or _amount(one) > _amount(known)):
            best[one.payee] = one
    return list(best.values())


def _amount(one: PaidNode) -> int:
    return one.voucher.voucher.amount_micro if one.voucher else 0
