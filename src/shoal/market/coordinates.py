"""Where a node is in a space in which distance is round-trip time, so that far pairs need not be measured.

Vivaldi (Dabek, Cox, Kaashoek, Morris: Vivaldi: A Decentralized Network Coordinate System, SIGCOMM 2004): a position,
and a height for the link that everything of a node goes through. Each measurement moves the one who measured a little.
Coordinates prune; what matters is measured before it is relied on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from shoal.protocol.offers import NetworkCoordinate, Offer

DIMENSIONS = 3
HEIGHT_MIN_MS = 0.1
STEP, ERROR_STEP = 0.25, 0.25
"""How far one measurement moves a position, and how much it counts in the error, both at most (the paper's c_c and
c_e)."""
ERROR_MAX = 1.5


@dataclass(frozen=True, slots=True)
class Coordinate:
    position_ms: tuple[float, ...] = (0.0,) * DIMENSIONS
    height_ms: float = HEIGHT_MIN_MS
    error: float = 1.0
    """What a distance is off, in parts of it, about."""

    @classmethod
    def of(cls, offer: Offer) -> Coordinate:
        """As the node says; of one that does not, at its hub's place: as far from everybody as from the hub."""
        said = offer.coordinate
        if said is None:
            return cls(height_ms=max(offer.capability.hub_round_trip_ms, HEIGHT_MIN_MS))
        return cls(said.position_ms, max(said.height_ms, HEIGHT_MIN_MS), said.error)

    def told(self) -> NetworkCoordinate:
        """For an offer, in tenths of a millisecond."""
        near = [round(min(1e5, max(-1e5, one)), 1) for one in self.position_ms]
        return NetworkCoordinate(
            position_ms=(near[0], near[1], near[2]), height_ms=round(min(6e4, self.height_ms), 1),
            error=round(self.error, 2),
        )  # fmt: skip

    def distance_ms(self, other: Coordinate) -> float:
        """There and back, as expected."""
        return math.dist(self.position_ms, other.position_ms) + self.height_ms + other.height_ms

    def measured(self, other: Coordinate, round_trip_ms: float, direction: Sequence[float]) -> Coordinate:
        """Where it is after one measurement to `other`. `direction`: any vector drawn at random, for two that are at
        one place. What cannot be a round trip is ignored."""
        if not 0 < round_trip_ms < 60_000:
            return self
        weight = self.error / (self.error + other.error)
        expected = self.distance_ms(other)
        off = abs(expected - round_trip_ms) / round_trip_ms
        error = min(ERROR_MAX, off * ERROR_STEP * weight + self.error * (1 - ERROR_STEP * weight))
        force = STEP * weight * (round_trip_ms - expected)
        away = [mine - theirs for mine, theirs in zip(self.position_ms, other.position_ms, strict=True)]
        length = math.hypot(*away)
        if length < 1e-6:
            away, length = list(direction), math.hypot(*direction)
            if length == 0:
                return Coordinate(self.position_ms, self.height_ms, error)
        # The unit vector of the paper: its height is that of both over its length, so heights grow with the distance.
        heights = self.height_ms + other.height_ms
        whole = length + heights
        position = tuple(mine + force * part / whole for mine, part in zip(self.position_ms, away, strict=True))
        height = max(HEIGHT_MIN_MS, self.height_ms + force * heights / whole)
        return Coordinate(position, height, error)
