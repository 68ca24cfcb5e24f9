"""One escrow, from its opening to its end.

While it is open, whoever has a voucher redeems it, unless its terms lock it until later: what the voucher says more
than the one before is earned by its payee. A part of that is held back; of the other, the ledger takes its fee. An
escrow ends when its time is over, or some notice after the payer asked for the rest, or as soon as all payees have
said, too, that they want no more of it; the rest goes back to the payer then. What was held back goes to the payees
when the time for audits is over as well, less the fee, and less what the auditor withheld: that goes back to the payer.
"""

from __future__ import annotations

from enum import Enum

import msgspec
from msgspec.structs import replace

from shoal.identity.accounts import address_text
from shoal.ledger.moves import FEES, DoneAlready, MoneyRefused, Move, account, escrowed, held, moves_of
from shoal.protocol.money import (
    EXTENSION_MAX_MS,
    PAYEES_MAX,
    Admission,
    EscrowTerms,
    Finished,
    LedgerName,
    ToppingUp,
    Voucher,
)
from shoal.quantities.money import AMOUNT_MAX, format_money, share


class BadTerms(MoneyRefused):
    """The terms of an escrow contradict themselves, or come too late."""

    code = "SH-192"


class EscrowOver(MoneyRefused):
    """An escrow has ended, or who would get or give more of it has said that it is enough."""

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


class TopUpOutOfTurn(MoneyRefused):
    """A top-up does not have the number that is its escrow's next."""

    code = "SH-181"


class EscrowLocked(MoneyRefused):
    """An escrow pays nobody before a moment that its terms name."""

    code = "SH-175"


class TooManyPayees(MoneyRefused):
    """An escrow has as many payees as it may have."""

    code = "SH-183"


class State(Enum):
    OPEN = "open"
    ENDED = "ended"
    """The rest is paid back; what was held back is not paid yet."""
    SETTLED = "settled"


class Paid(msgspec.Struct, frozen=True):
    """To one payee, in all."""

    redeemed_micro: int = 0
    """What its newest voucher says."""
    held_micro: int = 0
    """Of that, held back."""
    withheld_micro: int = 0
    """Of what was held back, gone back to the payer."""
    finished: bool = False
    """It has said that it wants no more."""

    @property
    def free_micro(self) -> int:
        """Not held back."""
        return self.redeemed_micro - self.held_micro

    @property
    def waiting_micro(self) -> int:
        """Held back and not withheld."""
        return self.held_micro - self.withheld_micro


class Escrow(msgspec.Struct, frozen=True):
    escrow_id: bytes
    terms: EscrowTerms
    opened_ms: int
    ends_ms: int
    """Not later than this; a payer who asks for the rest makes it sooner."""
    state: State = State.OPEN
    paid: dict[bytes, Paid] = {}
    admitted: dict[bytes, int] = {}
    """Payees beside those of the terms, or such as may get more than the terms say, and how much, by account."""
    added_micro: int = 0
    """By all top-ups; the same for the cap."""
    cap_added_micro: int = 0
    top_ups: int = 0
    """How many there were."""
    closing: bool = False
    """Its payer has asked for the rest."""

    @property
    def amount_micro(self) -> int:
        """What its payer has put in, in all."""
        return self.terms.amount_micro + self.added_micro

    @property
    def cap_micro(self) -> int:
        """To which its signer may go."""
        return self.terms.cap_micro + self.cap_added_micro

    @property
    def payees(self) -> set[bytes]:
        """Those of the terms, and those admitted later."""
        return {payee.account for payee in self.terms.payees} | self.admitted.keys()

    def most_of(self, payee: bytes) -> int | None:
        """How much it may get; None for who is no payee."""
        agreed = next((one.most_micro for one in self.terms.payees if one.account == payee), None)
        return self.admitted.get(payee, agreed)

    def most_for(self, payee: bytes) -> int:
        """The highest voucher for it that could be redeemed, now or once the lock is over: what others were promised
        may be gone before."""
        before = self.paid.get(payee, Paid()).redeemed_micro
        return min(self.most_of(payee) or 0, self.amount_micro - self.redeemed_micro + before)

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
    if terms.locked_until_ms > terms.expires_ms:
        raise BadTerms(f"An escrow is locked for {terms.locked_until_ms - terms.expires_ms} ms longer than it lasts.")
    _check_cap(terms.cap_micro, terms.amount_micro)
    escrow = Escrow(terms.escrow_id(ledger), terms, now_ms, terms.expires_ms)
    return escrow, moves_of((account(terms.payer), escrowed(escrow.escrow_id), terms.amount_micro))


