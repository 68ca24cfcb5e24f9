"""What an auction answers on its links.

Whoever asks has proved its NodeId, which gives it nothing here but its share of the auction's time: an order is its
signer's, whoever hands it in, and what was published is everybody's.
"""

from __future__ import annotations

from importlib.metadata import version

from shoal.auctions.auctioneer import Auctioneer
from shoal.auctions.refusals import AuctionBusy
from shoal.identity import Envelope
from shoal.protocol.auctions import AskAuction, AskBatch, AuctionInfo, HandIn
from shoal.protocol.messages import DEFAULT_NETWORK, decode, encode
from shoal.protocol.orders import ORDER_MAX_BYTES
from shoal.transport.allowances import AtOnce, RateLimit
from shoal.world import Clock, Endpoint, Request

ORDERS_PER_S, ORDERS_BURST = 50.0, 512
QUESTIONS_PER_S, QUESTIONS_BURST = 20.0, 200
PARTS_PER_S, PARTS_BURST = 20.0, 200
"""What one peer may ask for."""
AT_ONCE_PER_SOURCE = 512
"""Requests under way from one address, whatever keys ask."""


class AuctionService:
    """Answers `auction.about`, `.order` and `.batch` on an endpoint."""

    def __init__(
        self,
        endpoint: Endpoint,
        auctioneer: Auctioneer,
        clock: Clock,
        *,
        every_s: float,
        network: str = DEFAULT_NETWORK,
    ) -> None:
        self._auctioneer, self._every_s, self._network = auctioneer, every_s, network
        self._orders = RateLimit(clock, ORDERS_PER_S, ORDERS_BURST)
        self._questions = RateLimit(clock, QUESTIONS_PER_S, QUESTIONS_BURST)
        self._parts = RateLimit(clock, PARTS_PER_S, PARTS_BURST)
        self._at_once = AtOnce(AT_ONCE_PER_SOURCE, AuctionBusy)
        endpoint.handle(AskAuction.KIND, self._tell_about_itself)
        endpoint.handle(HandIn.KIND, self._take)
        endpoint.handle(AskBatch.KIND, self._give_part)

    async def _tell_about_itself(self, request: Request) -> bytes:
        self._questions.spend(request.peer, "A question")
        decode(AskAuction, request.body, request.version)
        auctioneer = self._auctioneer
        info = AuctionInfo(
            network=self._network, software=f"shoal {version('shoal')}", running=auctioneer.running,
            closes_ms=auctioneer.closes_ms, every_ms=max(1, round(1000 * self._every_s)), orders=auctioneer.orders,
            oldest=auctioneer.oldest,
        )  # fmt: skip
        return encode(info, request.version)

    async def _take(self, request: Request) -> bytes:
        self._orders.spend(request.peer, "An order")
        order = Envelope.from_bytes(decode(HandIn, request.body, request.version).order, ORDER_MAX_BYTES)
        with self._at_once.place(request.source, "requests"):
            return encode(await self._auctioneer.hand_in(order, request.source), request.version)

    async def _give_part(self, request: Request) -> bytes:
        self._parts.spend(request.peer, "A question for a batch")
        wanted = decode(AskBatch, request.body, request.version)
        with self._at_once.place(request.source, "requests"):
            return encode(await self._auctioneer.part(wanted.number, wanted.part), request.version)
