"""Hours that a node sells in an auction: promised with its Ask, kept for the buyer once the batch is cleared.

A trade is the buyer's to claim: with the money set aside, before the promise lapses. The node then signs a Hold of the
whole hour, from its beginning, which is as binding as any other (`protocol.holds.sold_twice`). Who has bought an hour
and passes it on gives it back to the node; whoever has it then claims it in the same way.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from shoal.identity import short_id
from shoal.identity.accounts import address_text
from shoal.ledger.escrows import Escrow
from shoal.market.batches import HORIZON_MS
from shoal.market.bids import FOR_CLAIMS_MS, bid_of
from shoal.market.holds import (
    HoldRefused,
    Hour,
    Kept,
    Slots,
    Terms,
    check_escrow,
    is_free,
    next_number,
    now_or_refuse,
    released,
)  # fmt: skip
from shoal.market.publishing import Verified
from shoal.protocol.holds import Hold
from shoal.protocol.orders import HOUR_MS, Ask, bid_quote
from shoal.protocol.prices import Price
from shoal.quantities.money import format_money


@dataclass(frozen=True)
class Sale:
    """A trade of a batch that was cleared again, by which somebody has a node's hour."""

    batch: int
    start_ms: int
    seller: bytes
    buyer: bytes
    price_micro: int
    payee: bytes
    escrow: bytes
    """Of the buyer's Bid, and what that has to be for."""
    quote: bytes


def sale_of(checked: Verified, node: bytes, start_ms: int) -> Sale | None:
    """None where this hour was not traded in this batch."""
    for market in checked.outcome.cleared:
        for trade in market.trades if market.block.start_ms == start_ms else ():
            if trade.node == node:
                bid = bid_of(checked, trade.buyer, market.block)
                return Sale(
                    checked.batch.number, start_ms, trade.seller, trade.buyer, market.price_micro, trade.payee,
                    bid.escrow, bid_quote(bid.terms, bid.blocks, trade.buyer),
                )  # fmt: skip
    return None


def hour_at(slots: Slots, start_ms: int) -> Hour | None:
    return next((hour for hour in slots.hours if hour.start_ms == start_ms), None)


def promise(slots: Slots, ask: Ask, order: bytes, auction: str, terms: Terms, now_ms: int) -> Slots:
    """The node is about to sell an hour in a batch. An Ask for the same hour that did not trade is replaced: whether it
    did is for the caller to find out. Raises HoldRefused."""
    now_ms = now_or_refuse(slots, now_ms)
    block, start_ms = ask.terms.block, ask.terms.block.start_ms
    if block.ledger != terms.ledger or ask.payee != terms.payee:
        raise HoldRefused(
            f"This node is paid at {address_text(terms.payee)}, at the ledger that its offer names; its hour cannot be "
            "sold for elsewhere."
        )
    if not now_ms < start_ms <= now_ms + HORIZON_MS:
        raise HoldRefused("An hour is promised before it begins, and at most 30 days ahead.")
    known = hour_at(slots, start_ms)
    if known is not None and known.kept is not None and known.binds(now_ms):
        raise HoldRefused(f"This hour was sold in batch {known.batch}: {short_id(known.kept.hold.client)} has it.")
    others = tuple(hour for hour in slots.hours if hour is not known and hour.ends_ms > now_ms)
    slots = msgspec.structs.replace(slots, now_ms=now_ms, hours=others)
    slot = next(
        (one for one in reversed(range(terms.slots)) if is_free(slots, one, start_ms, start_ms + HOUR_MS, now_ms)), None
    )
    if slot is None:
        raise HoldRefused("All slots of this node are held until that hour has begun.")
    lapses_ms = min(ask.terms.expires_ms + FOR_CLAIMS_MS, start_ms)
    hour = Hour(slot=slot, start_ms=start_ms, auction=auction, batch=ask.terms.batch, order=order, lapses_ms=lapses_ms)
    return msgspec.structs.replace(slots, hours=(*others, hour))


