"""For whom a node keeps its slots: what it may promise, so that it never promises one slot to two clients at once.

A node keeps a `Slots` on its disk and changes it before it answers. Every function here returns what it decides, or
raises HoldRefused with the reason. What is sold now, for its posted price, ends before an hour begins that the node has
promised or sold in an auction (`hours`).
"""

from __future__ import annotations

from collections import Counter
from typing import Annotated

import msgspec
from msgspec import Meta

from shoal.errors import JobError
from shoal.identity import Hash, short_id
from shoal.identity.accounts import Address, address_text
from shoal.ledger.escrows import Escrow, Paid, State
from shoal.protocol.holds import LEASE_STEP_MS, RELEASES_MAX, SLOTS_MAX, Hold, HoldAsk, Release
from shoal.protocol.money import DAY_MS, TIME_MAX_MS, LedgerName
from shoal.protocol.offers import ReclaimNoticeMs, UnixMs
from shoal.protocol.orders import HOUR_MS
from shoal.protocol.prices import Price
from shoal.quantities.money import format_money

LEASE_LEAST_MS = 60_000
"""What is left of an escrow at least when work for it begins."""

HOURS_MAX = 1024
"""That a node promises ahead: more than there are in the 30 days for which hours are traded."""
CLOCK_BACK_MAX_MS = 10_000
"""As clocks are put right by; it is waited for."""


class HoldRefused(JobError):
    """A node does not keep a place for whoever asked."""

    code = "SH-606"


class Kept(msgspec.Struct, frozen=True):
    """The newest Hold of a slot."""

    hold: Hold
    hold_id: Hash


class PendingRelease(msgspec.Struct, frozen=True):
    """A client gave a slot back before its Hold was over: later Holds name this, until it would have been over."""

    slot: int
    until_ms: UnixMs
    packed: bytes


class Hour(msgspec.Struct, frozen=True, kw_only=True):
    """An hour of a slot for which the node has signed an Ask, and for whom it keeps it once it is sold."""

    slot: int
    start_ms: UnixMs
    auction: str
    """Its ticket."""
    batch: int
    order: Hash
    """The Ask."""
    lapses_ms: UnixMs
    """From then on the hour is not promised any more, unless it is sold."""
    kept: Kept | None = None
    """Its buyer's Hold."""
    given_back: bool = False
    """By that buyer, who may have passed it on."""

    @property
    def ends_ms(self) -> int:
        return self.start_ms + HOUR_MS

    def binds(self, now_ms: int) -> bool:
        """Nobody else gets this hour."""
        return not self.given_back and now_ms < (self.lapses_ms if self.kept is None else self.ends_ms)


class Slots(msgspec.Struct, frozen=True):
    number: int = 0
    """Of the newest Hold that was signed."""
    now_ms: UnixMs = 0
    """The latest moment that was seen: the clock may go back, and what was promised stays so."""
    kept: Annotated[tuple[Kept, ...], Meta(max_length=SLOTS_MAX)] = ()
    """One a slot; also those whose time is over, until the slot is held anew."""
    pending: tuple[PendingRelease, ...] = ()
    hours: Annotated[tuple[Hour, ...], Meta(max_length=HOURS_MAX)] = ()


class Terms(msgspec.Struct, frozen=True, kw_only=True):
    """On which a node sells."""

    price: Price
    ledger: LedgerName
    payee: Address
    slots: int = 1
    reclaim_notice_ms: ReclaimNoticeMs = 0
    works: tuple[str, ...] = ("train", "serve")
    holdback_max_ppm: int = 300_000
    audit_max_ms: int = 7 * DAY_MS
    notice_least_ms: int = 30_000
    """It redeems its newest voucher in less, when the client asks for the rest."""
    fee_max_ppm: int = 100_000
    lasts_max_ms: int = 31 * DAY_MS
    """Of an escrow: what is held back waits for its end."""


