"""The money behind a bid: set aside before it is signed, for that bid alone; what it is for once the batch is cleared.

All that a bid may cost is in one escrow from the beginning. It is locked for as long as the bid may count, so that no
bid sets a price with money that is gone by then. Until the batch is cleared its only payee is the buyer, to whom all of
it goes back where nothing is bought. Of what is bought the nodes become payees, each for what its hours
cost and no more, and what is above that goes back. Each step follows from how the escrow stands at the ledger, so that
whoever was stopped between two of them goes on with the next.
"""

from __future__ import annotations

from collections.abc import Mapping

from shoal.identity.accounts import AccountKey
from shoal.ledger.commands import Admit, Close, Command, Finish, Redeem
from shoal.ledger.escrows import Escrow, Paid, State
from shoal.market.publishing import Verified
from shoal.protocol.money import Admission, Closing, EscrowTerms, Finished, LedgerName, Payee, Voucher, sign_voucher
from shoal.protocol.orders import HOUR_MS, Bid, Block, OrderTerms, bid_quote
from shoal.quantities.money import format_money

FOR_CLAIMS_MS = HOUR_MS
"""For so long after an order has expired, and until its hour begins, a node keeps an hour for whoever has bought it."""
AFTER_MS = HOUR_MS
"""An escrow ends so long after its hour, when last vouchers were redeemed."""
NOTICE_MS, AUDIT_MS = 60_000, HOUR_MS
HOLDBACK_PPM = 100_000

Step = Admission | Voucher | Finished | Closing
"""For the payer to sign; of a Finished it is the payee, too."""


def terms_for(
    terms: OrderTerms, blocks: int, trader: bytes, payer: bytes, nonce: bytes, fee_ppm: int = 0
) -> EscrowTerms:
    """Of the escrow in which a buyer sets aside what its Bid may cost; `fee_ppm` is what the ledger takes now."""
    return EscrowTerms(
        payer=payer, signer=payer, cap_micro=0, auditor=payer, amount_micro=terms.limit_micro * blocks, fee_ppm=fee_ppm,
        holdback_ppm=HOLDBACK_PPM, notice_ms=NOTICE_MS, audit_ms=AUDIT_MS,
        expires_ms=terms.block.start_ms + HOUR_MS + AFTER_MS, payees=(Payee(payer, 0),),
        quote=bid_quote(terms, blocks, trader), nonce=nonce,
        locked_until_ms=min(terms.expires_ms, terms.block.start_ms),
    )  # fmt: skip


def say_unfunded(bid: Bid, trader: bytes, escrow: Escrow | None) -> str | None:
    """Why a bid's escrow does not do, if it does not: so a bid that nobody could pay sets no price."""
    if escrow is None:
        return "The ledger has no escrow of the name that this bid says."
    terms, amount = escrow.terms, bid.terms.limit_micro * bid.blocks
    if terms != terms_for(bid.terms, bid.blocks, trader, terms.payer, terms.nonce, terms.fee_ppm):
        return f"{escrow.name} is not for this bid: it has other terms than a bid of {format_money(amount)} in all."
    if escrow.state is not State.OPEN or escrow.closing or escrow.redeemed_micro or escrow.admitted:
        return f"{escrow.name} is not untouched any more: set the money for this bid aside anew."
    return None


def bid_of(checked: Verified, buyer: bytes, block: Block) -> Bid:
    """By which somebody bought something in a batch: of a trader's orders for a block only one counts."""
    why = {left.order: left.why for left in checked.outcome.left_out}
    return next(
        one.order
        for one in checked.orders
        if isinstance(one.order, Bid)
        and (one.trader, one.order.terms.block) == (buyer, block)
        and why.get(one.id) in (None, "lot")
    )


def next_step(escrow: Escrow, owed: Mapping[bytes, int], work: bytes) -> Step | None:
    """What the payer has to sign next, so that an escrow has what its hours cost, and nothing else: `owed` is how much
    each node's account may get of it; `work` is the id of the bid. None where nothing is left to do."""
    payer, name = escrow.terms.payer, escrow.escrow_id
    if escrow.state is not State.OPEN:
        return None
    mine = escrow.paid.get(payer, Paid())
    if not owed:
        if escrow.payees == {payer} and not mine.finished:
            return Finished(name, payer, mine.redeemed_micro)
        return None if escrow.closing else Closing(name)
    others = {payee: most for payee, most in owed.items() if payee != payer}
    for payee, most in sorted(others.items()):
        if (escrow.most_of(payee) or 0) < most:
            return Admission(name, payee, most)
    if escrow.terms.fee_ppm:  # it would be taken of what goes back now, and is not with the end
        return Admission(name, payer, owed[payer]) if (escrow.most_of(payer) or 0) < owed.get(payer, 0) else None
    spare = escrow.amount_micro - sum(others.values())
    if spare > (escrow.most_of(payer) or 0):
        return Admission(name, payer, spare)
    if spare > mine.redeemed_micro and payer not in owed:  # what a node of its own earns is not told apart from that
        return Voucher(escrow=name, payee=payer, amount_micro=spare, work=work)
    return None


def signed(step: Step, account: AccountKey, ledger: LedgerName) -> Command:
    """What the ledger is asked for then."""
    if isinstance(step, Voucher):
        return Redeem(sign_voucher(account, ledger, step))
    signature = account.sign(step.digest(ledger))
    match step:
        case Admission():
            return Admit(step, signature)
        case Finished():
            return Finish(step, signature)
        case Closing():
            return Close(step, signature)
