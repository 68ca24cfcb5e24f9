"""Where nodes are found: what a driver or client needs of hubs, without knowing how many there are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from shoal.identity import Envelope
from shoal.protocol.offers import Offer, OfferFind
from shoal.world.network import Address


@dataclass(frozen=True)
class FoundOffer:
    """An offer whose signature was verified by who found it, with the envelope as proof for others."""

    node: bytes
    """Who signed it."""
    offer: Offer
    envelope: Envelope


class Directory(Protocol):
    """Finds nodes and asks them to call back. One implementation speaks to hubs; tests may hold a list."""

    async def find(self, wanted: OfferFind) -> list[FoundOffer]:
        """Live offers that fit, at most one a node, by NodeId, at most `wanted.limit`. Raises LinkError when nobody
        could be asked."""
        ...

    async def introduce(self, node: bytes, addresses: Sequence[Address]) -> None:
        """Ask `node` to dial this endpoint at one of `addresses`. Returns once the node was told; the link comes (or
        does not) on its own. Raises LinkError when nobody has a link to `node`."""
        ...