def held(slots: Slots, now_ms: int) -> list[Kept]:
    """What is promised at a moment: by the newest Hold of each slot."""
    now_ms = max(now_ms, slots.now_ms)
    newest = [one for one in slots.kept if one.hold.until_ms > now_ms]
    known = {one.hold.slot for one in newest}
    begun = (hour.kept for hour in slots.hours if hour.binds(now_ms) and hour.start_ms <= now_ms)
    return [*newest, *(one for one in begun if one is not None and one.hold.slot not in known)]


def is_free(slots: Slots, slot: int, from_ms: int, until_ms: int, now_ms: int) -> bool:
    """Whether nobody is promised anything of a slot in this time, which begins now or later."""
    return not any(one.hold.slot == slot and one.hold.until_ms > from_ms for one in slots.kept) and not any(
        hour.slot == slot and hour.binds(now_ms) and hour.start_ms < until_ms and from_ms < hour.ends_ms
        for hour in slots.hours
    )


def taken(slots: Slots, now_ms: int) -> list[Kept]:
    """Of what is promised, that for which money is set aside."""
    return [one for one in held(slots, now_ms) if one.hold.escrow is not None]


def hold_of(slots: Slots, client: bytes, now_ms: int) -> Kept | None:
    return next((one for one in held(slots, now_ms) if one.hold.client == client), None)


def promised(slots: Slots, client: bytes, now_ms: int) -> Kept:
    """What is held for a client. Raises HoldRefused."""
    known = hold_of(slots, client, now_ms)
    if known is None:
        raise HoldRefused(f"No slot is held for {short_id(client)}, or not any more; ask for one.")
    return known


def ask(
    slots: Slots, wanted: HoldAsk, client: bytes, terms: Terms, unheld: int, now_ms: int, closes_ms: int | None = None
) -> Hold:
    """The Hold to be signed for whoever asks; the one it has, where it has one. `unheld` slots are taken by work that
    nobody holds a place for; `closes_ms` is when the node's owner takes it back. Raises HoldRefused."""
    now_ms = now_or_refuse(slots, now_ms)
    refuse_closing(closes_ms, now_ms)
    if wanted.work not in terms.works:
        raise HoldRefused(f"This node takes no {wanted.work} jobs for money; it takes {', '.join(terms.works)}.")
    if wanted.ledger != terms.ledger:
        raise HoldRefused("This node is paid at another ledger than the one that was named; its offer names it.")
    taken = {one.hold.slot for one in held(slots, now_ms)}
    known = hold_of(slots, client, now_ms)
    price = known.hold.price if known else terms.price
    if wanted.price != price:
        raise HoldRefused(
            f"This node costs {_per_h(price)}, and was asked for {_per_h(wanted.price)}: its price has changed. "
            "Look at its newest offer."
        )
    if known is not None:
        return known.hold
    for lapsed in (one.hold for one in slots.kept if one.hold.client == client and one.hold.escrow is None):
        rests_ms = 2 * lapsed.until_ms - lapsed.from_ms - now_ms
        if rests_ms > 0:
            raise HoldRefused(
                f"Slot {lapsed.slot} was held for {short_id(client)} and not taken; it may ask again in "
                f"{rests_ms / 1000:.0f} s, or give back next time what it does not take."
            )
    until_ms = now_ms + wanted.lifetime_ms
    free = [slot for slot in range(terms.slots) if is_free(slots, slot, now_ms, until_ms, now_ms)]
    if len(free) <= unheld and len(free) < terms.slots - len(taken):
        raise HoldRefused("An hour of this node begins that it has promised in an auction; take another node.")
    if len(free) <= unheld:
        until = min((one.hold.until_ms for one in held(slots, now_ms)), default=now_ms)
        raise HoldRefused(
            f"All {terms.slots} slots of this node are taken: {len(taken)} held, the next of them for "
            f"{max(0, until - now_ms) / 1000:.0f} s more, and {unheld} in use."
        )
    # Those who gave it back early are named in its Hold, and only so many can be: what they had is shared among slots.
    named = Counter(one.slot for one in slots.pending)
    slot = min(free, key=lambda one: named[one])
    return Hold(
        slot=slot, number=next_number(slots, now_ms), client=client, work=wanted.work, from_ms=now_ms,
        until_ms=until_ms, price=terms.price, ledger=terms.ledger, payer=wanted.payer, payee=terms.payee,
        reclaim_notice_ms=terms.reclaim_notice_ms, released=released(slots, slot, now_ms),
    )  # fmt: skip


