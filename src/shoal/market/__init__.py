"""The rules by which offers and wishes meet. Pure: no IO, no clock; every decision comes with its reason.

- `fits(node, offer, wanted)`: whether an offer is what somebody asked for, and in which figure it falls short.
- `compare(held, new)`: which of two offers by one node counts.

Invariants: of two offers by one node the one with the higher sequence counts, whatever any clock said; two different
offers with one sequence never replace one another; a device must meet all demands made on a device by itself.
"""

from shoal.market.filters import fits
from shoal.market.standing import StaleOffer, Stamp, Standing, compare

__all__ = ["StaleOffer", "Stamp", "Standing", "compare", "fits"]
