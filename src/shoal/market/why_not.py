"""Where what fits is not enough: which requirements could be changed, and how far, so that it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from shoal.market.board import Board, Mask, Rows
from shoal.market.demands import Demand, all_of, any_of, price_text, read_flops
from shoal.market.enough import cheapest
from shoal.market.requirements import ROUNDING, Needed, flops_text, nodes_text

ROUNDINGS = (0.0, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
"""How far a value is moved before it is shown, until what is shown does."""
LEFT_OUT = 10.0
"""How far it is to go without a requirement: as far as to ten times of one that has a number."""
ANOTHER = 5.0
"""How far it is to another currency or ledger."""


@dataclass(frozen=True)
class Change:
    """One requirement, changed."""

    name: str
    what: str
    """`price_max 0.42/h instead of 0.35/h`"""
    nodes: int
    step: float
    """How far it goes, in parts of what was asked: the nearest comes first."""
    limit: float | str | None = None
    """The requirement's new value; None where it is to be left out."""
    at_most: bool = False
    more: str = ""
    """What else is to be said of these nodes."""

    @property
    def sentence(self) -> str:
        """`price_max 0.42/h instead of 0.35/h: 14 nodes`"""
        return f"{self.what}: {nodes_text(self.nodes)}{self.more}"


class Enough:
    """So many nodes, which together were measured at so many FLOP/s."""

    def __init__(self, board: Board, needed: Needed) -> None:
        self._board, self.needed = board, needed
        self._least_flops = needed.flops * (1 - ROUNDING)

    def __str__(self) -> str:
        nodes, flops = self.needed.nodes, self.needed.flops
        if flops and nodes == 1:
            return f"{flops_text(flops)} are needed"
        together = f", with {flops_text(flops)} together" if flops else ""
        return f"{nodes} {'is' if nodes == 1 else 'are'} needed{together}"

    def met_by(self, rows: Mask) -> bool:
        needed = self.needed
        return self._board.nodes_in(rows) >= needed.nodes and (
            not needed.flops or self.flops_of(rows) >= self._least_flops
        )

    def flops_of(self, rows: Mask) -> float:
        """Together: of each node its fastest of these rows."""
        return float(self._board.number("flops")[self._board.fastest(np.flatnonzero(rows))].sum())

    def nearest(self, rows: Rows, values: NDArray[np.float64]) -> float | None:
        """The lowest value up to which rows are enough; None where all of them are not."""
        owners, flops = self._board.owner[rows], self._board.number("flops")[rows]
        order = np.lexsort((values, owners))
        owners, flops, values = owners[order], flops[order], values[order]
        first = np.ones(len(owners), dtype=bool)
        first[1:] = owners[1:] != owners[:-1]
        order = np.argsort(values, kind="stable")
        met = np.cumsum(first[order]) >= self.needed.nodes
        if self.needed.flops:
            gained = flops.copy()
            for at in np.flatnonzero(~first).tolist():  # few nodes have devices that differ
                flops[at] = max(flops[at], flops[at - 1])
                gained[at] = flops[at] - flops[at - 1]
            met &= np.cumsum(gained[order]) >= self._least_flops
        return float(values[order[met.argmax()]]) if met.any() else None


def less_together(nodes: int, flops: float, enough: Enough, called: Mapping[str, str]) -> Iterator[Change]:
    """What those that fit have, instead of what was asked of all together."""
    if nodes >= enough.needed.nodes and 0 < flops < enough.needed.flops:
        name = called.get("flops_together", "flops_together")
        told = next(text for part in ROUNDINGS if read_flops(text := flops_text(flops * (1 - part))) <= flops)
        what = f"{name} {told} instead of {flops_text(enough.needed.flops)}"
        yield Change("flops_together", what, nodes, 1 - flops / enough.needed.flops, read_flops(told))


