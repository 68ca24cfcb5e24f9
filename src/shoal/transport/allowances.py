"""How often one peer may ask: a token bucket a peer, in a bounded map. And how much one address may ask at once."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

from shoal.errors import LinkError, ShoalError
from shoal.quantities import Bucket
from shoal.world import Clock

PEERS_MAX = 20_000
"""Buckets kept; the one unused for longest makes room, and its peer starts with a full one again."""


class TooManyRequests(LinkError):
    """A peer asks more often than is allowed."""

    code = "SH-333"


class RateLimit:
    """`burst` requests at once and `per_s` a second thereafter, for each peer by itself."""

    def __init__(self, clock: Clock, per_s: float, burst: int, peers_max: int = PEERS_MAX) -> None:
        self._clock = clock
        self._per_s = per_s
        self._burst = burst
        self._peers_max = peers_max
        self._buckets: OrderedDict[bytes, Bucket] = OrderedDict()

    def spend(self, peer: bytes, what: str) -> None:
        """Count one request. Raises TooManyRequests with the time to wait."""
        wait_s = self.take(peer, 1)
        if wait_s:
            raise TooManyRequests(
                f"{what} came too often: {self._burst} at once and {self._per_s:g} a second are allowed here; "
                f"wait {wait_s:.1f} s."
            )

    def take(self, peer: bytes, amount: float) -> float:
        """Count so much at once. Gives the seconds to wait where it is too much: nothing is counted then."""
        bucket = self._bucket(peer)
        wait_s = bucket.wait_s(amount)
        self._buckets[peer] = bucket if wait_s else bucket.less(amount)
        return wait_s

    def give_back(self, peer: bytes, amount: float) -> None:
        """Of what was counted, what was not used."""
        self._buckets[peer] = self._bucket(peer).more(amount)

    def _bucket(self, peer: bytes) -> Bucket:
        """As it is now; it is the one used last."""
        now = self._clock.monotonic()
        bucket = (self._buckets.pop(peer, None) or Bucket.full(self._burst, self._per_s, now)).seen(now)
        self._buckets[peer] = bucket
        while len(self._buckets) > self._peers_max:
            self._buckets.popitem(last=False)
        return bucket


class AtOnce:
    """So many requests under way for each source: keys cost nothing, addresses do."""

    def __init__(self, most: int, busy: type[ShoalError]) -> None:
        self._most, self._busy = most, busy
        self._under_way: Counter[str] = Counter()

    @contextmanager
    def place(self, source: str, what: str, places: int = 1) -> Iterator[None]:
        """Hold a place while a request is answered; several, where it costs as much as several. Raises `busy`."""
        under_way = self._under_way[source]
        if under_way and under_way + places > self._most:
            raise self._busy(f"{under_way} {what} from your address are under way here; try again in a moment.")
        self._under_way[source] += places
        try:
            yield
        finally:
            self._under_way[source] -= places
            if not self._under_way[source]:
                del self._under_way[source]