def take(
    slots: Slots, client: bytes, escrow: Escrow | None, terms: Terms, now_ms: int, closes_ms: int | None = None
) -> Hold:
    """The Hold to be signed once there is money for one, and again to make it last: not past `closes_ms`, at which the
    node's owner takes it back. Raises HoldRefused."""
    now_ms = now_or_refuse(slots, now_ms)
    known = promised(slots, client, now_ms)
    if escrow is None:
        raise HoldRefused("The ledger has no such escrow.")
    if known.hold.escrow != escrow.escrow_id:
        refuse_closing(closes_ms, now_ms)
    if escrow.terms.payer != known.hold.payer:
        raise HoldRefused(
            f"{escrow.name} is {address_text(escrow.terms.payer)}'s, and the slot is held for "
            f"{address_text(known.hold.payer)}."
        )
    ends_ms = check_escrow(escrow, known.hold.payee, terms, now_ms, now_ms)
    if closes_ms is not None:
        ends_ms = min(ends_ms, closes_ms)
    return msgspec.structs.replace(
        known.hold, number=next_number(slots, now_ms), from_ms=now_ms,
        until_ms=max(known.hold.until_ms, min(now_ms + LEASE_STEP_MS, ends_ms, _next_hour(slots, known.hold, now_ms))),
        escrow=escrow.escrow_id, released=released(slots, known.hold.slot, now_ms),
    )  # fmt: skip


def keep(slots: Slots, hold: Hold, hold_id: bytes) -> Slots:
    """A Hold is about to be given away."""
    others = tuple(one for one in slots.kept if one.hold.slot != hold.slot)
    now_ms = max(slots.now_ms, hold.from_ms)
    pending = tuple(one for one in slots.pending if one.until_ms > now_ms)
    hours = tuple(hour for hour in slots.hours if hour.ends_ms > now_ms)
    return Slots(max(slots.number, hold.number), now_ms, (*others, Kept(hold, hold_id)), pending, hours)


def give_back(slots: Slots, release: Release, client: bytes, packed: bytes, now_ms: int) -> Slots:
    """A client's signed Release has come. Raises HoldRefused."""
    now_ms = max(now_ms, slots.now_ms)
    theirs = [
        one
        for one in (*slots.kept, *(hour.kept for hour in slots.hours if hour.kept is not None and hour.binds(now_ms)))
        if one.hold.slot == release.slot and one.hold.client == client
    ]
    known = max(theirs, key=lambda one: (one.hold.until_ms > now_ms, one.hold.number), default=None)
    if known is None or known.hold.number != release.number:
        raise HoldRefused(
            f"{short_id(client)} gives back slot {release.slot} up to hold {release.number}, which is not the newest "
            "that it has."
        )
    pending = [one for one in slots.pending if one.slot == release.slot]
    if known.hold.until_ms <= now_ms or len(pending) >= RELEASES_MAX:
        return slots  # more cannot be named in one Hold: this one lasts until it is over
    others = tuple(one for one in slots.kept if one is not known)
    more = PendingRelease(release.slot, known.hold.until_ms, packed)
    hours = tuple(
        msgspec.structs.replace(hour, given_back=True) if _is_of(known.hold, hour) else hour for hour in slots.hours
    )
    return Slots(slots.number, now_ms, others, (*slots.pending, more), hours)


def refuse_closing(closes_ms: int | None, now_ms: int) -> None:
    """Raises HoldRefused where the node's owner takes it back."""
    if closes_ms is not None:
        raise HoldRefused(
            f"This node's owner takes it back in {max(0, closes_ms - now_ms) / 1000:.0f} s: it keeps no more places. "
            "Take another node."
        )


def next_number(slots: Slots, now_ms: int) -> int:
    """Also where what was signed before is lost: two Holds of one number convict."""
    return max(slots.number + 1, now_ms)


