"""One escrow, from its opening to its end.

While it is open, whoever has a voucher redeems it: what the voucher says more than the one before is earned by its
payee. A part of that is held back; of the other, the ledger takes its fee. An escrow ends when its time is over, or
some notice after the payer asked for the rest; the rest goes back to the payer then. What was held back goes to the
payees when the time for audits is over as well, less the fee, and less what the auditor withheld: that goes back to the
payer.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum

from shoal.identity.accounts import address_text
from shoal.ledger.moves import FEES, MoneyRefused, Move, account, escrowed, held, moves_of
from shoal.protocol.money import EscrowTerms, LedgerName, Voucher
from shoal.quantities.money import format_money, share


class BadTerms(MoneyRefused):
    """The terms of an escrow contradict themselves, or come too late."""

    code = "SH-192"


class EscrowOver(MoneyRefused):
    """An escrow has ended."""

    code = "SH-193"


class OldVoucher(MoneyRefused):
    """A voucher says no more than one that was redeemed."""

    code = "SH-194"


class TooMuchPromised(MoneyRefused):
    """A voucher promises more than an escrow, its payee or its signer may go to."""

    code = "SH-195"


class NotYours(MoneyRefused):
    """Somebody asks for what is another's to ask."""

    code = "SH-196"


class State(Enum):
    OPEN = "open"
    ENDED = "ended"
    """The rest is paid back; what was held back is not paid yet."""
    SETTLED = "settled"


@dataclass(frozen=True)
class Paid:
    """To one payee, in all."""

    redeemed_micro: int = 0
    """What its newest voucher says."""
    held_micro: int = 0
    """Of that, held back."""
    withheld_micro: int = 0
    """Of what was held back, gone back to the payer."""

    @property
    def free_micro(self) -> int:
        """Not held back."""
        return self.redeemed_micro - self.held_micro

    @property
    def waiting_micro(self) -> int:
        """Held back and not withheld."""
        return self.held_micro - self.withheld_micro


@dataclass(frozen=True)
class Escrow:
    escrow_id: bytes
    terms: EscrowTerms
    opened_ms: int
    ends_ms: int
    """Not later than this; a payer who asks for the rest makes it sooner."""
    state: State = State.OPEN
    paid: dict[bytes, Paid] = field(default_factory=dict)

    @property
    def redeemed_micro(self) -> int:
        return sum(one.redeemed_micro for one in self.paid.values())

    @property
    def due_ms(self) -> int | None:
        """When the time brings something for it; None when it has brought all."""
        if self.state is State.SETTLED:
            return None
        return self.ends_ms if self.state is State.OPEN else self.ends_ms + self.terms.audit_ms

    @property
    def name(self) -> str:
        return f"Escrow {self.escrow_id.hex()[:12]}"


Decision = tuple[Escrow, tuple[Move, ...]]
"""What becomes of an escrow, and the money that moves."""


def opened(terms: EscrowTerms, ledger: LedgerName, now_ms: int) -> Decision:
    """Raises BadTerms."""
    if terms.expires_ms <= now_ms:
        raise BadTerms(f"An escrow that expires {now_ms - terms.expires_ms} ms ago cannot be opened.")
    if len({payee.account for payee in terms.payees}) < len(terms.payees):
        raise BadTerms("An escrow names a payee twice.")
    if terms.cap_micro > terms.amount_micro:
        raise BadTerms(
            f"The signer of an escrow may go to {format_money(terms.cap_micro)}, which is more than is in it, "
            f"{format_money(terms.amount_micro)}."
        )
    escrow = Escrow(terms.escrow_id(ledger), terms, now_ms, terms.expires_ms)
    return escrow, moves_of((account(terms.payer), escrowed(escrow.escrow_id), terms.amount_micro))


