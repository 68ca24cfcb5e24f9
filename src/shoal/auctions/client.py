"""An auction as whoever trades there holds it."""

from __future__ import annotations

import asyncio
from typing import TypeVar

from shoal.auctions.refusals import AuctionBusy, AuctionFailed, BatchFull, NotPublished, OrderRefused
from shoal.errors import BadRecord, ShoalError
from shoal.identity import Envelope, short_id
from shoal.market.batches import BadBatch
from shoal.market.publishing import Published, Verified, verified
from shoal.protocol.auctions import AskAuction, AskBatch, AuctionInfo, AuctionTicket, BatchPart, HandIn, Taken
from shoal.protocol.messages import DEFAULT_NETWORK, Message
from shoal.protocol.orders import BadOrder, open_order
from shoal.transport.allowances import TooManyRequests
from shoal.world import Clock, Endpoint, Link, LinkLost, Refused
from shoal.world.asking import ask

DIAL_DEADLINE_S = 10.0
REQUEST_DEADLINE_S = 30.0
"""A batch that is being closed takes its time, and orders for the next one wait for it."""
PART_WAITS_MAX = 60
"""How often a part of a batch is asked for again, each a second after the one before, where the auction says that this
comes too often."""
_REFUSALS: dict[str, type[ShoalError]] = {
    one.code: one
    for one in (OrderRefused, NotPublished, BatchFull, AuctionBusy, AuctionFailed, TooManyRequests, BadOrder)
}
"""What an auction says no with, by code. They are raised here as they would be beside it."""
A = TypeVar("A", bound=Message)


class RemoteAuction:
    """One auction, dialled when it is first asked and again where the link broke. The endpoint is its maker's."""

    def __init__(
        self, endpoint: Endpoint, ticket: AuctionTicket, clock: Clock, *, network: str = DEFAULT_NETWORK
    ) -> None:
        self.ticket = ticket
        self._endpoint, self._clock, self._network = endpoint, clock, network

    async def about(self) -> AuctionInfo:
        return await self._ask(AskAuction(), AuctionInfo)

    async def hand_in(self, order: Envelope) -> Taken:
        """Once this returns the order is on the auctioneer's disk, as it says. Where the answer was lost, hand the same
        order in again: it is taken once. Raises OrderRefused, BatchFull, AuctionBusy, AuctionFailed, LinkError; with
        LinkLost and DeadlineExceeded it may have been taken."""
        question = HandIn(order=order.to_bytes())
        try:
            taken = await self._request(question, Taken)
        except LinkLost as lost:
            try:
                taken = await self._request(question, Taken)
            except ShoalError:  # its batch may have been closed with it meanwhile
                raise lost from None
        if (taken.order, taken.batch) != (order.record_id, open_order(order, self._network).terms.batch):
            raise BadRecord(f"{self} says that it has taken another order than it was handed.")
        return taken

    async def published(self, number: int) -> Published:
        """What was published of a batch, as it came: nothing of it is verified. Raises NotPublished, BadBatch."""
        first = await self._part(number, 0)
        parts = [first.data, *[(await self._part(number, part)).data for part in range(1, first.parts)]]
        return Published.from_bytes(b"".join(parts))

    async def batch(self, number: int) -> Verified:
        """A batch, cleared again. Raises NotPublished, and what `checked` does."""
        return await self.checked(await self.published(number), number)

    async def checked(self, published: Published, number: int) -> Verified:
        """What came as a batch of this auction, cleared again. Raises BadBatch where it is wrong, or another than it
        should be, and what `verified` does."""
        checked = await asyncio.to_thread(verified, published, self._network)
        if (checked.auctioneer, checked.batch.number) != (self.ticket.auctioneer, number):
            raise BadBatch(
                f"{self} answered with batch {checked.batch.number} of {short_id(checked.auctioneer)} where its own "
                f"batch {number} was due."
            )
        return checked

    def __str__(self) -> str:
        return f"The auction of {short_id(self.ticket.auctioneer)}"

    async def _part(self, number: int, part: int) -> BatchPart:
        for _ in range(PART_WAITS_MAX):
            try:
                return await self._ask(AskBatch(number=number, part=part), BatchPart)
            except TooManyRequests:
                await self._clock.sleep(1)
        return await self._ask(AskBatch(number=number, part=part), BatchPart)

    async def _ask(self, question: AskAuction | AskBatch, answer: type[A]) -> A:
        """Asking twice does no harm: where the link breaks, once more over a new one."""
        try:
            return await self._request(question, answer)
        except LinkLost:
            return await self._request(question, answer)

    async def _request(self, question: AskAuction | HandIn | AskBatch, answer: type[A]) -> A:
        """Raises LinkError, BadRecord where the answer is none, and what the auction refuses with."""
        link: Link = await self._endpoint.dial(
            self.ticket.auctioneer, self.ticket.addresses, deadline_s=DIAL_DEADLINE_S
        )
        try:
            return await ask(link, question, answer, REQUEST_DEADLINE_S)
        except Refused as error:
            kind = _REFUSALS.get(error.remote_code)
            if kind is None:
                raise
            raise kind(error.sentence) from error
