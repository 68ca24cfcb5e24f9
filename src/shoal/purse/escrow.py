"""What a payer does with an escrow at a ledger: vouchers are redeemed and the rest is asked back, or more is put in."""

from __future__ import annotations

import contextlib
import logging

import msgspec

from shoal.errors import BadInput, BadRecord, LinkError, ShoalError
from shoal.identity.accounts import AccountKey, address_text
from shoal.ledger.book import UnknownEscrow
from shoal.ledger.commands import Close, Redeem, TopUp
from shoal.ledger.escrows import Escrow, EscrowOver, OldVoucher, State, TopUpOutOfTurn, topped_up
from shoal.ledger.moves import DoneAlready, MoneyRefused, TooLittleMoney
from shoal.protocol.money import DAY_MS, EXTENSION_MAX_MS, Closing, ToppingUp
from shoal.purse.bills import PaidNode, TermPayments, newest_vouchers
from shoal.quantities.money import format_money
from shoal.world import Clock, Ledger, OutcomeUnknown

ASKED_AGAIN_S = (0.5, 1.0, 2.0, 4.0)
"""After so long each, when an answer of the ledger was lost; places are held for longer."""
ENDS_MOST_MS = 30 * DAY_MS
"""So far away is its end at most, as a purse has it."""
TOP_UPS_TRIED = 4
"""Where another one of the same payer comes first."""
_log = logging.getLogger("shoal.purse")


class NoMoney(BadInput):
    """An account has not what is to be set aside."""

    code = "SH-163"


async def close_escrow(term: TermPayments, ledger: Ledger, account: AccountKey) -> tuple[TermPayments, Escrow | None]:
    """The nodes get what they have vouchers for, and the rest is asked back. Gives also what the ledger says of it
    then, None where it has no such escrow. One that is said to be closed is closed only where that is wrong. Raises
    ShoalError."""
    if term.closed:
        found = await ledger.escrow(term.escrow)
        if found is None or found.closing or found.state is not State.OPEN:
            return (term if found is None else term.ended_as(found)), found
    wish = Closing(term.escrow)
    try:
        for one in newest_vouchers(term):
            try:
                await redeem(one, ledger)
            except EscrowOver:
                break
            except (MoneyRefused, BadRecord) as error:  # so it pays nothing, and holds up nothing
                _log.warning("a voucher for %s is worth nothing: %s", one.name, error)
        await ledger.apply(Close(wish, account.sign(wish.digest(term.ledger))))
    except (UnknownEscrow, EscrowOver, DoneAlready):
        pass  # it never came to be, is over by itself, or was asked for and the answer was lost
    found = await ledger.escrow(term.escrow)  # nothing is added any more
    if found is not None:
        term = term.ended_as(found)
    return msgspec.structs.replace(term, owed=None, closed=True), found


async def top_up(term: TermPayments, ledger: Ledger, account: AccountKey, micro: int, clock: Clock) -> Escrow:
    """Its payer puts more into an escrow, which lasts so much longer, and its signer may promise as much more. Gives
    how it stands then. Raises UnknownEscrow, EscrowOver, NoMoney, OutcomeUnknown, and what the ledger does."""
    for _ in range(TOP_UPS_TRIED):
        found = await _found(term, ledger)
        order = ToppingUp(
            escrow=term.escrow,
            amount_micro=micro,
            cap_micro=0 if term.terms.signer == term.terms.payer else micro,
            expires_ms=_ends_with(found, micro, clock.now_ms()),
            number=found.top_ups + 1,
        )
        try:
            return await _topped_up(TopUp(order, account.sign(order.digest(term.ledger))), found, term, ledger, clock)
        except TopUpOutOfTurn:
            continue  # nothing has moved
        except TooLittleMoney as error:
            has, currency = await ledger.balance(account.address), term.ledger.currency
            raise NoMoney(
                f"This adds {format_money(micro)} {currency}, and your account {address_text(account.address)} has "
                f"{format_money(has)}: deposit more (`shoal account deposit`), or add less."
            ) from error
    raise TopUpOutOfTurn(f"{TOP_UPS_TRIED} times another top-up of {found.name} came first; nothing was added by this.")


async def _topped_up(command: TopUp, before: Escrow, term: TermPayments, ledger: Ledger, clock: Clock) -> Escrow:
    """What is signed is done once: where an answer is lost, the same is handed in again. Raises TopUpOutOfTurn where
    another one came first, and this one never will be done."""
    trouble: ShoalError | None = None
    lost = False
    for wait_s in (*ASKED_AGAIN_S, 0.0):
        try:
            await ledger.apply(command)
            return topped_up(before, command.order, before.opened_ms)[0]
        except TopUpOutOfTurn as error:
            trouble = error
            break
        except LinkError as error:
            trouble, lost = error, lost or isinstance(error, OutcomeUnknown)
            await clock.sleep(wait_s)
    assert trouble is not None
    if lost:
        try:
            after = await _found(term, ledger)
        except LinkError as error:
            raise OutcomeUnknown(
                f"{format_money(command.order.amount_micro)} was to be added, and it is not known whether it was: look "
                "at `shoal account statement` before you add it again."
            ) from error
        if after.added_micro - before.added_micro >= command.order.amount_micro:
            return after
    raise trouble


async def _found(term: TermPayments, ledger: Ledger) -> Escrow:
    found = await ledger.escrow(term.escrow)
    if found is None:
        raise UnknownEscrow(f"The ledger has no escrow {term.escrow.hex()[:12]}: it never came to be.")
    return found


def _ends_with(escrow: Escrow, more_micro: int, now_ms: int) -> int:
    """Later by as much as there is more in it, as far as ledger and nodes go along."""
    lasts_ms = escrow.terms.expires_ms - escrow.opened_ms
    ends_ms = escrow.ends_ms + lasts_ms * more_micro // escrow.terms.amount_micro
    latest_ms = min(escrow.terms.expires_ms + EXTENSION_MAX_MS, now_ms + ENDS_MOST_MS)
    return max(escrow.ends_ms, min(ends_ms, latest_ms))


async def redeem(one: PaidNode, ledger: Ledger) -> None:
    """On behalf of a node that may be gone: whoever brings a voucher, its payee gets the money."""
    if one.voucher is not None:
        with contextlib.suppress(OldVoucher):  # the node has brought it already
            await ledger.apply(Redeem(one.voucher))
