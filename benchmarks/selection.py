"""Choosing among many offers, measured without a network (`market.py` prints it).

The offers are drawn: 60 cities in a space of round-trip times, prices with a long tail, ten kinds of devices. No figure
of it says what real offers cost.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from results_form import figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "rules"))
from exact_gangs import exact_cost

from shoal.market import Board, Listing, Needed, Requirements, Wish, cheapest_gang, match
from shoal.market.coordinates import DIMENSIONS, Coordinate
from shoal.protocol.offers import Capability, Device, Offer, Place, Throughput
from shoal.protocol.prices import Price

OFFERS = 100_000
KINDS = [("RTX 3060", 12, 5e13), ("RTX 3090", 24, 1.4e14), ("RTX 4090", 24, 3.3e14), ("A100", 80, 3.1e14),
         ("H100", 80, 9.9e14), ("L4", 24, 1.2e14), ("T4", 16, 6.5e13), ("RTX 2080", 8, 8e13), ("A6000", 48, 3.1e14),
         ("V100", 32, 1.2e14)]  # fmt: skip
COUNTRIES = ["DE", "NL", "FR", "US", "CA", "JP", "IN", "BR", "ZA", "SE"]
ONE_GOAL_MS, GANG_GOAL_MS, EXACT_GOAL = 10.0, 100.0, 1.01
GANG, SMALL, SMALL_GANG = 16, 60, 6


def listings(count: int, seed: int) -> list[Listing]:
    dice, numbers = random.Random(seed), np.random.default_rng(seed)
    cities = numbers.uniform(-100, 100, (60, DIMENSIONS))
    near, heights = numbers.normal(0, 4, (count, DIMENSIONS)), numbers.gamma(2, 2, count)
    prices = (numbers.lognormal(-1, 0.6, count) * 1e6).astype(int)
    found = []
    for at in range(count):
        name, gib, flops = dice.choice(KINDS)
        device = Device(kind="cuda", name=name, memory_bytes=gib << 30, memory_bytes_per_s=5e11,
                        throughput=(Throughput(dtype="bfloat16", flops=flops * dice.uniform(0.7, 1)),))  # fmt: skip
        city = dice.randrange(60)
        position = tuple((cities[city] + near[at]).tolist())
        offer = Offer(
            name=f"node{at}", sequence=1, issued_ms=0, lifetime_ms=60_000, price=Price(int(prices[at])),
            capability=Capability(devices=(device,), hub_rate_bps=dice.lognormvariate(18.5, 1)),
            place=Place(country=COUNTRIES[city % len(COUNTRIES)]),
            coordinate=Coordinate(position, float(heights[at])).told(),
        )  # fmt: skip
        found.append(Listing(at.to_bytes(32), offer))
    return found


def timed(times: int, work: Callable[[int], object]) -> tuple[float, float, list[object]]:
    """Median and 99th percentile in milliseconds, and what came of it."""
    took, found = [], []
    for at in range(times):
        began = time.perf_counter()
        found.append(work(at))
        took.append(1000 * (time.perf_counter() - began))
    return float(np.median(took)), float(np.percentile(took, 99)), found


def selection(quick: bool) -> list[dict[str, object]]:
    count, times = (5_000, 20) if quick else (OFFERS, 300)
    board, drawn = Board(), listings(count, 1)
    began = time.perf_counter()
    for one in drawn:
        board.put(one)
    put_us = 1e6 * (time.perf_counter() - began) / count
    dice = random.Random(2)

    def a_wish() -> Wish:
        return Wish(
            Requirements(
                device="cuda", memory_min_bytes=dice.choice([8, 16, 24, 40]) << 30,
                flops_min=dice.choice([0.0, 1e14]), bandwidth_min=dice.choice([0.0, 1e6]),
                countries_without=(dice.choice(COUNTRIES),), price_max=dice.choice([200_000, 400_000, 900_000]),
            )
        )  # fmt: skip

    price = board.number("price_micro_per_h")
    wishes = [a_wish() for _ in range(times)]

    def one(at: int) -> int | None:
        rows = match(board, wishes[at], accepts="train").rows
        return int(rows[price[rows].argmin()]) if len(rows) else None

    one_ms, one_p99, found = timed(times, one)

    def why(at: int) -> object:
        wanted = Requirements(memory_min_bytes=60 << 30, price_max=1_000 + at, countries=("DE",))
        return match(board, Wish(wanted), accepts="train", needed=Needed(50))

    why_ms, why_p99, _ = timed(times, why)
    costs = price.astype(np.int64)

    def gang(at: int) -> object:
        rows = match(board, wishes[at], accepts="train").rows
        limit = (15.0, 25.0, 40.0, 80.0)[at % 4]
        return cheapest_gang(
            costs[rows], board.position_ms[rows], board.number("height_ms")[rows], size=GANG, latency_max_ms=limit
        )  # fmt: skip

    gang_ms, gang_p99, gangs = timed(times, gang)
    named = sum(bool(one.members) for one in gangs)  # type: ignore[attr-defined]
    worst, proved, compared = beside_exact(5 if quick else 40)
    return [
        figure("selection/put", round(put_us, 1), "us/offer", compared_with=f"{count:,} offers"),
        figure("selection/one/p99", round(one_p99, 2), "ms", f"at most {ONE_GOAL_MS:g}", one_p99 <= ONE_GOAL_MS,
               f"median {one_ms:.2f}; {times} wishes, {sum(row is not None for row in found)} met"),
        figure("selection/why_not/p99", round(why_p99, 2), "ms", compared_with=f"median {why_ms:.2f}"),
        figure("selection/gang/p99", round(gang_p99, 1), "ms", f"at most {GANG_GOAL_MS:g}", gang_p99 <= GANG_GOAL_MS,
               f"{GANG} nodes within 15 to 80 ms, filters included; median {gang_ms:.1f}; {named} of {times} found"),
        figure("selection/exact", round(worst, 4), "", f"at most {EXACT_GOAL}", worst <= EXACT_GOAL,
               f"dearest of {compared} gangs of {SMALL_GANG} of {SMALL}, beside HiGHS; {proved} proved by the search"),
    ]  # fmt: skip


def beside_exact(instances: int) -> tuple[float, int, int]:
    """The cost of gangs beside those that an exact solver finds: the worst ratio, how many the search itself proved to
    be the cheapest, and of how many."""
    worst, proved, compared = 1.0, 0, 0
    for seed in range(instances):
        drawn = listings(SMALL, 100 + seed)
        costs = np.array([one.offer.price.micro_per_h for one in drawn])  # type: ignore[union-attr]
        places = np.array([Coordinate.of(one.offer).position_ms for one in drawn])
        places *= 0.3  # 60 nodes in 60 cities have nobody near
        heights = np.array([Coordinate.of(one.offer).height_ms for one in drawn])
        limit = (25.0, 40.0, 60.0)[seed % 3]
        best = exact_cost(costs, places, heights, SMALL_GANG, limit)
        gang = cheapest_gang(costs, places, heights, size=SMALL_GANG, latency_max_ms=limit)
        if best is None:
            assert not gang.members
            continue
        compared += 1
        proved += gang.proved
        worst = max(worst, gang.cost / best if gang.members else float("inf"))
    return worst, proved, compared
