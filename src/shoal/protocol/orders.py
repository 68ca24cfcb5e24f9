"""Orders for hours of nodes, batches of them, and what a batch came to.

What is traded is a `Block`: an hour of a node of some class, paid at some ledger. An order is good for one batch of one
auctioneer, whose number it names: it cannot be used again, held back for later, or be put before another auctioneer.
A buyer has set aside what its order may cost, in an escrow that is for this order alone; a node says where it is paid.
Whoever still wants to trade signs one for the next batch. The auctioneer signs the exact set of orders that it closes a
batch with (`Batch`) and what follows from it (`Clearing`), and anybody can compute that again (`shoal.market`).
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import msgspec
from msgspec import Meta

from shoal.errors import BadRecord
from shoal.identity import Envelope, Hash, NodeId, hash_of_parts, short_id
from shoal.identity.accounts import Address
from shoal.protocol.messages import DEFAULT_NETWORK, Record, open_record
from shoal.protocol.money import LedgerName
from shoal.protocol.offers import Country, Tier, UnixMs
from shoal.protocol.prices import PRICE_MAX_MICRO_PER_H

HOUR_MS = 3_600_000
ORDERS_MAX = 4096
"""Of a batch."""
BID_BLOCKS_MAX = 1024
RESALE_BLOCKS_MAX = 16
SOLD_MAX = ORDERS_MAX * RESALE_BLOCKS_MAX
"""Blocks that a batch sells."""

_encoder = msgspec.msgpack.Encoder()

BatchNumber = Annotated[int, Meta(ge=1, le=1 << 53)]
LimitPrice = Annotated[int, Meta(ge=1, le=PRICE_MAX_MICRO_PER_H)]
"""Millionths of a unit for a block."""


class BadOrder(BadRecord):
    """A record that should be an order is none."""

    code = "SH-291"


class NodeClass(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a buyer takes any of for any other: a node is as good as any other of its class, and of no other class."""

    device: Annotated[str, Meta(min_length=1, max_length=96)]
    """Its name, as nodes measure it."""
    devices: Annotated[int, Meta(ge=1, le=64)] = 1
    memory_gib: Annotated[int, Meta(ge=1, le=1 << 20)]
    """That each device has at least."""
    tier: Tier = "open"
    country: Country | None = None
    """None: wherever it is."""


