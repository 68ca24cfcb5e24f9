"""The index of offers as the hub sees it: a port, the rules every implementation keeps, and the one in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Protocol

from shoal.errors import LinkError
from shoal.identity import Envelope
from shoal.market import StaleOffer, Stamp, Standing, compare, fits
from shoal.protocol.messages import DEFAULT_NETWORK, open_record
from shoal.protocol.offers import Offer, OfferFind
from shoal.world import Clock

OFFERS_MAX = 20_000
"""Live offers one hub keeps unless told otherwise."""
CROWDED, SHARE = 0.5, 0.25
"""From so much of all places on, newcomers of one address may hold no more than a SHARE of them: keys cost nothing, and
an offer may stand for a day. Many honest nodes may be behind one address, so it does not bite while there is room."""
REMEMBERED_MS = 7 * 24 * 3600 * 1000
"""How long the last sequence of a node that is gone is remembered, so that nobody can bring its old offers back."""
REMEMBERED_PER_OFFER = 2
"""Rows kept, live and remembered together, per offer that may be live."""

FOUND_BYTES_MAX = 1 << 20
"""A page ends here even when more offers would be allowed on it."""


class HubFull(LinkError):
    """The hub keeps as many offers as it may, of all or of one address, and this one is of a node it does not know."""

    code = "SH-331"


@dataclass(frozen=True)
class KeptOffer:
    """An offer a hub holds."""

    node: bytes
    """Who signed it."""
    offer: Offer
    envelope: bytes
    """The signed record, byte for byte as it came."""
    record_id: bytes
    arrived_ms: int
    expires_ms: int
    """Both on the hub's clock."""
    source: str
    """From where it came when the node was new here; see Request."""

    @property
    def stamp(self) -> Stamp:
        return Stamp(self.node, self.offer.sequence, self.record_id)


@dataclass(frozen=True)
class Arrival:
    """A verified offer at the moment it comes in."""

    node: bytes
    offer: Offer
    envelope: bytes
    record_id: bytes
    from_maker: bool
    """Whether the node itself brought it. Only then does a known offer live on: else anybody who once saw a record
    could keep a dead node listed for ever."""
    source: str
    """From where it came; see Request."""

    @classmethod
    def open(cls, data: bytes, carrier: bytes, source: str, network: str = DEFAULT_NETWORK) -> Arrival:
        """Verify bytes that `carrier` brought from `source`. Raises BadRecord subclasses."""
        envelope = Envelope.from_bytes(data, Offer.MAX_BYTES)
        offer = open_record(envelope, Offer, network)
        return cls(envelope.signer, offer, data, envelope.record_id, carrier == envelope.signer, source)


class OfferIndex(Protocol):
    """Keeps the newest offer of each node for as long as it lives.

    One suite of tests, `tests/contract/test_offer_index.py`, runs on every implementation.
    """

    async def keep(self, arrival: Arrival) -> KeptOffer:
        """Keep an offer; returns once it is durable. Raises StaleOffer (older, or another with the same sequence; what
        was held stays), HubFull, and HubStoreFailed when it could not be written."""
        ...

    async def find(self, wanted: OfferFind) -> tuple[list[KeptOffer], bool]:
        """Live offers that fit, in the order of their NodeIds from `wanted.after` on, at most `wanted.limit` and
        FOUND_BYTES_MAX (but one at least), and whether there are more."""
        ...

    async def get(self, node: bytes) -> KeptOffer | None:
        """The live offer of one node."""
        ...

    async def count(self) -> int:
        """Live offers."""
        ...

    async def purge(self) -> int:
        """Forget what expired longer ago than is remembered, and what is too much; gives how many were forgotten."""
        ...

    async def close(self) -> None: ...


