"""Looking through what hubs have on offer, again and again, and who is left alone for a while."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection

import msgspec

from shoal.errors import LinkError
from shoal.market import ANYTHING, Listing, Wish, fitting
from shoal.protocol.offers import FOUND_MAX, OfferFind
from shoal.world.clock import Clock
from shoal.world.directory import Directory, FoundOffer

TRIED_REMEMBERED_MAX = 4096
DOUBLINGS_MAX = 60
"""More would overflow some day: a job may last for weeks beside an offer with nobody behind it."""
PAGES_MAX = 128
"""Of FOUND_MAX offers each, when all are looked through."""
FORMER_MAX = 16
"""Former nodes that the hubs are asked about at a time."""


class Backoff:
    """Nodes that were tried in vain, and how long each is left alone: `first_s`, then twice as long each time, at most
    `most_s`. So an offer with nobody behind it takes no turn from one that has somebody, however fast it says to be."""

    def __init__(self, clock: Clock, first_s: float, most_s: float = math.inf) -> None:
        self._clock, self._first_s, self._most_s = clock, first_s, most_s
        self._tried: dict[bytes, tuple[int, float]] = {}
        """NodeId -> times in a row, and before when it is not tried again."""

    def rests(self, node: bytes) -> bool:
        return self._clock.monotonic() < self._tried.get(node, (0, 0.0))[1]

    def times(self, node: bytes) -> int:
        return self._tried.get(node, (0, 0.0))[0]

    def tried(self, node: bytes) -> None:
        times, _ = self._tried.pop(node, (0, 0.0))
        rest_s = min(self._most_s, self._first_s * 2.0 ** min(times, DOUBLINGS_MAX))
        self._tried[node] = (times + 1, self._clock.monotonic() + rest_s)
        while len(self._tried) > TRIED_REMEMBERED_MAX:
            del self._tried[next(iter(self._tried))]

    def succeeded(self, node: bytes) -> None:
        self._tried.pop(node, None)


class Lookout:
    """Looks through all offers that fit, FOUND_MAX at a look, and then from the beginning again: NodeIds can be chosen,
    and who chooses low ones shall not stand before everybody else for ever. How far a node is, is not known here."""

    def __init__(self, directory: Directory, wanted: OfferFind, wish: Wish = ANYTHING) -> None:
        self._directory, self._wish = directory, wish
        self._wanted = msgspec.structs.replace(wanted, limit=FOUND_MAX)
        self._after: bytes | None = None

    async def look(self, former: Collection[bytes] = ()) -> list[FoundOffer]:
        """The next offers, and those of `former` nodes that are busy and fit otherwise. Raises LinkError."""
        page = await self._directory.find(msgspec.structs.replace(self._wanted, after=self._after))
        self._after = page[-1].node if len(page) == FOUND_MAX else None
        found = {one.node: one for one in page}
        for node in [node for node in former if node not in found][:FORMER_MAX]:
            with contextlib.suppress(LinkError):  # the hub has heard enough questions for now
                found |= {one.node: one for one in await offers_of(self._directory, self._wanted, node)}
        if self._wish == ANYTHING:
            return list(found.values())
        reputation = self._wish.reputation_of
        fit = fitting((Listing(one.node, one.offer, 0.0, reputation(one.node)) for one in found.values()), self._wish)
        return [one for one in found.values() if one.node in fit]


async def all_offers(directory: Directory, wanted: OfferFind) -> list[FoundOffer]:
    """All that fit, page by page, PAGES_MAX at most. Raises LinkError."""
    found: list[FoundOffer] = []
    for _ in range(PAGES_MAX):
        after = found[-1].node if found else None
        page = await directory.find(msgspec.structs.replace(wanted, limit=FOUND_MAX, after=after))
        found += page
        if len(page) < FOUND_MAX:
            break
    return found


async def offers_of(directory: Directory, wanted: OfferFind, node: bytes) -> list[FoundOffer]:
    """What one node offers, busy or not, if it fits otherwise. Raises LinkError."""
    return list(await directory.find(msgspec.structs.replace(wanted, node=node, idle_only=False)))
