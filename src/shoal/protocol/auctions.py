"""How an auctioneer is named for people, what is asked of it over a link and what it answers; and what is asked of the
nodes whose hours are traded. The orders and batches themselves stand in `orders`."""

from __future__ import annotations

from typing import Annotated, ClassVar

import msgspec
from msgspec import Meta

from shoal.identity import ENVELOPE_OVERHEAD_BYTES, Hash, NodeId
from shoal.protocol.hubs import who_and_where
from shoal.protocol.messages import Message, Record
from shoal.protocol.offers import UnixMs
from shoal.protocol.orders import HOUR_MS, ORDER_MAX_BYTES, BatchNumber

SCHEME = "shoal-auction://"
PART_BYTES = 512 * 1024
"""Of a published batch in one answer; the last part may be shorter."""
PARTS_MAX = 96
"""Of the largest batch that may be published, 48 MiB."""


class AuctionTicket(msgspec.Struct, frozen=True):
    """Who runs an auction and where to try it: `shoal-auction://<64 hexadecimal digits>@host:port[,host:port...]`.

    The NodeId is what is trusted, and what orders and batches name; whoever answers at an address must prove to be it.
    """

    auctioneer: NodeId
    addresses: tuple[str, ...]
    """`tcp://host:port` each, at least one."""

    @classmethod
    def parse(cls, text: str) -> AuctionTicket:
        """Text -> ticket. Raises BadTicket with what is wrong in it."""
        expected = (
            f"an auction's ticket looks like {SCHEME}<64 hexadecimal digits>@host:port; it prints it at its start"
        )
        return cls(*who_and_where(text.strip().rstrip("/"), SCHEME, "auction", expected))

    def __str__(self) -> str:
        places = ",".join(address.removeprefix("tcp://") for address in self.addresses)
        return f"{SCHEME}{self.auctioneer.hex()}@{places}"


class AskAuction(Message, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Request `auction.about`: which batch is open, and which were published? The reply is AuctionInfo."""

    KIND: ClassVar[str] = "auction.about"
    MAX_BYTES: ClassVar[int] = 64


class AuctionInfo(Message, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """An auction about itself. Nothing here is signed."""

    MAX_BYTES: ClassVar[int] = 1024

    network: Annotated[str, Meta(max_length=32)]
    software: Annotated[str, Meta(max_length=64)]
    running: BatchNumber
    """The batch that takes orders."""
    closes_ms: UnixMs
    """When it is closed next, by the auctioneer's clock; while it has no order it is not."""
    every_ms: Annotated[int, Meta(ge=1, le=1 << 53)]
    orders: Annotated[int, Meta(ge=0)] = 0
    """That it has taken."""
    oldest: BatchNumber
    """Of those that are published and kept; the newest is the one before `running`."""


class HandIn(Message, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Request `auction.order`: take this order for the batch that is open. The reply is Taken, sent once the order is
    durable. The same order again is taken once."""

    KIND: ClassVar[str] = "auction.order"
    MAX_BYTES: ClassVar[int] = 4 * 1024

    order: Annotated[bytes, Meta(max_length=ORDER_MAX_BYTES + ENVELOPE_OVERHEAD_BYTES)]
    """An Envelope of an Ask, a Bid or a Resale."""


class Taken(Message, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    MAX_BYTES: ClassVar[int] = 128

    order: Hash
    """Its id."""
    batch: BatchNumber
    closes_ms: UnixMs


class AskBatch(Message, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Request `auction.batch`: a part of what was published of a batch. The reply is BatchPart."""

    KIND: ClassVar[str] = "auction.batch"
    MAX_BYTES: ClassVar[int] = 64

    number: BatchNumber
    part: Annotated[int, Meta(ge=0, lt=PARTS_MAX)] = 0


class BatchPart(Message, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    MAX_BYTES: ClassVar[int] = PART_BYTES + 64

    parts: Annotated[int, Meta(ge=1, le=PARTS_MAX)]
    """Of this batch in all."""
    data: Annotated[bytes, Meta(max_length=PART_BYTES)]


class HourPromise(Record, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Whoever has a node's key signs this to the node itself: keep the hour of this order free, for whoever buys it in
    its batch. Nobody else sees it, as orders are seen, and could send it again."""

    KIND: ClassVar[str] = "hour.promised"
    MAX_BYTES: ClassVar[int] = 4 * 1024

    order: Annotated[bytes, Meta(max_length=ORDER_MAX_BYTES + ENVELOPE_OVERHEAD_BYTES)]
    """An Envelope of an Ask that the node has signed, too."""
    auction: Annotated[str, Meta(max_length=1024)]
    """Its ticket."""


class PromiseHour(Message, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Request `hour.promise`, to a node by its owner. The reply is Done, once that is durable; the order is handed in
    afterwards."""

    KIND: ClassVar[str] = "hour.promise"
    MAX_BYTES: ClassVar[int] = 6 * 1024

    promise: Annotated[bytes, Meta(max_length=5 * 1024)]
    """An Envelope of an HourPromise."""


class ClaimHour(Message, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Request `hour.claim`, buyer to node: this hour of yours was bought in this batch, and the money is set aside. The
    node looks into the batch and asks the ledger, and replies with HoldGiven."""

    KIND: ClassVar[str] = "hour.claim"
    MAX_BYTES: ClassVar[int] = 2 * 1024

    auction: Annotated[str, Meta(max_length=1024)]
    """Its ticket: the auctioneer may be at another address by now than when the hour was promised."""
    batch: BatchNumber
    start_ms: Annotated[int, Meta(ge=0, le=1 << 53, multiple_of=HOUR_MS)]
