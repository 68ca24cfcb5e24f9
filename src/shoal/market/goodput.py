"""Useful work for its money: which mix of nodes trains most tokens per unit, or enough of them for the least.

A member's share of a round follows its measured speed, so that speeds add up, however unequal they are; what takes away
from the sum is the exchange between rounds, which is as slow as the slowest link in the mix and grows with its members.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from shoal.quantities import format_count
from shoal.quantities.money import format_money, format_price

FLOORS = 12
"""Slowest links that are tried: a slow one may cost a mix more than its node brings."""
SLACK = 0.1
"""A mix may be so much less work for its money than the best one, if it is faster."""
ITERATIONS = 50
STEPS_MAX = 4_000
"""Of the search for the cheapest mix that is fast enough."""
TRIES = 4
DONE = 1e-9
"""Of what was needed, so little may be missing: it was added up in another order."""

Column = NDArray[np.float64]


@dataclass(frozen=True)
class TrainingWork:
    """What a training job is to its members."""

    flops_per_token: float
    efficiency: float
    """The share of a measured matrix rate that training reaches."""
    step_tokens: int
    """In an inner step of the fastest member."""
    inner_steps: int
    exchange_s: Callable[[int, float], float]
    """(members, bits per second of the slowest link) -> seconds between the end of a round's steps and its Commit."""
    hidden: bool
    """Whether the exchange goes on while the next round is computed (lag 1)."""
    step_least_s: float = 0.0
    """No inner step is quicker, however fast the device."""

    def tokens_per_s(self, flops: Sequence[float], slowest_bps: float) -> float:
        """Of members that were measured at so many FLOP/s."""
        step_s = max(self.step_least_s, self.step_tokens * self.flops_per_token / (self.efficiency * max(flops)))
        computing_s = self.inner_steps * step_s
        exchange_s = self.exchange_s(len(flops), slowest_bps) if len(flops) > 1 else 0.0
        round_s = max(computing_s, exchange_s) if self.hidden else computing_s + exchange_s
        return self.inner_steps * self.step_tokens * sum(flops) / max(flops) / round_s


@dataclass(frozen=True)
class Amount:
    """What is needed of several nodes together, such as FLOP/s."""

    each: Column
    """What each of them has."""
    needed: float
    said: str = ""
    """As one reads it."""


@dataclass(frozen=True)
class Mix:
    """Nodes that train together, as places in what was given; none where none do."""

    members: tuple[int, ...]
    tokens_per_s: float
    micro_per_h: int
    reason: str
    fastest_per_s: float = 0.0
    """Tokens, of the fastest mix where none is fast enough."""

    @property
    def micro_per_million(self) -> float:
        """What a million tokens cost."""
        return self.micro_per_h / 3600 / self.tokens_per_s * 1e6 if self.members else 0.0

    def cost_micro(self, tokens: int) -> int:
        return int(np.ceil(self.micro_per_million * tokens / 1e6))


