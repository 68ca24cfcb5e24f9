"""Of what fits, the cheapest nodes that are enough."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shoal.market.board import Board, Rows
from shoal.market.gangs import cheapest_gang
from shoal.market.goodput import Amount, cheapest_cover
from shoal.market.requirements import Needed, flops_text, nodes_text
from shoal.quantities.money import format_money


@dataclass(frozen=True)
class Cheapest:
    """What is taken where the price alone decides."""

    rows: Rows
    """Of each node the row of its fastest device, the cheapest node first; empty where there are none."""
    micro_per_h: int
    currency: str
    """Of all of them; empty where they cost nothing."""
    reason: str


def cheapest(board: Board, rows: Rows, needed: Needed, within_ms: float | None = None) -> Cheapest:
    """The cheapest mix, as far as the search finds it, of nodes of these rows that is enough. Where several currencies
    are asked, in that of most of them: nothing is converted. `within_ms`: there and back between any two, by where they
    publish to be; how many is then all that can be needed."""
    mask = np.zeros(len(board.owner), dtype=bool)
    mask[rows] = True
    currency = board.commonest("currency", mask) or ""
    payable = np.flatnonzero(mask & board.among("currency", ["", currency]))
    fastest = board.fastest(payable)  # all devices of a node come for one price
    flops, prices = board.number("flops")[fastest], board.number("price_micro_per_h")[fastest].astype(np.int64)
    if within_ms is not None and needed.nodes > 1:
        gang = cheapest_gang(
            prices, board.position_ms[fastest], board.number("height_ms")[fastest], size=needed.nodes,
            latency_max_ms=within_ms,
        )  # fmt: skip
        if not gang.members:
            return Cheapest(rows[:0], 0, currency, gang.reason)
        chosen = np.array(gang.members)
    else:
        found = cheapest_cover([Amount(flops, needed.flops)], prices, least=needed.nodes, most=len(fastest))
        if found is None:
            return Cheapest(rows[:0], 0, currency, f"Those that fit are not {needed}.")
        chosen = found
    chosen = chosen[np.argsort(prices[chosen], kind="stable")]
    cost = int(prices[chosen].sum())
    costs = f"{format_money(cost)} {currency} an hour" if cost else "nothing"
    together = f" with {flops_text(float(flops[chosen].sum()))} together" if needed.flops else ""
    near = f" within {within_ms:.4g} ms of one another" if within_ms is not None and needed.nodes > 1 else ""
    return Cheapest(
        fastest[chosen],
        cost,
        currency if cost else "",
        f"The cheapest {nodes_text(len(chosen))}{together}{near}: {costs}.",
    )
