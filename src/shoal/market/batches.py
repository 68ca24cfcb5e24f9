"""Batches of orders: which of them count, who gets which block at what price, and what is left to the next batch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta

from shoal.errors import BadRecord
from shoal.identity import Hash, NodeId, blake3_hash, hash_of_parts, short_id
from shoal.identity.accounts import Address
from shoal.market.auction import Limit, crossed
from shoal.protocol.offers import UnixMs
from shoal.protocol.orders import (
    HOUR_MS,
    Ask,
    Batch,
    Bid,
    Block,
    Cleared,
    LeftOut,
    LimitPrice,
    NodeClass,
    Order,
    Purchase,
    Resale,
    Trade,
    Why,
)
from shoal.quantities.money import format_money

HORIZON_MS = 30 * 24 * HOUR_MS
"""So far ahead hours are traded."""
HELD_MAX = 65_536
"""Blocks that are sold and have not begun; more are not sold."""
BEGINNING = bytes(32)
"""What the first batch follows."""
_encoder = msgspec.msgpack.Encoder()


class BadBatch(BadRecord):
    """A batch, or what it is said to come to, is not what follows from its orders and the batch before."""

    code = "SH-290"


class Held(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A node's hour that was sold."""

    start_ms: UnixMs
    node: NodeId
    holder: NodeId
    batch: Annotated[int, Meta(ge=1)]
    """In which its holder bought it."""
    block: Hash
    """As which: see `block_hash`."""
    price_micro: LimitPrice
    """For how much."""
    payee: Address
    """Where its node is paid."""