def admitted(escrow: Escrow, admission: Admission, signer: bytes, now_ms: int) -> Escrow:
    """`signer` is whose signature the admission carries. Raises EscrowOver, NotYours, DoneAlready, TooManyPayees."""
    _check_open(escrow, now_ms)
    if signer not in (escrow.terms.payer, escrow.terms.signer):
        raise NotYours(f"An admission to {escrow.name} is signed by {address_text(signer)}, who may not.")
    before = escrow.most_of(admission.account)
    if before is not None and admission.most_micro <= before:
        raise DoneAlready(
            f"{address_text(admission.account)} may get {format_money(before)} of {escrow.name} already; an admission "
            "takes nothing away."
        )
    if before is None and len(escrow.payees) >= PAYEES_MAX:
        raise TooManyPayees(f"{escrow.name} has {PAYEES_MAX} payees, and there may be no more; open another one.")
    return replace(escrow, admitted={**escrow.admitted, admission.account: admission.most_micro})


def topped_up(escrow: Escrow, order: ToppingUp, now_ms: int) -> Decision:
    """Raises EscrowOver, also once the payer has asked for the rest; TopUpOutOfTurn, BadTerms."""
    _check_open(escrow, now_ms)
    if escrow.closing:
        raise EscrowOver(f"The payer of {escrow.name} has asked for the rest of it; open another one.")
    if order.number != escrow.top_ups + 1:
        raise TopUpOutOfTurn(
            f"Top-up {order.number} of {escrow.name} "
            f"{'has been done already' if order.number <= escrow.top_ups else 'comes before its turn'}; the next one "
            f"is number {escrow.top_ups + 1}."
        )
    latest_ms = max(escrow.ends_ms, escrow.terms.expires_ms + EXTENSION_MAX_MS)
    if not escrow.ends_ms <= order.expires_ms <= latest_ms:
        raise BadTerms(
            f"{escrow.name} cannot end at {order.expires_ms} ms: not before {escrow.ends_ms} ms, as was agreed, and "
            f"not after {latest_ms} ms, as payees wait for what is held back."
        )
    after = replace(
        escrow, ends_ms=order.expires_ms, added_micro=escrow.added_micro + order.amount_micro,
        cap_added_micro=escrow.cap_added_micro + order.cap_micro, top_ups=order.number,
    )  # fmt: skip
    if after.amount_micro > AMOUNT_MAX:
        raise BadTerms(f"{escrow.name} would have got more in all than can be counted, {format_money(AMOUNT_MAX)}.")
    _check_cap(after.cap_micro, after.amount_micro)
    return after, moves_of((account(escrow.terms.payer), escrowed(escrow.escrow_id), order.amount_micro))


def redeemed(escrow: Escrow, voucher: Voucher, signer: bytes, now_ms: int) -> Decision:
    """`signer` is whose signature the voucher carries. Raises EscrowOver, EscrowLocked, NotYours, OldVoucher,
    TooMuchPromised."""
    terms = escrow.terms
    _check_open(escrow, now_ms)
    if now_ms < terms.locked_until_ms:
        raise EscrowLocked(f"{escrow.name} pays nobody for {terms.locked_until_ms - now_ms} ms more, as its terms say.")
    if voucher.escrow != escrow.escrow_id:
        raise NotYours(f"A voucher for escrow {voucher.escrow.hex()[:12]} is none for {escrow.name}.")
    if signer not in (terms.payer, terms.signer):
        raise NotYours(f"A voucher for {escrow.name} is signed by {address_text(signer)}, who may not.")
    most = _most(escrow, voucher.payee)
    before = escrow.paid.get(voucher.payee, Paid())
    if before.finished:
        raise EscrowOver(f"{address_text(voucher.payee)} has said that it wants no more of {escrow.name}.")
    more = voucher.amount_micro - before.redeemed_micro
    if more <= 0:
        raise OldVoucher(
            f"A voucher for {format_money(voucher.amount_micro)} came where {format_money(before.redeemed_micro)} of "
            f"{escrow.name} are redeemed already."
        )
    _check_most(escrow, voucher, most, "its payee may get")
    whole = escrow.redeemed_micro + more
    _check_most(escrow, voucher, escrow.amount_micro - whole + voucher.amount_micro, "is left of it for this payee")
    if signer != terms.payer:
        _check_most(escrow, voucher, escrow.cap_micro - whole + voucher.amount_micro, "its signer may still promise")
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
    """The payer has asked for the rest, or the signer for it. Raises EscrowOver, DoneAlready."""
    _check_open(escrow, now_ms)
    if escrow.closing:
        raise DoneAlready(f"The payer of {escrow.name} has asked for the rest already; it ends at {escrow.ends_ms} ms.")
    ends_ms = min(escrow.ends_ms, max(now_ms + escrow.terms.notice_ms, escrow.terms.locked_until_ms))
    return _over_if_nobody_waits(replace(escrow, ends_ms=ends_ms, closing=True), now_ms)


