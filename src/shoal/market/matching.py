"""Which offers are what somebody wants; and where too few are, what excluded them and what would have to change."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from shoal.market.board import Board, Listing, Rows
from shoal.market.demands import Demand, all_of, any_of, demands, payable
from shoal.market.requirements import Needed, Wish, flops_text, nodes_text
from shoal.market.why_not import Change, Enough, changes_of, changes_within, less_together, two_together

EXCLUDERS_SHOWN, CHANGES_SHOWN = 4, 4
ONE = Needed()


@dataclass(frozen=True)
class Match:
    """What fits."""

    rows: Rows
    """Rows of the board; several devices of a node may be among them."""
    nodes: int
    flops: float
    """What they were measured at together, of each node its fastest device that fits; 0 where nobody asked for that."""
    enough: bool
    considered: int
    """Nodes whose offers are live and take such work."""
    excluded: dict[str, int]
    """By each requirement: nodes that it excludes, whatever the others do."""
    changes: tuple[Change, ...]
    """What would do, each by itself; none where enough fit."""
    reason: str
    together: tuple[Change, ...] = ()
    """Where none does by itself: two that would do together, the nearest that were found."""


def match(
    board: Board, wish: Wish, *, accepts: str | None = None, idle_only: bool = False, needed: Needed = ONE,
    called: Mapping[str, str] | None = None,
) -> Match:  # fmt: skip
    """The rows that fit, and where they are not as much as is needed, why. `called`: what whoever asks calls a
    requirement, where that is not its name in a job file."""
    base = board.open_to(accepts, idle_only=False)
    considered = board.nodes_in(base)
    asked = list(demands(board, wish.each))
    if idle_only:
        asked.append(Demand("idle", "not busy with another job", board.open_to(None, idle_only=True)))
    if wish.means is not None:
        asked.append(payable(board, wish.means))
    alternatives = [list(demands(board, one)) for one in wish.any_of]
    if alternatives:
        asked.append(Demand("any_of", f"one of {len(alternatives)} alternatives", any_of(base, alternatives)))
    met = all_of(base, asked)
    rows = np.flatnonzero(met)
    enough = Enough(board, needed)
    nodes, flops = board.nodes_in(met), enough.flops_of(met) if needed.flops else 0.0
    fit = "fits" if nodes == 1 else "fit"
    said = f"{nodes_text(nodes)} of {considered} {'on offer' if accepts is None else 'that take such work'} {fit}"
    if needed.flops:
        said += f", with {flops_text(flops)} together"
    if enough.met_by(met):
        return Match(rows, nodes, flops, True, considered, {}, (), f"{said}.")
    excluded = {demand.name: considered - board.nodes_in(base & demand.met) for demand in asked}
    called = called or {}
    found = [
        *less_together(nodes, flops, enough, called),
        *changes_within(board, base, asked, alternatives, enough, called),
        *changes_of(board, base, asked, enough, called),
    ]
    changes = sorted(found, key=lambda change: change.step)[:CHANGES_SHOWN]
    said += f", where {enough}."
    lacking = not enough.met_by(base)
    worst = sorted((demand for demand in asked if excluded[demand.name]), key=lambda one: -excluded[one.name])
    worst = worst[:EXCLUDERS_SHOWN]
    together = () if changes or lacking else two_together(board, base, asked, worst, enough, called)
    if worst:
        named = [f"{called.get(one.name, one.name)} ({one.asked}) {excluded[one.name]}" for one in worst]
        said += f" Excluded by {', by '.join(named)}."
    if changes:
        said += f" What would do: {'; '.join(change.sentence for change in changes)}."
    elif together:
        said += f" No single change would do, but two: {together[0].what} and {together[1].sentence}."
    elif lacking:
        said += " No more offer it at these hubs." if considered else " Nobody offers it at these hubs."
    else:
        said += " No one change would do, nor any two that were tried."
    return Match(rows, nodes, flops, False, considered, excluded, tuple(changes), said, together)


def fitting(listings: Iterable[Listing], wish: Wish) -> dict[bytes, float]:
    """The nodes of a few offers that fit, and at how many FLOP/s the fastest device of each that does was measured."""
    board = Board()
    for listing in listings:
        board.put(listing)
    rows = board.fastest(match(board, wish, needed=Needed(0)).rows)
    return {board.listing(row).node: float(board.number("flops")[row]) for row in rows}
