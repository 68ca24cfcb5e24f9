"""Where a node is in the space of round-trip times: it measures a peer now and then, and says so in its offer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from shoal.errors import LinkError, ShoalError
from shoal.market.coordinates import DIMENSIONS, Coordinate
from shoal.protocol.blobs import BlobHolder
from shoal.protocol.messages import decode, encode
from shoal.protocol.offers import OfferFind
from shoal.protocol.serving import LinkProbe, LinksProbed
from shoal.world import Clock, Dice, Directory, Endpoint, FoundOffer, Request
from shoal.world.reach import echo_ms, reach_and_time

FIRST_EVERY_S, FIRST = 2.0, 8
"""It measures so many soon after its start, and then one now and then."""
EVERY_S = 30.0
DEADLINE_S = 5.0
PROBE_DEADLINE_S = 3.0
PROBES_AT_ONCE = 2
"""Requests to measure others that are worked on; more wait."""
FOUND = 8
"""Offers that are asked for at a time, from a place drawn at random: one of them is measured."""
MOVED_MS, MOVED_SHARE = 1.0, 0.1
"""Who has moved less than this, and than this part of its way to the others, says nothing new."""

_log = logging.getLogger("shoal.node")


class Surveyor:
    """`run` goes on until it is cancelled."""

    def __init__(
        self,
        endpoint: Endpoint,
        directory: Directory,
        clock: Clock,
        dice: Dice,
        moved: Callable[[], Awaitable[None]],
    ) -> None:
        """`moved` is told when there is a new coordinate to be said."""
        self._endpoint, self._directory, self._clock, self._dice = endpoint, directory, clock, dice
        self._moved = moved
        self.coordinate: Coordinate | None = None
        """None while nobody was measured."""
        self.said: Coordinate | None = None
        """The one that others are told."""

    async def run(self) -> None:
        measured = 0
        while True:
            await self._clock.sleep(FIRST_EVERY_S if measured < FIRST else EVERY_S)
            try:
                await self.measure()
            except ShoalError as error:  # there is no hub, nobody else, or nobody who answers
                _log.info("nobody was measured: %s", error)
            measured += 1

    async def measure(self) -> None:
        """One peer. Raises ShoalError."""
        peers = await self._peers(self._dice.bytes(32)) or await self._peers(None)
        if not peers:
            return
        peer = peers[self._dice.bytes(1)[0] % len(peers)]
        _, took_ms = await reach_and_time(
            peer.node, peer.offer, endpoint=self._endpoint, directory=self._directory, clock=self._clock,
            deadline_s=DEADLINE_S,
        )  # fmt: skip
        direction = [self._dice.uniform() - 0.5 for _ in range(DIMENSIONS)]
        mine = self.coordinate or Coordinate()
        self.coordinate = mine.measured(Coordinate.of(peer.offer), took_ms, direction)
        if self._is_news():
            self.said = self.coordinate
            await self._moved()

    async def _peers(self, after: bytes | None) -> list[FoundOffer]:
        found = await self._directory.find(OfferFind(limit=FOUND, after=after))
        return [one for one in found if one.node != self._endpoint.node_id]

    def _is_news(self) -> bool:
        new, old = self.coordinate, self.said
        if new is None or old is None:
            return new is not None
        moved_ms = max(
            (abs(one - other) for one, other in zip(new.position_ms, old.position_ms, strict=True)), default=0.0
        ) + abs(new.height_ms - old.height_ms)
        whole_ms = max(new.height_ms, *(abs(one) for one in new.position_ms))
        return moved_ms > MOVED_MS and moved_ms > MOVED_SHARE * whole_ms


class Prober:
    """Answers how far others are: the times of what it measures when it is asked."""

    def __init__(self, endpoint: Endpoint, clock: Clock) -> None:
        self._endpoint, self._clock = endpoint, clock
        self._at_once = asyncio.Semaphore(PROBES_AT_ONCE)
        endpoint.handle(LinkProbe.KIND, self._probe)

    async def _probe(self, request: Request) -> bytes:
        message = decode(LinkProbe, request.body, request.version)
        async with self._at_once:
            found = await asyncio.gather(*(self._far(holder) for holder in message.nodes))
        return encode(LinksProbed(round_trip_ms=tuple(found)), request.version)

    async def _far(self, holder: BlobHolder) -> float | None:
        """The least of a few small requests; None where there is no way to it."""
        try:
            link = await self._endpoint.dial(holder.node, holder.addresses, deadline_s=PROBE_DEADLINE_S)
            return await echo_ms(link, self._clock, PROBE_DEADLINE_S)
        except LinkError:
            return None