def finished(escrow: Escrow, word: Finished, now_ms: int) -> Escrow:
    """A payee has said that it wants no more. Raises EscrowOver, NotYours, DoneAlready, MoneyRefused."""
    _check_open(escrow, now_ms)
    _most(escrow, word.payee)
    before = escrow.paid.get(word.payee, Paid())
    if before.finished:
        raise DoneAlready(f"{address_text(word.payee)} has said already that it wants no more of {escrow.name}.")
    if word.amount_micro != before.redeemed_micro:
        raise MoneyRefused(
            f"{address_text(word.payee)} wants {format_money(word.amount_micro)} of {escrow.name} and no more, and has "
            f"redeemed {format_money(before.redeemed_micro)}; redeem the newest voucher, then say what that is."
        )
    after = {**escrow.paid, word.payee: replace(before, finished=True)}
    return _over_if_nobody_waits(replace(escrow, paid=after), now_ms)


def _over_if_nobody_waits(escrow: Escrow, now_ms: int) -> Escrow:
    """The notice is for payees with vouchers that are not redeemed: without any, it need not be waited for."""
    waits = any(not escrow.paid.get(payee, Paid()).finished for payee in escrow.payees)
    return escrow if waits or not escrow.closing else replace(escrow, ends_ms=max(now_ms, escrow.terms.locked_until_ms))


def withheld(escrow: Escrow, payee: bytes, amount_micro: int, by: bytes, now_ms: int) -> Decision:
    """From what was held back of a payee, on evidence: so much in all, so that an order is good once. Raises
    EscrowOver, NotYours, TooMuchPromised."""
    if by != escrow.terms.auditor:
        raise NotYours(f"{address_text(by)} is not the auditor of {escrow.name}.")
    if escrow.state is State.SETTLED or now_ms >= escrow.ends_ms + escrow.terms.audit_ms:
        raise EscrowOver(f"The time for audits of {escrow.name} is over.")
    before = escrow.paid.get(payee, Paid())
    if not before.withheld_micro < amount_micro <= before.held_micro:
        raise TooMuchPromised(
            f"{format_money(amount_micro)} in all cannot be withheld of {address_text(payee)}: "
            f"{format_money(before.held_micro)} of {escrow.name} are held back, and "
            f"{format_money(before.withheld_micro)} of that are withheld already."
        )
    after = replace(before, withheld_micro=amount_micro)
    return replace(escrow, paid={**escrow.paid, payee: after}), moves_of(
        (held(escrow.escrow_id, payee), account(escrow.terms.payer), amount_micro - before.withheld_micro)
    )


def passed(escrow: Escrow, now_ms: int) -> Decision:
    """What the time alone brings: the end, and then what was held back. The same escrow, where it brings nothing
    yet."""
    moves: tuple[Move, ...] = ()
    if escrow.state is State.OPEN and now_ms >= escrow.ends_ms:
        rest = escrow.amount_micro - escrow.redeemed_micro
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


def _check_cap(cap_micro: int, amount_micro: int) -> None:
    if cap_micro > amount_micro:
        raise BadTerms(
            f"The signer of an escrow may go to {format_money(cap_micro)}, which is more than is in it, "
            f"{format_money(amount_micro)}."
        )


def _most(escrow: Escrow, payee: bytes) -> int:
    most = escrow.most_of(payee)
    if most is None:
        raise NotYours(f"{address_text(payee)} is no payee of {escrow.name}.")
    return most


def _check_most(escrow: Escrow, voucher: Voucher, most_micro: int, what: str) -> None:
    if voucher.amount_micro > most_micro:
        raise TooMuchPromised(
            f"A voucher for {format_money(voucher.amount_micro)} of {escrow.name} pays nothing: "
            f"{format_money(most_micro)} {what}."
        )