class Block(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An hour of a node. All orders for one block are one market."""

    of: NodeClass
    start_ms: Annotated[int, Meta(ge=0, le=1 << 53, multiple_of=HOUR_MS)]
    """Unix time, on the hour."""
    ledger: LedgerName
    """Where it is paid, and so in which currency."""


class OrderTerms(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What all orders say."""

    auctioneer: NodeId
    batch: BatchNumber
    """It is good for this one and no other."""
    expires_ms: UnixMs
    """And for this one if it is closed by then: an auctioneer that keeps it open does not get to wait for its price."""
    sequence: Annotated[int, Meta(ge=0, le=1 << 53)]
    """Of several that exclude one another the highest counts."""
    block: Block
    limit_micro: LimitPrice
    """For each block: what a buyer pays at most, a seller takes at least."""


class Ask(Record, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The node that signs this sells its hour."""

    KIND: ClassVar[str] = "market.ask"
    MAX_BYTES: ClassVar[int] = 1024

    terms: OrderTerms
    payee: Address
    """The account at which it is paid for the hour, whoever has it in the end."""


class Bid(Record, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Whoever signs this buys up to so many blocks; fewer will do, too."""

    KIND: ClassVar[str] = "market.bid"
    MAX_BYTES: ClassVar[int] = 1024

    terms: OrderTerms
    blocks: Annotated[int, Meta(ge=1, le=BID_BLOCKS_MAX)]
    escrow: Hash
    """In which all is set aside that this may cost; its quote is `bid_quote`."""


def bid_quote(terms: OrderTerms, blocks: int, trader: bytes) -> bytes:
    """What the escrow of a Bid names, so that it is for this one alone."""
    return hash_of_parts("market/bid/1", (_encoder.encode(terms), blocks.to_bytes(8), trader))


class Purchase(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The trade by which somebody has a block: of the order's block, this node's, bought in this batch."""

    batch: BatchNumber
    node: NodeId


class Resale(Record, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Whoever signs this passes on blocks that it bought in earlier batches, those named first before others. The node
    gets the new price, which is no lower than the one before; who passes a block on has its own money free."""

    KIND: ClassVar[str] = "market.resale"
    MAX_BYTES: ClassVar[int] = 2048

    terms: OrderTerms
    purchases: Annotated[tuple[Purchase, ...], Meta(min_length=1, max_length=RESALE_BLOCKS_MAX)]


Order = Ask | Bid | Resale
ORDERS: dict[str, type[Ask] | type[Bid] | type[Resale]] = {kind.KIND: kind for kind in (Ask, Bid, Resale)}
ORDER_MAX_BYTES = max(kind.MAX_BYTES for kind in ORDERS.values())


def open_order(envelope: Envelope, network: str = DEFAULT_NETWORK) -> Order:
    """Raises BadOrder for another kind of record, and what `open_record` does."""
    kind = ORDERS.get(envelope.kind)
    if kind is None:
        raise BadOrder(f"A {envelope.kind!r} record came where an order was expected: an ask, a bid or a resale.")
    return open_record(envelope, kind, network)


class Batch(Record, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The auctioneer that signs this has closed its batch of this number, with these orders and no others."""

    KIND: ClassVar[str] = "market.batch"
    MAX_BYTES: ClassVar[int] = 256 * 1024

    number: BatchNumber
    previous: Hash
    """The id of the Clearing before; zeros for the first."""
    closed_ms: UnixMs
    """By the auctioneer's clock, and after the one before. Hours that have begun by then are not traded."""
    orders: Annotated[tuple[Hash, ...], Meta(max_length=ORDERS_MAX)]
    """Their ids, ascending."""
    seed: Hash
    """Of the lots, drawn before there was an order: its hash stands in the batch before."""
    next_seed_hash: Hash


def closed_twice(one: Envelope, other: Envelope, network: str = DEFAULT_NETWORK) -> str | None:
    """What two Batches prove of the auctioneer that signed both: that it has closed one batch twice, as each of them
    says to be the only one of its number; None where they do not. Raises what `open_record` does."""
    first, second = (open_record(each, Batch, network) for each in (one, other))
    if one.signer != other.signer or one.record_id == other.record_id or first.number != second.number:
        return None
    return (
        f"Auctioneer {short_id(one.signer)} has closed batch {first.number} twice: with {len(first.orders)} orders at "
        f"{first.closed_ms} ms and with {len(second.orders)} orders at {second.closed_ms} ms."
    )


class Trade(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One block changes hands."""

    buyer: NodeId
    seller: NodeId
    node: NodeId
    payee: Address
    """The node's account."""


class Cleared(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A market in which something was traded, all at one price."""

    block: Block
    price_micro: LimitPrice
    trades: Annotated[tuple[Trade, ...], Meta(min_length=1, max_length=SOLD_MAX)]


Why = Literal[
    "elsewhere", "other-batch", "expired", "begun", "too-far", "twice", "replaced", "sold", "not-held", "under-price",
    "no-room", "limit", "sets-price", "lot",
]  # fmt: skip
"""Why an order got fewer blocks than it asked for. Up to `no-room` it did not count."""


class LeftOut(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """An order that got none, or not all, of its blocks."""

    order: Hash
    why: Why


class Clearing(Record, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a batch came to, signed by its auctioneer: all of it follows from the batch, by rule."""

    KIND: ClassVar[str] = "market.clearing"
    MAX_BYTES: ClassVar[int] = 10 * 1024 * 1024

    batch: Hash
    """The id of the Batch."""
    cleared: Annotated[tuple[Cleared, ...], Meta(max_length=ORDERS_MAX)]
    left_out: Annotated[tuple[LeftOut, ...], Meta(max_length=ORDERS_MAX)]
    after: Hash
    """Of what the next batch needs to know: who holds which block."""
