"""The rules by which offers and wishes meet. Pure: no IO, no clock; every decision comes with its reason.

- `Requirements`, `Wish`: what somebody asks of nodes.
- `Board`, `match(board, wish)`: all offers in columns; which of them fit (`demands`), what excluded the others, and
  what would do (`why_not`). `enough.cheapest`: of what fits, the cheapest mix that is enough.
- `cheapest_gang`: of those that fit, so many that any two are near enough, for as little as is found.
- `fits(node, offer, wanted)`: what a hub asks of one offer.
- `compare(held, new)`: which of two offers by one node counts.
- `auction.crossed(bids, asks)`: the price of one kind of thing, and who trades at it; `batches.clear`: what a batch of
  signed orders comes to; `batches.Gathering`: whether an order would count in the one that is open; `publishing`: what
  an auctioneer publishes of a batch, and whether that is right.

Invariants: of two offers by one node the one with the higher sequence counts, whatever any clock said; two different
offers with one sequence never replace one another; a device must meet all demands made on a device by itself; nobody
pays more or gets less than its limit, sellers get all that buyers pay, and no block has two holders.
"""

from shoal.market.board import Board, Listing
from shoal.market.filters import fits
from shoal.market.gangs import Gang, cheapest_gang
from shoal.market.matching import Match, fitting, match
from shoal.market.requirements import ANYTHING, Needed, Requirements, Wish
from shoal.market.standing import StaleOffer, Stamp, Standing, compare

__all__ = [
    "ANYTHING",
    "Board",
    "Gang",
    "Listing",
    "Match",
    "Needed",
    "Requirements",
    "StaleOffer",
    "Stamp",
    "Standing",
    "Wish",
    "cheapest_gang",
    "compare",
    "fits",
    "fitting",
    "match",
]