def best_mix(
    work: TrainingWork,
    flops: Column,
    rates_bps: Column,
    micro_per_h: NDArray[np.int64],
    *,
    nodes_min: int = 1,
    nodes_max: int,
    tokens_per_s_min: float = 0.0,
    together: Amount | None = None,
    micro_per_h_max: int | None = None,
) -> Mix:
    """The mix with the most work for its money. With `tokens_per_s_min`, as a deadline asks for, or an amount that its
    nodes have to have together: the cheapest that is enough. `micro_per_h_max`: of the mix together."""
    able = flops > 0
    cheapest = tokens_per_s_min > 0 or together is not None
    found: list[Mix] = []

    def mix_of(members: NDArray[np.int64]) -> Mix:
        speed = work.tokens_per_s(flops[members].tolist(), float(rates_bps[members].min()))
        return Mix(tuple(sorted(members.tolist())), speed, int(micro_per_h[members].sum()), "")

    def affordable(mix: Mix) -> bool:
        return micro_per_h_max is None or mix.micro_per_h <= micro_per_h_max

    for floor in _floors(rates_bps[able]):
        places = np.flatnonzero(able & (rates_bps >= floor))
        if cheapest:
            chosen = _enough(
                work, flops[places], micro_per_h[places], floor, tokens_per_s_min,
                together and replace(together, each=together.each[places]), nodes_min, nodes_max,
            )  # fmt: skip
            sets = [chosen] if chosen is not None else []
        else:
            order = _by_value(flops[places], micro_per_h[places], nodes_min, nodes_max)
            sets = [order[:count] for count in range(nodes_min, min(nodes_max, len(order)) + 1)]
        mixes = [mix_of(places[some]) for some in sets]
        found += [mix for mix in mixes if mix.tokens_per_s >= tokens_per_s_min and affordable(mix)]
    candidates = int(able.sum())
    if not found:
        if tokens_per_s_min > 0:
            sets = _fastest_sets(flops, rates_bps, micro_per_h, nodes_min, nodes_max)
            slow = [mix for mix in map(mix_of, sets) if affordable(mix)]
            fastest = max(slow, key=lambda mix: mix.tokens_per_s, default=None)
            if fastest is not None and (together is None or fastest.tokens_per_s < tokens_per_s_min):
                return _too_slow(fastest, candidates, tokens_per_s_min)
        return Mix((), 0.0, 0, _none(candidates, nodes_min, nodes_max, together, micro_per_h_max))
    if cheapest:
        best = min(found, key=lambda mix: (mix.micro_per_h, -mix.tokens_per_s, mix.members))
    else:
        # For nothing, a mix is as good as another; the faster one is then better.
        value = [mix.tokens_per_s / max(1, mix.micro_per_h) for mix in found]
        enough = (1 - SLACK) * max(value)
        good = [mix for mix, one in zip(found, value, strict=True) if one >= enough]
        best = max(good, key=lambda mix: (mix.tokens_per_s, -mix.micro_per_h, mix.members))
    return Mix(best.members, best.tokens_per_s, best.micro_per_h, _said(best, candidates))


def _floors(rates_bps: Column) -> list[float]:
    rates = np.unique(rates_bps)
    if len(rates) > FLOORS:
        rates = np.unique(np.quantile(rates, np.linspace(0, 1, FLOORS), method="lower"))
    return [float(rate) for rate in rates]


def _by_value(flops: Column, costs: NDArray[np.int64], least: int, most: int) -> NDArray[np.int64]:
    """Places in an order of which one beginning, of `least` to `most`, has the most FLOP/s for its money of all sets of
    such a size (Dinkelbach, 1967): each counts with what it brings beyond what its money buys."""
    rate, order = 0.0, np.arange(len(flops))
    for _ in range(ITERATIONS):
        beyond = flops - rate * costs
        order = np.lexsort((costs, -beyond))
        some = order[: min(max(int((beyond > 0).sum()), least), most)]
        better = float(flops[some].sum()) / max(1, int(costs[some].sum()))
        if better <= rate * (1 + 1e-12):
            break
        rate = better
    return order


def _said(mix: Mix, candidates: int) -> str:
    number = f"{len(mix.members)} of {candidates} nodes"
    return (
        f"{number}: {format_count(mix.tokens_per_s)} tokens/s for {format_price(mix.micro_per_h)}, a million tokens "
        f"for {format_money(round(mix.micro_per_million))}."
    )


def _none(candidates: int, nodes_min: int, nodes_max: int, together: Amount | None, cost: int | None) -> str:
    asked = f"at least {nodes_min} and at most {nodes_max} nodes"
    asked += f" with {together.said} together" if together else ""
    asked += f" for at most {format_price(cost)} together" if cost is not None else ""
    return f"No mix of {candidates} measured node{'s' * (candidates != 1)} has {asked}."


def _fastest_sets(
    flops: Column, rates_bps: Column, costs: NDArray[np.int64], least: int, most: int
) -> list[NDArray[np.int64]]:
    """Places of the fastest devices, and of those that are fastest for their money, of each number, over links of each
    floor."""
    sets = []
    for floor in _floors(rates_bps[flops > 0]):
        places = np.flatnonzero((flops > 0) & (rates_bps >= floor))
        for order in (
            np.argsort(-flops[places], kind="stable"),
            np.argsort(costs[places] / flops[places], kind="stable"),
        ):
            sets += [places[order[:count]] for count in range(least, min(most, len(order)) + 1)]
    return sets