class HubTime:
    """Unix milliseconds that only grow while the hub runs, so that a jump of its wall clock ends no offer's life."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._started_ms = clock.now_ms() - clock.monotonic() * 1000

    def now_ms(self) -> int:
        return int(self._started_ms + self._clock.monotonic() * 1000)


def admit(held: KeptOffer | None, arrival: Arrival, now_ms: int) -> KeptOffer:
    """What to hold after `arrival`. Raises StaleOffer. A known record brought by its maker lives on from now; brought
    by others it stays as it is."""
    standing, reason = compare(held.stamp if held else None,
                               Stamp(arrival.node, arrival.offer.sequence, arrival.record_id))  # fmt: skip
    if standing in (Standing.OLDER, Standing.CONFLICT):
        raise StaleOffer(reason)
    expires_ms = now_ms + arrival.offer.lifetime_ms
    if standing is Standing.SAME and held is not None:
        return replace(held, expires_ms=max(held.expires_ms, expires_ms)) if arrival.from_maker else held
    # While it lives it counts for the address it came from first: else it could be moved on to make room there.
    source = held.source if held is not None and held.expires_ms > now_ms else arrival.source
    return KeptOffer(arrival.node, arrival.offer, arrival.envelope, arrival.record_id, now_ms, expires_ms, source)


def refuse_when_full(live: int, from_there: Callable[[], int], offers_max: int) -> None:
    """Whether there is no room for a newcomer: of `live` offers so many are from where it is. Raises HubFull."""
    if live >= offers_max:
        raise HubFull(f"This hub keeps {live} offers and may keep no more; publish to another hub, or try again later.")
    if live < CROWDED * offers_max:
        return
    theirs = from_there()
    if theirs >= SHARE * offers_max:
        raise HubFull(
            f"This hub keeps {live} offers of {offers_max} that it may, {theirs} of them from your address, from which "
            "it takes no more now; publish to another hub, or try again later."
        )


def page_of(fitting: Iterable[KeptOffer], limit: int) -> tuple[list[KeptOffer], bool]:
    """The first of the offers that fit, as many as a page holds, and whether there are more."""
    page: list[KeptOffer] = []
    size = 0
    for kept in fitting:
        size += len(kept.envelope)
        if len(page) == limit or (page and size > FOUND_BYTES_MAX):
            return page, True
        page.append(kept)
    return page, False


class MemoryOfferIndex:
    """Holds offers in a dictionary: for tests and simulations; nothing survives the process."""

    def __init__(self, clock: Clock, offers_max: int = OFFERS_MAX) -> None:
        self._time = HubTime(clock)
        self._offers_max = offers_max
        self._held: dict[bytes, KeptOffer] = {}

    def _live(self) -> list[KeptOffer]:
        now_ms = self._time.now_ms()
        return [self._held[node] for node in sorted(self._held) if self._held[node].expires_ms > now_ms]

    async def keep(self, arrival: Arrival) -> KeptOffer:
        now_ms = self._time.now_ms()
        held = self._held.get(arrival.node)
        kept = admit(held, arrival, now_ms)
        if held is None or held.expires_ms <= now_ms < kept.expires_ms:
            live = self._live()
            refuse_when_full(len(live), lambda: sum(one.source == arrival.source for one in live), self._offers_max)
        self._held[arrival.node] = kept
        return kept

    async def find(self, wanted: OfferFind) -> tuple[list[KeptOffer], bool]:
        after = wanted.after or b""
        return page_of(
            (kept for kept in self._live() if kept.node > after and fits(kept.node, kept.offer, wanted)[0]),
            wanted.limit,
        )

    async def get(self, node: bytes) -> KeptOffer | None:
        kept = self._held.get(node)
        return kept if kept is not None and kept.expires_ms > self._time.now_ms() else None

    async def count(self) -> int:
        return len(self._live())

    async def purge(self) -> int:
        now_ms, before = self._time.now_ms(), len(self._held)
        rows_max = REMEMBERED_PER_OFFER * self._offers_max
        newest = sorted(self._held.values(), key=lambda kept: (-kept.expires_ms, kept.node))[:rows_max]
        self._held = {kept.node: kept for kept in newest if kept.expires_ms > now_ms - REMEMBERED_MS}
        return before - len(self._held)

    async def close(self) -> None:
        self._held.clear()