class Carried(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a batch leaves to the next one."""

    number: Annotated[int, Meta(ge=0)] = 0
    closed_ms: Annotated[int, Meta(ge=-1)] = -1
    next_seed_hash: Hash = BEGINNING
    held: Annotated[tuple[Held, ...], Meta(max_length=HELD_MAX)] = ()
    """By hour and node."""

    def hash(self) -> bytes:
        return hash_of_parts("market/carried/1", (_encoder.encode(self),))


@dataclass(frozen=True, slots=True)
class Signed:
    """An order, and whose."""

    id: bytes
    trader: bytes
    order: Order


@dataclass(frozen=True)
class Outcome:
    """What a batch comes to, with a sentence for everybody."""

    cleared: tuple[Cleared, ...]
    left_out: tuple[LeftOut, ...]
    after: Carried
    markets: Mapping[bytes, str]
    """What was said of each market in which there was an order, by `block_hash`."""
    reasons: Mapping[bytes, str]
    """What became of each order, by its id."""


def block_hash(block: Block) -> bytes:
    return hash_of_parts("market/block/1", (_encoder.encode(block),))


def lot_of(seed: bytes, block: bytes, trader: bytes) -> bytes:
    """Whose turn it is where limits do not decide: known to nobody who signs an order, as `seed` is not, and the same
    whatever the order says."""
    return hash_of_parts("market/lot/1", (seed, block, trader))


def described(block: Block) -> str:
    """`H100 80 GiB, DE, open, 2026-11-27T14:00 UTC`."""
    of: NodeClass = block.of
    start = np.datetime_as_string(np.datetime64(block.start_ms, "ms"), unit="m")
    name = f"{of.devices} x {of.device}" if of.devices > 1 else of.device
    return f"{name} {of.memory_gib} GiB, {of.country or 'anywhere'}, {of.tier}, {start} UTC"


def clear(carried: Carried, batch: Batch, auctioneer: bytes, orders: Iterable[Signed]) -> Outcome:
    """What a batch of these orders comes to, in whichever order they are given. Raises BadBatch where it does not
    follow what was carried over, or names other orders."""
    by_id = {one.id: one for one in orders}
    _check_follows(carried, batch, by_id)
    names = {block: block_hash(block) for block in {one.order.terms.block for one in by_id.values()}}
    held = {(one.start_ms, one.node): one for one in carried.held if one.start_ms > batch.closed_ms}
    refused = _refused(list(by_id.values()), batch, auctioneer, held, names)
    left_out = {order: why for order, (why, _) in refused.items()}
    reasons = {order: reason for order, (_, reason) in refused.items()}
    in_market: dict[Block, list[Signed]] = defaultdict(list)
    for one in by_id.values():
        if one.id not in refused:
            in_market[one.order.terms.block].append(one)

    cleared, markets = [], {}
    for block, there in sorted(in_market.items(), key=lambda item: (item[0].start_ms, names[item[0]])):
        lots = {one.id: lot_of(batch.seed, names[block], one.trader) for one in there}
        there.sort(key=lambda one: lots[one.id])
        bids, asks = ([one for one in there if isinstance(one.order, Bid) is buys] for buys in (True, False))
        limits = {one.id: Limit(_size(one.order), one.order.terms.limit_micro, lots[one.id]) for one in there}
        crossing = crossed([limits[one.id] for one in bids], [limits[one.id] for one in asks], block.ledger.currency)
        markets[names[block]] = f"{described(block)}: {crossing.reason}"
        buyers, sellers = [], []
        for one, fill in zip([*bids, *asks], [*crossing.bids, *crossing.asks], strict=True):
            reasons[one.id] = f"{fill.blocks} of {_size(one.order)} blocks. {fill.reason}"
            if fill.why is not None:
                left_out[one.id] = fill.why
            if isinstance(one.order, Bid):
                buyers += [one.trader] * fill.blocks
            else:
                sellers += [(one.trader, *hour) for hour in _hours(one, held)[: fill.blocks]]
        trades = tuple(Trade(buyer, *seller) for buyer, seller in zip(buyers, sellers, strict=True))
        if crossing.price_micro is not None:
            cleared.append(Cleared(block=block, price_micro=crossing.price_micro, trades=trades))
        for trade in trades:
            held[block.start_ms, trade.node] = Held(
                block.start_ms, trade.node, trade.buyer, batch.number, names[block], cleared[-1].price_micro,
                trade.payee,
            )  # fmt: skip
    after = Carried(
        number=batch.number,
        closed_ms=batch.closed_ms,
        next_seed_hash=batch.next_seed_hash,
        held=tuple(held[at] for at in sorted(held)),
    )
    return Outcome(tuple(cleared), tuple(LeftOut(*one) for one in sorted(left_out.items())), after, markets, reasons)


class Gathering:
    """The orders of a batch that is open, each of which would count if it was closed with those that came before it."""

    def __init__(self, carried: Carried, auctioneer: bytes) -> None:
        self.number = carried.number + 1
        self._auctioneer = auctioneer
        self._held = {(one.start_ms, one.node): one for one in carried.held}
        self._sequences: dict[tuple[bytes, bytes], int] = {}

    def refusal(self, one: Signed, closes_ms: int) -> str | None:
        """Why an order would not count, or would keep another of its trader's from counting, if this batch was closed
        at that time; None where it would count."""
        name = block_hash(one.order.terms.block)
        trouble = _trouble(one, self.number, closes_ms, self._auctioneer, self._held, name)
        if trouble is not None:
            return trouble[1]
        sequence = one.order.terms.sequence
        most = max(self._sequences.get(key, -1) for key in _excluding(one, name))
        if most >= sequence:
            return (
                f"Trader {short_id(one.trader)} has given order {most} for this already, which order {sequence} does "
                "not replace: give it a higher sequence."
            )
        return None

    def add(self, one: Signed) -> None:
        """One that is not refused, or was taken already."""
        for key in _excluding(one, block_hash(one.order.terms.block)):
            self._sequences[key] = max(self._sequences.get(key, -1), one.order.terms.sequence)


def _check_follows(carried: Carried, batch: Batch, orders: Mapping[bytes, Signed]) -> None:
    said = f"Batch {batch.number}"
    if batch.number != carried.number + 1:
        raise BadBatch(f"{said} does not follow batch {carried.number}.")
    if batch.closed_ms <= carried.closed_ms:
        raise BadBatch(f"{said} was closed at {batch.closed_ms} ms, and the one before it at {carried.closed_ms} ms.")
    if batch.number == 1 and batch.orders:
        raise BadBatch(f"{said} has orders: the first only says the hash of the next one's seed.")
    if batch.number > 1 and blake3_hash(batch.seed) != carried.next_seed_hash:
        raise BadBatch(f"{said} draws lots from another seed than the batch before it has promised.")
    named = set(batch.orders)
    if batch.orders != tuple(sorted(named)):
        raise BadBatch(f"{said} does not name its orders once each, in ascending order.")
    for order in sorted(named ^ orders.keys()):
        what = "names an order that is not there" if order in named else "does not name an order that came with it"
        raise BadBatch(f"{said} {what}: {short(order)}.")


def _refused(
    orders: list[Signed],
    batch: Batch,
    auctioneer: bytes,
    held: Mapping[tuple[int, bytes], Held],
    names: Mapping[Block, bytes],
) -> dict[bytes, tuple[Why, str]]:
    """Those that do not count, by id, and why."""
    refused: dict[bytes, tuple[Why, str]] = {}
    counted: list[tuple[Signed, list[tuple[bytes, bytes]]]] = []
    sequences: dict[tuple[bytes, bytes], list[int]] = defaultdict(list)
    for one in orders:
        name = names[one.order.terms.block]
        trouble = _trouble(one, batch.number, batch.closed_ms, auctioneer, held, name)
        if trouble is not None:
            refused[one.id] = trouble
            continue
        keys = _excluding(one, name)
        counted.append((one, keys))
        for key in keys:
            sequences[key].append(one.order.terms.sequence)
    highest = {key: max(found) for key, found in sequences.items()}
    for one, keys in counted:
        sequence, most = one.order.terms.sequence, max(highest[key] for key in keys)
        who = f"trader {short_id(one.trader)}"
        if most > sequence:
            refused[one.id] = "replaced", f"Order {sequence} of {who} was replaced by its order {most}."
        elif any(sequences[key].count(sequence) > 1 for key in keys):
            reason = f"There are several orders {sequence} of {who} that exclude one another, so none of them counts. "
            refused[one.id] = "twice", reason + "Give each a higher sequence, and each process a key of its own."
    asks = [one for one, _ in counted if one.id not in refused and isinstance(one.order, Ask)]
    asks.sort(key=lambda one: lot_of(batch.seed, BEGINNING, one.trader + names[one.order.terms.block]))
    for one in asks[HELD_MAX - len(held) :]:
        refused[one.id] = "no-room", f"{len(held)} blocks are sold and have not begun; at most {HELD_MAX} may be."
    return refused


def _excluding(one: Signed, name: bytes) -> list[tuple[bytes, bytes]]:
    """Orders that share one of these exclude one another: one of a trader counts in a market (`name` is its block's),
    and one of a node's hour in all markets."""
    market = (one.trader, name)
    if isinstance(one.order, Ask):
        return [market, (one.trader, one.order.terms.block.start_ms.to_bytes(8))]
    return [market]


def _trouble(
    one: Signed, number: int, closed_ms: int, auctioneer: bytes, held: Mapping[tuple[int, bytes], Held], name: bytes
) -> tuple[Why, str] | None:
    """Why an order does not count, whatever others there are; `name` is its block's."""
    terms = one.order.terms
    start_ms = terms.block.start_ms
    if terms.auctioneer != auctioneer:
        return "elsewhere", f"It is for the auctioneer {short_id(terms.auctioneer)}, not for {short_id(auctioneer)}."
    if terms.batch != number:
        return "other-batch", f"It is for batch {terms.batch}; this is {number}. Sign another one for the next."
    if terms.expires_ms < closed_ms:
        return "expired", f"It had expired {closed_ms - terms.expires_ms} ms before the batch was closed."
    if start_ms <= closed_ms:
        return "begun", f"Its hour had begun {closed_ms - start_ms} ms before the batch was closed."
    if start_ms > closed_ms + HORIZON_MS:
        return "too-far", f"Its hour is more than {HORIZON_MS // HOUR_MS} hours after the batch was closed."
    if isinstance(one.order, Ask) and (sold := held.get((start_ms, one.trader))) is not None:
        reason = (
            f"This hour of node {short_id(one.trader)} was sold in batch {sold.batch}; {short_id(sold.holder)} has it."
        )
        return "sold", reason
    if isinstance(one.order, Resale):
        for purchase in one.order.purchases:
            reason = _not_held(purchase, one.trader, held.get((start_ms, purchase.node)), name)
            if reason:
                return "not-held", reason
        if len({purchase.node for purchase in one.order.purchases}) < len(one.order.purchases):
            return "not-held", "It names one block twice."
        paid = max(held[start_ms, purchase.node].price_micro for purchase in one.order.purchases)
        if terms.limit_micro < paid:
            return "under-price", (
                f"Its node was promised {format_money(paid)} for this hour, and would get as little as "
                f"{format_money(terms.limit_micro)}: pass it on for what it cost at least."
            )
    return None


def _not_held(purchase: Purchase, trader: bytes, held: Held | None, name: bytes) -> str:
    """Why a trader cannot sell what it says to have bought; nothing where it can."""
    hour = f"This hour of node {short_id(purchase.node)}"
    if held is None:
        return f"{hour} was not sold in an earlier batch."
    if held.holder != trader:
        return f"{hour} is held by {short_id(held.holder)} since batch {held.batch}; {short_id(trader)} cannot sell it."
    if held.batch != purchase.batch:
        return f"{hour} was bought by {short_id(trader)} in batch {held.batch}, not in {purchase.batch}."
    if held.block != name:
        return f"{hour} was bought as of another class, or at another ledger; it can be sold only as what it was."
    return ""


def _size(order: Order) -> int:
    """Blocks that it asks for, or offers."""
    return order.blocks if isinstance(order, Bid) else len(order.purchases) if isinstance(order, Resale) else 1


def _hours(one: Signed, held: Mapping[tuple[int, bytes], Held]) -> list[tuple[bytes, bytes]]:
    """Whose hours somebody sells, and where those nodes are paid."""
    if isinstance(one.order, Ask):
        return [(one.trader, one.order.payee)]
    assert isinstance(one.order, Resale)
    start_ms = one.order.terms.block.start_ms
    return [(each.node, held[start_ms, each.node].payee) for each in one.order.purchases]


def short(order: bytes) -> str:
    """An order's id, for people."""
    return order.hex()[:12]
