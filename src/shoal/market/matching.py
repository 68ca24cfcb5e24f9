"""Which offers are what somebody wants; and where too few are, what excluded them and what would have to change."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from shoal.market.board import TIERS, Board, Listing, Mask, Rows
from shoal.market.enough import cheapest
from shoal.market.requirements import ROUNDING, USUAL_CURRENCY, Means, Needed, Requirements, Wish
from shoal.protocol.money import ledger_text
from shoal.quantities import (
    format_bytes,
    format_count,
    format_rate_bps,
    parse_bytes,
    parse_bytes_per_s,
    parse_count,
    parse_duration_s,
)
from shoal.quantities.money import format_price, parse_price

EXCLUDERS_SHOWN, CHANGES_SHOWN = 4, 4
ROUNDINGS = (0.0, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
"""How far a value is moved before it is shown, until what is shown does."""
LEFT_OUT = 10.0
"""How far it is to go without a requirement: as far as to ten times of one that has a number."""
ANOTHER = 5.0
"""How far it is to another currency or ledger."""


@dataclass(frozen=True)
class Demand:
    """One requirement, and which rows meet it."""

    name: str
    asked: str
    """As one reads it: `at most 0.35/h`."""
    met: Mask
    values: NDArray[np.float64] | None = None
    """What rows have, where less or more can be asked; not a number where they have nothing that could do."""
    limit: float = 0.0
    """What is asked of values."""
    at_most: bool = False
    """Whether values must not be above the limit; else not below."""
    show: Callable[[float], str] = str
    """A value, as one reads it."""
    read: Callable[[str], float] = float
    """What is shown, as it is understood when somebody asks for it."""
    column: str = ""
    """One of TEXTS, where another of its texts can be asked for; a node that has none of them always does."""
    text: str = ""
    """Which one is asked for."""
    can_go: bool = True
    """Whether it can be left out."""


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
        return f"{self.what}: {_count(self.nodes)}{self.more}"


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


class _Enough:
    """So many nodes, which together were measured at so many FLOP/s."""

    def __init__(self, board: Board, nodes: int, flops: float) -> None:
        self._board, self.nodes, self.flops = board, nodes, flops
        self._least_flops = flops * (1 - ROUNDING)

    def __str__(self) -> str:
        if self.flops and self.nodes == 1:
            return f"{_flops(self.flops)} are needed"
        together = f", with {_flops(self.flops)} together" if self.flops else ""
        return f"{self.nodes} {'is' if self.nodes == 1 else 'are'} needed{together}"

    def met_by(self, rows: Mask) -> bool:
        return self._board.nodes_in(rows) >= self.nodes and (not self.flops or self.flops_of(rows) >= self._least_flops)

    def flops_of(self, rows: Mask) -> float:
        """Together: of each node its fastest of these rows."""
        best = np.zeros(len(rows))
        np.maximum.at(best, self._board.owner[rows], self._board.number("flops")[rows])
        return float(best.sum())

    def nearest(self, rows: Rows, values: NDArray[np.float64]) -> float | None:
        """The lowest value up to which rows are enough; None where all of them are not."""
        owners, flops = self._board.owner[rows], self._board.number("flops")[rows]
        order = np.lexsort((values, owners))
        owners, flops, values = owners[order], flops[order], values[order]
        first = np.ones(len(owners), dtype=bool)
        first[1:] = owners[1:] != owners[:-1]
        order = np.argsort(values, kind="stable")
        met = np.cumsum(first[order]) >= self.nodes
        if self.flops:
            gained = flops.copy()
            for at in np.flatnonzero(~first).tolist():  # few nodes have devices that differ
                flops[at] = max(flops[at], flops[at - 1])
                gained[at] = flops[at] - flops[at - 1]
            met &= np.cumsum(gained[order]) >= self._least_flops
        return float(values[order[met.argmax()]]) if met.any() else None


def match(
    board: Board, wish: Wish, *, accepts: str | None = None, idle_only: bool = False, needed: int = 1,
    flops_together: float = 0.0, called: Mapping[str, str] | None = None,
) -> Match:  # fmt: skip
    """The rows that fit, and where they are not enough, why: those of fewer than `needed` nodes, or with less than
    `flops_together`. `called`: what whoever asks calls a requirement, where that is not its name in a job file."""
    base = board.open_to(accepts, idle_only=False)
    considered = board.nodes_in(base)
    asked = list(demands(board, wish.each))
    if idle_only:
        asked.append(Demand("idle", "not busy with another job", board.open_to(None, idle_only=True)))
    if wish.means is not None:
        asked.append(_payable(board, wish.means))
    alternatives = [list(demands(board, one)) for one in wish.any_of]
    if alternatives:
        asked.append(Demand("any_of", f"one of {len(alternatives)} alternatives", _any_of(base, alternatives)))
    met = _all_of(base, asked)
    rows = np.flatnonzero(met)
    enough = _Enough(board, needed, flops_together)
    nodes, flops = board.nodes_in(met), enough.flops_of(met) if flops_together else 0.0
    fit = "fits" if nodes == 1 else "fit"
    said = f"{_count(nodes)} of {considered} {'on offer' if accepts is None else 'that take such work'} {fit}"
    if flops_together:
        said += f", with {_flops(flops)} together"
    if enough.met_by(met):
        return Match(rows, nodes, flops, True, considered, {}, (), f"{said}.")
    excluded = {demand.name: considered - board.nodes_in(base & demand.met) for demand in asked}
    called = called or {}
    found = [
        *_less_together(nodes, flops, enough, called),
        *_changes_within(board, base, asked, alternatives, enough, called),
        *_changes(board, base, asked, enough, called),
    ]
    changes = sorted(found, key=lambda change: change.step)[:CHANGES_SHOWN]
    said += f", where {enough}."
    lacking = not enough.met_by(base)
    worst = sorted((demand for demand in asked if excluded[demand.name]), key=lambda one: -excluded[one.name])
    worst = worst[:EXCLUDERS_SHOWN]
    together = () if changes or lacking else _together(board, base, asked, worst, enough, called)
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
    board, found = Board(), dict[bytes, float]()
    for listing in listings:
        board.put(listing)
    for row in match(board, wish, needed=0).rows:
        node = board.listing(row).node
        found[node] = max(found.get(node, 0.0), float(board.number("flops")[row]))
    return found


def demands(board: Board, wanted: Requirements) -> Iterator[Demand]:
    """What is asked, one by one; what is not asked is left out."""
    if wanted.device != "any":
        yield Demand("device", wanted.device, board.among("kind", [wanted.device]))
    if wanted.device_name:
        part = wanted.device_name.casefold()
        names = [name for name in board.texts("device") if part in name.casefold()]
        yield Demand("device_name", f"{wanted.device_name!r} in its name", board.among("device", names))
    least: tuple[tuple[str, float, str, Callable[[float], str], Callable[[str], float]], ...] = (
        ("memory_min", wanted.memory_min_bytes, "memory_bytes", format_bytes, parse_bytes),
        ("flops_min", wanted.flops_min, "flops", _flops, _read_flops),
        ("memory_rate_min", wanted.memory_rate_min, "memory_bytes_per_s", _rate, parse_bytes_per_s),
        ("bandwidth_min", wanted.bandwidth_min, "bandwidth_bytes_per_s", _bits, parse_bytes_per_s),
        ("notice_min", wanted.notice_min_ms, "reclaim_notice_ms", _notice, _read_ms),
    )
    for name, value, column, show, read in least:
        if value > 0:
            values = board.number(column)
            yield Demand(name, f"at least {show(value)}", values >= value, values, value, show=show, read=read)
    if wanted.latency_max_ms is not None:
        values = board.number("latency_ms")
        known = np.where(np.isfinite(values), values, np.nan)
        limit = wanted.latency_max_ms
        yield Demand("latency_max", f"at most {_ms(limit)}", values <= limit, known, limit, True, _ms, _read_ms)
    for name, column, only, without in (
        ("countries", "country", wanted.countries, wanted.countries_without),
        ("regions", "region", wanted.regions, wanted.regions_without),
    ):
        if only:
            yield Demand(name, f"only {', '.join(only)}", board.among(column, only))
        if without:
            # Who does not say where it is may be just there.
            yield Demand(f"{name}_without", f"not {', '.join(without)}", ~board.among(column, ("", *without)))
    if wanted.tier != "open":
        yield Demand("tier", f"{wanted.tier} at least", board.tier >= TIERS.index(wanted.tier))
    values = board.number("reputation")
    if (values < wanted.reputation_min).any():
        asked, limit = f"at least {_share(wanted.reputation_min)}", wanted.reputation_min
        yield Demand("reputation_min", asked, values >= limit, values, limit, show=_share)
    if wanted.price_max is not None:
        priced = board.number("price_micro_per_h")
        limit = wanted.price_max
        yield Demand("price_max", f"at most {_price(limit)}", priced <= limit, priced, limit, True, _price, parse_price)
    currency = wanted.currency or (USUAL_CURRENCY if wanted.price_max is not None else None)
    if currency is not None:
        same = board.among("currency", ["", currency])
        if wanted.currency is not None or not same.all():
            can_go = wanted.price_max is None
            yield Demand("currency", f"priced in {currency}", same, column="currency", text=currency, can_go=can_go)


def _payable(board: Board, means: Means) -> Demand:
    if means.ledger is None:
        free = board.among("ledger", [""])
        return Demand("budget", "free, as the job has no budget", free, column="ledger", can_go=False)
    yours = ledger_text(means.ledger)
    met = board.among("ledger", ["", yours])
    return Demand("ledger", "paid at your ledger, or free", met, column="ledger", text=yours, can_go=False)


def _all_of(base: Mask, asked: Iterable[Demand]) -> Mask:
    met = base.copy()
    for demand in asked:
        met &= demand.met
    return met


def _any_of(base: Mask, alternatives: Iterable[list[Demand]]) -> Mask:
    met = np.zeros_like(base)
    for asked in alternatives:
        met |= _all_of(base, asked)
    return met


# --- why not ---------------------------------------------------------------------------------------------------------


def _less_together(nodes: int, flops: float, enough: _Enough, called: Mapping[str, str]) -> Iterator[Change]:
    """What those that fit have, instead of what was asked of all together."""
    if nodes >= enough.nodes and 0 < flops < enough.flops:
        name = called.get("flops_together", "flops_together")
        told = next(text for part in ROUNDINGS if _read_flops(text := _flops(flops * (1 - part))) <= flops)
        what = f"{name} {told} instead of {_flops(enough.flops)}"
        yield Change("flops_together", what, nodes, 1 - flops / enough.flops, _read_flops(told))


def _changes(
    board: Board, base: Mask, asked: list[Demand], enough: _Enough, called: Mapping[str, str], *,
    anyway: Mask | None = None, within: str = "", only: str | None = None,
) -> Iterator[Change]:  # fmt: skip
    """Each requirement changed by itself, or one of them, no further than it takes to have enough. `anyway`:
    rows that fit whatever is changed. `within`: of what the requirements are a part."""
    anyway = np.zeros_like(base) if anyway is None else anyway
    for changed in asked:
        if only is not None and changed.name != only:
            continue
        name = within + changed.name if within else called.get(changed.name, changed.name)
        others = _all_of(base, (demand for demand in asked if demand is not changed))
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


def _changes_within(
    board: Board, base: Mask, asked: list[Demand], alternatives: list[list[Demand]], enough: _Enough,
    called: Mapping[str, str],
) -> Iterator[Change]:  # fmt: skip
    """Each requirement of each alternative changed by itself."""
    rest = _all_of(base, (demand for demand in asked if demand.name != "any_of"))
    for at, one in enumerate(alternatives):
        anyway = _any_of(rest, alternatives[:at] + alternatives[at + 1 :])
        yield from _changes(board, rest, one, enough, called, anyway=anyway, within=f"any_of[{at + 1}].")


def _with_another(
    board: Board, changed: Demand, name: str, others: Mask, anyway: Mask, enough: _Enough
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
    mix = cheapest(board, np.flatnonzero(met), Needed(enough.nodes, enough.flops))
    those = "the cheapest costs" if len(mix.rows) == 1 else f"the cheapest {len(mix.rows)} cost"
    cost = f", of which {those} {_price(mix.micro_per_h)} in {text.rpartition('/')[2]}"
    what = "with a budget" if not changed.text else f"with money at the ledger {text.split()[0][:8]}"
    yield Change(changed.name, what, nodes, ANOTHER, text, more=cost)


def _together(
    board: Board, base: Mask, asked: list[Demand], worst: list[Demand], enough: _Enough, called: Mapping[str, str]
) -> tuple[Change, ...]:
    """Two changes that do together: of each that excludes most, and the nearest of the others without it; of these the
    two that go least far. None where none were found."""
    found = []
    for first in worst:
        rest = [demand for demand in asked if demand is not first]
        second = min(_changes(board, base, rest, enough, called), key=lambda change: change.step, default=None)
        if second is None:
            continue
        changed = [_with(board, demand, second) if demand.name == second.name else demand for demand in asked]
        then = list(_changes(board, base, changed, enough, called, only=first.name))
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


def _count(nodes: int) -> str:
    return "1 node" if nodes == 1 else f"{nodes} nodes"


def _told(changed: Demand, value: float) -> tuple[str, float]:
    """How a value is shown that does when it is asked for as it is shown: rounded to the side that lets more in."""
    side = 1 if changed.at_most else -1
    for part in ROUNDINGS:
        text = changed.show(value * (1 + side * part))
        read = changed.read(text)
        if read >= value if changed.at_most else read <= value:
            return text, read
    return changed.show(value), value


def _flops(value: float) -> str:
    return f"{format_count(value)}FLOP/s"


def _read_flops(text: str) -> float:
    return parse_count(text.removesuffix("FLOP/s"))


def _rate(value: float) -> str:
    return f"{format_bytes(value)}/s"


def _bits(value: float) -> str:
    return format_rate_bps(8 * value)


def _read_ms(text: str) -> float:
    return 1000 * parse_duration_s(text)


def _ms(value: float) -> str:
    return f"{value:.3g} ms" if value < 100 else f"{value:.0f} ms"


def _notice(value: float) -> str:
    return f"{value / 1000:.0f} s"


def _share(value: float) -> str:
    return f"{value:.2g}"


def _price(value: float) -> str:
    return format_price(int(value))
