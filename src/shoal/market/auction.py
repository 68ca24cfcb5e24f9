"""One price at which buyers and sellers of one thing trade, for whom it pays to say what the thing is worth to them.

The price is the limit of an order that is then left out itself, so nobody who trades has a say in it. It is that of the
order which would come next on the side that has more blocks, if the last of the other side who would trade accepts it;
else that of this last one. One side may then have more to trade than the other, and lots that have nothing to do with
what an order says decide who of it goes without.

Where asks have more blocks, and each order one, this is SBBA (Segal-Halevi, Hassidim and Aumann, SAGT 2016), a double
auction after McAfee (1992) in which sellers get all that buyers pay; where bids have more, the same with the sides
exchanged. An order of several blocks is left out whole, as Huang, Scheller-Wolf and Sycara (2002) do it. What holds,
what cannot, and why: docs/market.md.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from shoal.protocol.orders import Why
from shoal.quantities.money import format_money


@dataclass(frozen=True, slots=True)
class Limit:
    """An order: up to so many blocks, each for at most (a bid) or at least (an ask) so much."""

    blocks: int
    limit_micro: int
    lot: bytes
    """Where limits do not decide the lowest comes first; no two are the same. Nothing that an order says may change its
    lot, or it would pay to say something else."""


@dataclass(frozen=True, slots=True)
class Fill:
    """What an order got."""

    blocks: int
    why: Why | None
    """What kept it from the rest; None where it got all."""
    reason: str


@dataclass(frozen=True)
class Crossing:
    """What a market came to."""

    price_micro: int | None
    """Of each block; None where none is traded."""
    bids: tuple[Fill, ...]
    """In the order in which they were given; so `asks`."""
    asks: tuple[Fill, ...]
    would_trade: int
    """Blocks that change hands where all gain is taken; at most those of one order are lost of them."""
    reason: str

    @property
    def traded(self) -> int:
        return sum(fill.blocks for fill in self.bids)


def crossed(bids: Sequence[Limit], asks: Sequence[Limit], currency: str) -> Crossing:
    """What the market of these comes to, in whichever order they are given."""
    demand = sorted(bids, key=lambda bid: (-bid.limit_micro, bid.lot))
    supply = sorted(asks, key=lambda ask: (ask.limit_micro, ask.lot))
    would_trade = _efficient(demand, supply)
    said = f"{_count(len(bids), 'bid')} for {_count(_blocks(bids), 'block')}, "
    said += f"{_count(len(asks), 'ask')} of {_blocks(asks)}"
    if not would_trade:
        highest = f"the highest bid is {_money(demand[0].limit_micro, currency)}" if bids else "nobody bids"
        lowest = f"the lowest ask is {_money(supply[0].limit_micro, currency)}" if asks else "nobody asks"
        none = Fill(0, "limit", f"Nothing is traded: {highest}, {lowest}.")
        return Crossing(None, (none,) * len(bids), (none,) * len(asks), 0, f"{said}. {none.reason}")

    # Which side is the longer one must not depend on limits, or it would pay to lie about one.
    asks_longer = _blocks(asks) >= _blocks(bids)
    longer, shorter = (supply, demand) if asks_longer else (demand, supply)
    next_at, last_at = _place(longer, would_trade + 1), _place(shorter, would_trade)
    following, last = longer[next_at] if next_at < len(longer) else None, shorter[last_at]
    long_side, short_side = longer[:next_at], shorter[: last_at + 1]
    names = ("ask", "bid") if asks_longer else ("bid", "ask")
    sign = 1 if asks_longer else -1
    if following is not None and sign * following.limit_micro <= sign * last.limit_micro:
        setter, whose = following, f"the {names[0]} that would come next"
    else:
        setter, whose = short_side.pop(), f"the last {names[1]} that would trade"
    wanted, there = (_blocks(side) for side in ((short_side, long_side) if asks_longer else (long_side, short_side)))
    traded = min(wanted, there)
    price = f"The price is {_money(setter.limit_micro, currency)}"
    lots = f"{price}. Buyers take {wanted} at that and sellers have {there}: lots decide who of them goes without."
    if not traded:
        lots = f"{price}, and nobody else {'sells' if wanted else 'buys'} at that: who gives the price is left out."
    got: dict[bytes, int] = {}
    for side in (long_side, short_side):
        left = traded
        for order in sorted(side, key=lambda order: order.lot):
            got[order.lot] = min(left, order.blocks)
            left -= got[order.lot]

    def fill(order: Limit, says: str) -> Fill:
        blocks = got.get(order.lot)
        if blocks is not None:
            return Fill(blocks, "lot", lots) if blocks < order.blocks else Fill(blocks, None, f"{price}.")
        if order.lot == setter.lot:
            return Fill(0, "sets-price", f"{price}, taken from this order, which is therefore left out.")
        tied = ": of equal limits lots decide which comes first" if order.limit_micro == setter.limit_micro else ""
        return Fill(0, "limit", f"{price}, and this order {says} {_money(order.limit_micro, currency)}{tied}.")

    return Crossing(
        price_micro=setter.limit_micro if traded else None,
        bids=tuple(fill(bid, "pays at most") for bid in bids),
        asks=tuple(fill(ask, "takes at least") for ask in asks),
        would_trade=would_trade,
        reason=f"{said}; {would_trade} would trade. {price}, taken from {whose}, and this order is left out, so that "
        f"nobody who trades sets the price: {traded} are traded.",
    )


def _efficient(bids: Sequence[Limit], asks: Sequence[Limit]) -> int:
    """How many blocks have a buyer who would pay what their seller asks; the best come first."""
    demand, supply = (list(itertools.accumulate((one.blocks for one in orders), initial=0)) for orders in (bids, asks))
    limits = [ask.limit_micro for ask in asks]
    pairs = zip(bids, demand[1:], strict=True)
    return max((min(wanted, supply[bisect_right(limits, bid.limit_micro)]) for bid, wanted in pairs), default=0)


def _place(orders: Sequence[Limit], block: int) -> int:
    """Of the order that has this block, counted from 1; behind the last where there are fewer."""
    return bisect_left(list(itertools.accumulate(one.blocks for one in orders)), block)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _blocks(orders: Sequence[Limit]) -> int:
    return sum(one.blocks for one in orders)


def _money(micro: int, currency: str) -> str:
    return f"{format_money(micro)} {currency}"