def now_or_refuse(slots: Slots, now_ms: int) -> int:
    """Raises HoldRefused where the clock has gone back so far that what was promised would last for too long."""
    if slots.now_ms - now_ms > CLOCK_BACK_MAX_MS:
        raise HoldRefused(
            f"This node's clock has gone back by {(slots.now_ms - now_ms) / 1000:.0f} s, and it has promised slots by "
            "the later time: it sells again when the clock is right, or has come to that time."
        )
    return max(now_ms, slots.now_ms)


def _is_of(hold: Hold, hour: Hour) -> bool:
    """Whether it is the Hold of an hour, or one with which its buyer has taken it."""
    kept = hour.kept.hold if hour.kept is not None else None
    return kept is not None and (kept.slot, kept.client, kept.until_ms) == (hold.slot, hold.client, hold.until_ms)


def _next_hour(slots: Slots, hold: Hold, now_ms: int) -> int:
    """When a Hold ends at the latest: that of a bought hour with the hour, others before an hour that is promised."""
    mine = (hour.ends_ms for hour in slots.hours if hour.kept is not None and hour.kept.hold.client == hold.client)
    others = (hour.start_ms for hour in slots.hours if hour.slot == hold.slot and hour.binds(now_ms))
    return min((at for at in (*mine, *others) if at > now_ms), default=TIME_MAX_MS)


def released(slots: Slots, slot: int, now_ms: int) -> tuple[bytes, ...]:
    return tuple(one.packed for one in slots.pending if one.slot == slot and one.until_ms > now_ms)


def check_escrow(escrow: Escrow, payee: bytes, terms: Terms, begins_ms: int, now_ms: int) -> int:
    """When it ends; that it has something for `payee` from `begins_ms`, when the work begins, until then, on the node's
    terms. Raises HoldRefused."""
    said, asked = escrow.name, escrow.terms
    if escrow.state is not State.OPEN or escrow.ends_ms - now_ms < LEASE_LEAST_MS:
        left_s = max(0, escrow.ends_ms - now_ms) / 1000 if escrow.state is State.OPEN else 0
        raise HoldRefused(f"{said} ends in {left_s:.0f} s; {LEASE_LEAST_MS / 1000:.0f} s are needed at least.")
    if escrow.most_for(payee) <= escrow.paid.get(payee, Paid()).redeemed_micro:
        raise HoldRefused(f"{said} has nothing for {address_text(payee)}, where this node is paid.")
    if asked.locked_until_ms > begins_ms:
        raise HoldRefused(f"{said} is locked: it pays nothing for the first {asked.locked_until_ms - begins_ms} ms.")
    for what, value, most_allowed in (
        ("holds back", asked.holdback_ppm, terms.holdback_max_ppm),
        ("takes a fee of", asked.fee_ppm, terms.fee_max_ppm),
    ):
        if value > most_allowed:
            raise HoldRefused(f"{said} {what} {value / 1e4:g} %, and this node agrees to {most_allowed / 1e4:g} %.")
    if asked.audit_ms > terms.audit_max_ms:
        raise HoldRefused(
            f"{said} pays what it holds back {asked.audit_ms / DAY_MS:.1f} days after its end, and this node agrees to "
            f"{terms.audit_max_ms / DAY_MS:.1f}."
        )
    if escrow.ends_ms - now_ms > terms.lasts_max_ms:
        raise HoldRefused(
            f"{said} ends in {(escrow.ends_ms - now_ms) / DAY_MS:.1f} days, and this node agrees to "
            f"{terms.lasts_max_ms / DAY_MS:.1f}, as what is held back waits for that."
        )
    if asked.notice_ms < terms.notice_least_ms:
        raise HoldRefused(
            f"{said} may end {asked.notice_ms / 1000:.1f} s after its payer asks, and this node needs "
            f"{terms.notice_least_ms / 1000:.1f} s to redeem its vouchers."
        )
    return escrow.ends_ms


def _per_h(price: Price) -> str:
    return f"{format_money(price.micro_per_h)} {price.currency}/h"