def redeemed(escrow: Escrow, voucher: Voucher, signer: bytes, now_ms: int) -> Decision:
    """`signer` is whose signature the voucher carries. Raises EscrowOver, NotYours, OldVoucher, TooMuchPromised."""
    terms = escrow.terms
    _check_open(escrow, now_ms)
    if voucher.escrow != escrow.escrow_id:
        raise NotYours(f"A voucher for escrow {voucher.escrow.hex()[:12]} is none for {escrow.name}.")
    if signer not in (terms.payer, terms.signer):
        raise NotYours(f"A voucher for {escrow.name} is signed by {address_text(signer)}, who may not.")
    most = next((payee.most_micro for payee in terms.payees if payee.account == voucher.payee), None)
    if most is None:
        raise NotYours(f"{address_text(voucher.payee)} is no payee of {escrow.name}.")
    before = escrow.paid.get(voucher.payee, Paid())
    more = voucher.amount_micro - before.redeemed_micro
    if more <= 0:
        raise OldVoucher(
            f"A voucher for {format_money(voucher.amount_micro)} came where {format_money(before.redeemed_micro)} of "
            f"{escrow.name} are redeemed already."
        )
    _check_most(escrow, voucher, most, "its payee may get")
    whole = escrow.redeemed_micro + more
    _check_most(escrow, voucher, terms.amount_micro - whole + voucher.amount_micro, "is left of it for this payee")
    if signer != terms.payer:
        _check_most(escrow, voucher, terms.cap_micro - whole + voucher.amount_micro, "its signer may still promise")
    # Both are reckoned of all that a payee has earned, so that they do not depend on how often it redeems.
    after = replace(
        before, redeemed_micro=voucher.amount_micro, held_micro=share(voucher.amount_micro, terms.holdback_ppm)
    )
    fee = share(after.free_micro, terms.fee_ppm) - share(before.free_micro, terms.fee_ppm)
    pot = escrowed(escrow.escrow_id)
    return replace(escrow, paid={**escrow.paid, voucher.payee: after}), moves_of(
        (pot, account(voucher.payee), after.free_micro - before.free_micro - fee),
        (pot, held(escrow.escrow_id, voucher.payee), after.held_micro - before.held_micro),
        (pot, FEES, fee),
    )


def closing(escrow: Escrow, now_ms: int) -> Escrow:
    """The payer has asked for the rest. Raises EscrowOver."""
    _check_open(escrow, now_ms)
    return replace(escrow, ends_ms=min(escrow.ends_ms, now_ms + escrow.terms.notice_ms))


def withheld(escrow: Escrow, payee: bytes, amount_micro: int, by: bytes, now_ms: int) -> Decision:
    """From what was held back of a payee, on evidence. Raises EscrowOver, NotYours, TooMuchPromised."""
    if by != escrow.terms.auditor:
        raise NotYours(f"{address_text(by)} is not the auditor of {escrow.name}.")
    if escrow.state is State.SETTLED or now_ms >= escrow.ends_ms + escrow.terms.audit_ms:
        raise EscrowOver(f"The time for audits of {escrow.name} is over.")
    before = escrow.paid.get(payee, Paid())
    if not 0 < amount_micro <= before.waiting_micro:
        raise TooMuchPromised(
            f"{format_money(amount_micro)} cannot be withheld of {address_text(payee)}: "
            f"{format_money(before.waiting_micro)} of {escrow.name} are held back."
        )
    after = replace(before, withheld_micro=before.withheld_micro + amount_micro)
    return replace(escrow, paid={**escrow.paid, payee: after}), moves_of(
        (held(escrow.escrow_id, payee), account(escrow.terms.payer), amount_micro)
    )


def passed(escrow: Escrow, now_ms: int) -> Decision:
    """What the time alone brings: the end, and then what was held back. Nothing, where it brings nothing yet."""
    moves: tuple[Move, ...] = ()
    if escrow.state is State.OPEN and now_ms >= escrow.ends_ms:
        rest = escrow.terms.amount_micro - escrow.redeemed_micro
        moves += moves_of((escrowed(escrow.escrow_id), account(escrow.terms.payer), rest))
        escrow = replace(escrow, state=State.ENDED)
    if escrow.state is State.ENDED and now_ms >= escrow.ends_ms + escrow.terms.audit_ms:
        for payee, one in sorted(escrow.paid.items()):
            fee, pot = share(one.waiting_micro, escrow.terms.fee_ppm), held(escrow.escrow_id, payee)
            moves += moves_of((pot, account(payee), one.waiting_micro - fee), (pot, FEES, fee))
        escrow = replace(escrow, state=State.SETTLED)
    return escrow, moves


def _check_open(escrow: Escrow, now_ms: int) -> None:
    if escrow.state is not State.OPEN or now_ms >= escrow.ends_ms:
        raise EscrowOver(f"{escrow.name} has ended; what was not redeemed goes back to the payer.")


def _check_most(escrow: Escrow, voucher: Voucher, most_micro: int, what: str) -> None:
    if voucher.amount_micro > most_micro:
        raise TooMuchPromised(
            f"A voucher for {format_money(voucher.amount_micro)} of {escrow.name} pays nothing: "
            f"{format_money(most_micro)} {what}."
        )
