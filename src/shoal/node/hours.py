"""Hours that a node sells in auctions: what its owner has it promise, and what buyers claim.

What was traded the node finds out by itself, from the batch as its auctioneer has published it, which it clears again;
what is set aside for it, from the ledger. `market.hours` decides.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict

from shoal.auctions import RemoteAuction
from shoal.auctions.refusals import NotPublished
from shoal.errors import BadRecord
from shoal.identity import Envelope, KeyPair, short_id
from shoal.market.holds import HoldRefused, Slots, refuse_closing
from shoal.market.hours import Sale, claim, hour_at, hour_of, promise, sale_of, sold
from shoal.node.sales import ASKS_BURST, ASKS_PER_S, Sales
from shoal.protocol.auctions import AuctionTicket, ClaimHour, HourPromise, PromiseHour
from shoal.protocol.holds import HoldGiven
from shoal.protocol.messages import DEFAULT_NETWORK, decode, encode, open_record, sign
from shoal.protocol.offers import Done
from shoal.protocol.orders import Ask
from shoal.transport.allowances import RateLimit
from shoal.world import Clock, Endpoint, Ledger, Request

CLAIMS_PER_S, CLAIMS_BURST = 0.2, 20
"""Of one peer: a batch is fetched for it, and the ledger asked."""
SALES_KEPT = 1024
"""What batches that were looked into say of this node's hours."""


class Hours:
    """Of one node; answers `hour.promise` and `hour.claim`."""

    def __init__(
        self,
        sales: Sales,
        *,
        key: KeyPair,
        endpoint: Endpoint,
        ledger: Ledger,
        clock: Clock,
        network: str = DEFAULT_NETWORK,
    ) -> None:
        self._sales, self._key, self._network = sales, key, network
        self._endpoint, self._ledger, self._clock = endpoint, ledger, clock
        self._asks = RateLimit(clock, ASKS_PER_S, ASKS_BURST)
        self._claims = RateLimit(clock, CLAIMS_PER_S, CLAIMS_BURST)
        self._known: OrderedDict[tuple[bytes, int, int], Sale | None] = OrderedDict()
        self._looking = asyncio.Lock()
        """One batch at a time: a large one takes 48 MiB, and whoever asks for the same one waits for it."""
        endpoint.handle(PromiseHour.KIND, self._promised)
        endpoint.handle(ClaimHour.KIND, self._claimed)

    async def _promised(self, request: Request) -> bytes:
        self._asks.spend(request.source.encode(), "A promise")
        packed = decode(PromiseHour, request.body, request.version).promise
        signed = Envelope.from_bytes(packed, HourPromise.MAX_BYTES)
        wanted = open_record(signed, HourPromise, self._network)
        envelope = Envelope.from_bytes(wanted.order, Ask.MAX_BYTES)
        asked, ticket = open_record(envelope, Ask, self._network), AuctionTicket.parse(wanted.auction)
        if {signed.signer, envelope.signer} != {self._key.node_id} or asked.terms.auctioneer != ticket.auctioneer:
            raise BadRecord("A node promises the hour of an order to its auction, both signed with the node's own key.")
        known = hour_at(self._sales.slots, asked.terms.block.start_ms)
        if known is not None and known.kept is None and known.binds(self._clock.now_ms()):
            before = AuctionTicket.parse(known.auction)
            if (before.auctioneer, known.batch) != (ticket.auctioneer, asked.terms.batch):
                sale = await self._sale(_or_at(before, ticket), known.batch, known.start_ms)
                if sale is not None:
                    raise HoldRefused(f"This hour was sold in batch {known.batch}, to {short_id(sale.buyer)}.")

        def decide(slots: Slots) -> tuple[Slots, None]:
            terms, now_ms = self._sales.terms, self._clock.now_ms()
            refuse_closing(self._sales.closes_ms, now_ms)
            return promise(slots, asked, envelope.record_id, str(ticket), terms, now_ms), None

        await self._sales.decide(decide)
        return encode(Done(), request.version)

    async def _claimed(self, request: Request) -> bytes:
        self._asks.spend(request.source.encode(), "A claim")
        wanted = decode(ClaimHour, request.body, request.version)
        hour = hour_of(self._sales.slots, wanted.start_ms, wanted.batch)
        self._claims.spend(request.peer, "A claim")
        auction = _or_at(AuctionTicket.parse(hour.auction), AuctionTicket.parse(wanted.auction))
        sale = await self._sale(auction, wanted.batch, wanted.start_ms)
        if sale is None or sale.buyer != request.peer:
            raise HoldRefused(
                f"Batch {wanted.batch} gives that hour to {short_id(sale.buyer) if sale else 'nobody'}, and not to "
                f"{short_id(request.peer)}."
            )
        escrow = await self._ledger.escrow(sale.escrow)

        def decide(slots: Slots) -> tuple[Slots, Envelope]:
            now_ms = self._clock.now_ms()
            refuse_closing(self._sales.closes_ms, now_ms)
            hold = claim(slots, sale, escrow, self._sales.terms, now_ms)
            envelope = sign(self._key, hold, self._network)
            kept = next((one.kept for one in slots.hours if one.kept is not None and one.kept.hold == hold), None)
            return slots if kept is not None else sold(slots, sale, hold, envelope.record_id, now_ms), envelope

        envelope = await self._sales.decide(decide)
        return encode(HoldGiven(hold=envelope.to_bytes()), request.version)

    async def _sale(self, ticket: AuctionTicket, batch: int, start_ms: int) -> Sale | None:
        """What a batch says of an hour of this node. Raises HoldRefused while it is open, and what fetching and
        checking it does."""
        asked = ticket.auctioneer, batch, start_ms
        async with self._looking:
            if asked not in self._known:
                auction = RemoteAuction(self._endpoint, ticket, self._clock, network=self._network)
                try:
                    checked = await auction.batch(batch)
                except NotPublished as error:
                    raise HoldRefused(f"What became of batch {batch} is not known yet: {error.sentence}") from error
                self._known[asked] = sale_of(checked, self._key.node_id, start_ms)
                while len(self._known) > SALES_KEPT:
                    self._known.popitem(last=False)
            return self._known[asked]


def _or_at(known: AuctionTicket, newer: AuctionTicket) -> AuctionTicket:
    """The auction that is known, which may have moved to where a newer ticket of the same auctioneer says."""
    if newer.auctioneer != known.auctioneer:
        return known
    return AuctionTicket(known.auctioneer, (*known.addresses, *newer.addresses))