def hour_of(slots: Slots, start_ms: int, batch: int) -> Hour:
    """An hour that somebody claims by a trade of this batch. Raises HoldRefused where no trade of that could count, and
    so nobody need look into it."""
    hour = hour_at(slots, start_ms)
    if hour is None:
        raise HoldRefused("This node has not promised that hour to any auction, or it is over.")
    if batch < hour.batch or (hour.kept is None and batch != hour.batch):
        done = "promised to" if hour.kept is None else "sold in"
        raise HoldRefused(f"That hour was {done} batch {hour.batch}; this is batch {batch}.")
    return hour


def claim(slots: Slots, sale: Sale, escrow: Escrow | None, terms: Terms, now_ms: int) -> Hold:
    """The Hold to be signed for the buyer of an hour; the one that it has, where it has one. Raises HoldRefused."""
    now_ms = now_or_refuse(slots, now_ms)
    hour, ends_ms = hour_of(slots, sale.start_ms, sale.batch), sale.start_ms + HOUR_MS
    kept = hour.kept.hold if hour.kept is not None else None
    if kept is not None and kept.client == sale.buyer and hour.binds(now_ms):
        return kept
    if now_ms >= sale.start_ms:
        raise HoldRefused("That hour has begun; what was bought is claimed before.")
    if kept is None and not hour.binds(now_ms):
        raise HoldRefused(
            f"That hour was promised to batch {hour.batch}, to be claimed in {FOR_CLAIMS_MS // 60_000} min, and that "
            "time is over."
        )
    if kept is not None and (sale.seller != kept.client or sale.batch == hour.batch):
        raise HoldRefused(f"{short_id(kept.client)} has bought that hour in batch {hour.batch}, and has not passed it "
                          "on in this one.")  # fmt: skip
    if kept is not None and not hour.given_back:
        raise HoldRefused(
            f"{short_id(kept.client)} has passed that hour on, and has not given it back yet; ask again later."
        )
    if not is_free(_without(slots, hour), hour.slot, sale.start_ms, ends_ms, now_ms):
        raise HoldRefused("The slot of that hour has been promised otherwise since it was given back.")
    if escrow is None:
        raise HoldRefused("The ledger has no such escrow.")
    if escrow.terms.quote != sale.quote:
        raise HoldRefused(f"{escrow.name} was not set aside for the bid that has bought this hour.")
    hold = Hold(
        slot=hour.slot, number=next_number(slots, now_ms), client=sale.buyer, work="train", from_ms=sale.start_ms,
        until_ms=ends_ms, price=Price(sale.price_micro, terms.ledger.currency), ledger=terms.ledger,
        payer=escrow.terms.payer, payee=sale.payee, escrow=escrow.escrow_id,
        reclaim_notice_ms=terms.reclaim_notice_ms,
        released=released(slots, hour.slot, now_ms),
    )  # fmt: skip
    if check_escrow(escrow, sale.payee, terms, sale.start_ms, now_ms) < ends_ms:
        raise HoldRefused(f"{escrow.name} ends before the hour that it is to pay for.")
    if escrow.most_for(sale.payee) < sale.price_micro:
        raise HoldRefused(
            f"{escrow.name} has {format_money(escrow.most_for(sale.payee))} for {address_text(sale.payee)}, and the "
            f"hour costs {format_money(sale.price_micro)}."
        )
    return hold


def sold(slots: Slots, sale: Sale, hold: Hold, hold_id: bytes, now_ms: int) -> Slots:
    """A Hold that was claimed is about to be given away."""
    hour = hour_at(slots, sale.start_ms)
    assert hour is not None
    bought = msgspec.structs.replace(hour, batch=sale.batch, kept=Kept(hold, hold_id), given_back=False)
    return msgspec.structs.replace(
        _without(slots, hour), number=max(slots.number, hold.number), now_ms=max(slots.now_ms, now_ms),
        hours=(*_without(slots, hour).hours, bought),
    )  # fmt: skip


def _without(slots: Slots, hour: Hour) -> Slots:
    return msgspec.structs.replace(slots, hours=tuple(one for one in slots.hours if one is not hour))