def _too_slow(fastest: Mix, candidates: int, wanted: float) -> Mix:
    number = len(fastest.members)
    reason = (
        f"No mix of {candidates} measured node{'s' * (candidates != 1)} is fast enough: {format_count(wanted)} "
        f"tokens/s are needed; the fastest, of {number} node{'s' * (number != 1)}, trains "
        f"{format_count(fastest.tokens_per_s)} for {format_price(fastest.micro_per_h)}."
    )
    return Mix((), 0.0, 0, reason, fastest.tokens_per_s)


# --- enough, for the least --------------------------------------------------------------------------------------------


def _enough(
    work: TrainingWork, flops: Column, costs: NDArray[np.int64], floor_bps: float, wanted: float,
    together: Amount | None, least: int, most: int,
) -> NDArray[np.int64] | None:  # fmt: skip
    """A cheapest set that trains so many tokens a second over links of at least `floor_bps`, and has so much together,
    if any is found."""
    amounts = [] if together is None else [together]
    needed = wanted * work.flops_per_token / work.efficiency
    for _ in range(TRIES):
        speed = [Amount(flops, needed)] if wanted > 0 else []
        chosen = cheapest_cover([*speed, *amounts], costs, least=least, most=most)
        if chosen is None:
            return None
        reached = work.tokens_per_s(flops[chosen].tolist(), floor_bps)
        if reached >= wanted:
            return chosen
        needed *= max(1.001, wanted / reached)  # what the exchange takes has to be brought along
    return None


def cheapest_cover(
    amounts: Sequence[Amount], costs: NDArray[np.int64], *, least: int, most: int
) -> NDArray[np.int64] | None:
    """Places, from `least` to `most` of them, that have as much of each amount as is needed, for as little as is found:
    depth first, the most for their money first, leaving out what is no cheaper even if the last one could be taken in
    part."""
    parts = [one.each / one.needed for one in amounts if one.needed > 0]
    if not parts:
        return np.argsort(costs, kind="stable")[:least] if len(costs) >= least else None
    brings = np.minimum(np.array(parts), 1.0).sum(axis=0)
    order = np.lexsort((-brings, costs / np.maximum(brings, 1e-12)))
    cost = [int(one) for one in costs[order]]
    parts = [part[order] for part in parts]
    each = [part.tolist() for part in parts]
    best_first = [
        np.argsort(np.array(cost) / np.maximum(part, 1e-12), kind="stable").tolist() for part in parts
    ]  # fmt: skip
    count, steps = len(order), STEPS_MAX
    cheapest = np.concatenate([[0], np.cumsum(np.sort(costs))])
    best: tuple[int, tuple[int, ...]] | None = None

    def bound(at: int, missing: tuple[float, ...], places: int) -> float:
        if places > count - at:
            return float("inf")
        highest = float(cheapest[max(0, places)])
        for lacking, part, places_of in zip(missing, each, best_first, strict=True):
            total = 0.0
            for one in places_of:
                if lacking <= DONE:
                    break
                if one >= at and part[one] > 0:
                    total += min(1.0, lacking / part[one]) * cost[one]
                    lacking -= part[one]
            highest = max(highest, total if lacking <= DONE else float("inf"))
        return highest

    stack: list[tuple[int, tuple[float, ...], int, tuple[int, ...]]] = [(0, (1.0,) * len(parts), 0, ())]
    while stack and steps > 0:
        steps -= 1
        at, missing, spent, taken = stack.pop()
        if max(missing) <= DONE and len(taken) >= least:
            if best is None or spent < best[0]:
                best = (spent, taken)
            continue
        if at == count or len(taken) >= most:
            continue
        if best is not None and spent + bound(at, missing, least - len(taken)) >= best[0]:
            continue
        stack.append((at + 1, missing, spent, taken))
        rest = tuple(lacking - part[at] for lacking, part in zip(missing, each, strict=True))
        stack.append((at + 1, rest, spent + cost[at], (*taken, at)))
    return order[list(best[1])] if best is not None else None
