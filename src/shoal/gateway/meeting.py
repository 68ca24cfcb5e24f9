"""Nodes that the hubs name, met one beside the other: whoever is slow to answer holds up nobody but itself."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from shoal.errors import LinkError, ShoalError
from shoal.world import Clock, Directory, Endpoint, FoundOffer, Link
from shoal.world.lookout import Backoff
from shoal.world.reach import reach_and_time

LOOK_EVERY_S = 2.0
DIAL_DEADLINE_S = 5.0
MEETINGS_MAX = 32
"""Nodes that are dialled at a time; each is a stranger that may let one wait."""
REST_S, REST_MAX_S = 2.0, 300.0
"""How long a node that failed is left alone: the first time, and at most; each time twice as long."""

_log = logging.getLogger("shoal.gateway")


class Meetings:
    """Gets links to nodes, and leaves those alone for a while that failed."""

    def __init__(
        self,
        endpoint: Endpoint,
        directory: Directory,
        clock: Clock,
        met: Callable[[FoundOffer, Link, float], Awaitable[None]],
    ) -> None:
        """`met` is given each node that answered, with a link to it and the round trip in milliseconds."""
        self._endpoint, self._directory, self._clock, self._met = endpoint, directory, clock, met
        self.failed = Backoff(clock, REST_S, REST_MAX_S)
        self.under_way: dict[bytes, asyncio.Task[None]] = {}

    async def run(self, look: Callable[[], Awaitable[None]]) -> None:
        """Have `look` done again and again, until this is cancelled."""
        try:
            while True:
                try:
                    await look()
                except LinkError as error:
                    _log.info("no hub answers; what serves goes on as it is: %s", error)
                await self._clock.sleep(LOOK_EVERY_S)
        finally:
            self.stop()

    def stop(self) -> None:
        for task in self.under_way.values():
            task.cancel()

    def meet(self, one: FoundOffer) -> None:
        """Dial a node beside everything else, unless that is under way, or it is left alone for now."""
        if one.node not in self.under_way and not self.failed.rests(one.node) and len(self.under_way) < MEETINGS_MAX:
            self.under_way[one.node] = asyncio.create_task(self._meet(one))

    async def _meet(self, one: FoundOffer) -> None:
        try:
            link, far_ms = await reach_and_time(
                one.node, one.offer, endpoint=self._endpoint, directory=self._directory, clock=self._clock,
                deadline_s=DIAL_DEADLINE_S,
            )  # fmt: skip
        except ShoalError as error:  # whatever is wrong with one offer, serving goes on
            self.failed.tried(one.node)
            _log.info("%s cannot serve: %s", one.offer.name, error)
            return
        finally:
            del self.under_way[one.node]
        await self._met(one, link, far_ms)