def changes_of(
    board: Board, base: Mask, asked: list[Demand], enough: Enough, called: Mapping[str, str], *,
    anyway: Mask | None = None, within: str = "", only: str | None = None,
) -> Iterator[Change]:  # fmt: skip
    """Each requirement changed by itself, or one of them, no further than it takes to have enough. `anyway`:
    rows that fit whatever is changed. `within`: of what the requirements are a part."""
    anyway = np.zeros_like(base) if anyway is None else anyway
    for changed in asked:
        if only is not None and changed.name != only:
            continue
        name = within + changed.name if within else called.get(changed.name, changed.name)
        others = all_of(base, (demand for demand in asked if demand is not changed))
        if changed.values is None:
            yield from _with_another(board, changed, name, others, anyway, enough)
            nodes = board.nodes_in(others | anyway)
            if changed.can_go and enough.met_by(others | anyway):
                said = f"without {name} ({changed.asked})" if name != "idle" else "when those that are busy are free"
                yield Change(within + changed.name, said, nodes, LEFT_OUT)
            continue
        side = 1 if changed.at_most else -1
        rows = np.flatnonzero((others & ~np.isnan(changed.values)) | anyway)
        values = np.where(anyway[rows], -side * np.inf, changed.values[rows])
        nearest = enough.nearest(rows, side * values)
        if nearest is None:
            continue
        told, limit = _told(changed, side * nearest)
        nodes = len(np.unique(board.owner[rows[side * values <= side * limit]]))
        step = abs(limit - changed.limit) / max(changed.limit, 1e-9)
        what = f"{name} {told} instead of {changed.show(changed.limit)}"
        yield Change(within + changed.name, what, nodes, step, limit, changed.at_most)


def changes_within(
    board: Board, base: Mask, asked: list[Demand], alternatives: list[list[Demand]], enough: Enough,
    called: Mapping[str, str],
) -> Iterator[Change]:  # fmt: skip
    """Each requirement of each alternative changed by itself."""
    rest = all_of(base, (demand for demand in asked if demand.name != "any_of"))
    for at, one in enumerate(alternatives):
        anyway = any_of(rest, alternatives[:at] + alternatives[at + 1 :])
        yield from changes_of(board, rest, one, enough, called, anyway=anyway, within=f"any_of[{at + 1}].")


def _with_another(
    board: Board, changed: Demand, name: str, others: Mask, anyway: Mask, enough: Enough
) -> Iterator[Change]:
    """Asking for another text of a column, that of most nodes."""
    text = board.commonest(changed.column, others & ~changed.met) if changed.column else None
    if text is None:
        return
    met = others & board.among(changed.column, ["", text]) | anyway
    nodes = board.nodes_in(met)
    if not enough.met_by(met):
        return
    if changed.column == "currency":
        yield Change(changed.name, f"{name} {text} instead of {changed.text}", nodes, ANOTHER, text)
        return
    mix = cheapest(board, np.flatnonzero(met), enough.needed)
    those = "the cheapest costs" if len(mix.rows) == 1 else f"the cheapest {len(mix.rows)} cost"
    cost = f", of which {those} {price_text(mix.micro_per_h)} in {text.rpartition('/')[2]}"
    what = "with a budget" if not changed.text else f"with money at the ledger {text.split()[0][:8]}"
    yield Change(changed.name, what, nodes, ANOTHER, text, more=cost)


def two_together(
    board: Board, base: Mask, asked: list[Demand], worst: list[Demand], enough: Enough, called: Mapping[str, str]
) -> tuple[Change, ...]:
    """Two changes that do together: of each that excludes most, and the nearest of the others without it; of these the
    two that go least far. None where none were found."""
    found = []
    for first in worst:
        rest = [demand for demand in asked if demand is not first]
        second = min(changes_of(board, base, rest, enough, called), key=lambda change: change.step, default=None)
        if second is None:
            continue
        changed = [_with(board, demand, second) if demand.name == second.name else demand for demand in asked]
        then = list(changes_of(board, base, changed, enough, called, only=first.name))
        if then:
            found.append((second, min(then, key=lambda change: change.step)))
    return min(found, key=lambda two: two[0].step + two[1].step, default=())


def _with(board: Board, demand: Demand, change: Change) -> Demand:
    if change.limit is None:
        met = np.ones_like(demand.met)
    elif isinstance(change.limit, str):
        met = board.among(demand.column, ["", change.limit])
    else:
        values = demand.values if demand.values is not None else np.zeros(len(demand.met))
        met = values <= change.limit if change.at_most else values >= change.limit
    return replace(demand, met=met)


def _told(changed: Demand, value: float) -> tuple[str, float]:
    """How a value is shown that does when it is asked for as it is shown: rounded to the side that lets more in."""
    side = 1 if changed.at_most else -1
    for part in ROUNDINGS:
        text = changed.show(value * (1 + side * part))
        read = changed.read(text)
        if read >= value if changed.at_most else read <= value:
            return text, read
    return changed.show(value), value
