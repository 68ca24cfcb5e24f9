"""The cheapest gang within a latency, beside all gangs there are and beside an exact solver."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
from exact_gangs import Costs, Places, apart_ms, exact_cost
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.market.coordinates import DIMENSIONS, Coordinate
from shoal.market.gangs import cheapest_gang, near_one_another


def drawn(seed: int, count: int, spread: float = 50.0) -> tuple[Costs, Places, Places]:
    dice = np.random.default_rng(seed)
    cities = dice.uniform(-spread, spread, (max(1, count // 12), DIMENSIONS))
    positions = cities[dice.integers(0, len(cities), count)] + dice.normal(0, 4, (count, DIMENSIONS))
    return (dice.lognormal(12.7, 0.6, count)).astype(np.int64), positions, dice.gamma(2, 1.5, count)


@settings(max_examples=150)
@given(
    st.integers(0, 1 << 30), st.integers(2, 9), st.integers(2, 4), st.floats(5, 120), st.sampled_from([0.0, 300.0, 9e4])
)  # fmt: skip
def test_of_few_candidates_it_is_the_cheapest_gang_there_is(
    seed: int, count: int, size: int, limit: float, away: float
) -> None:
    costs, positions, heights = drawn(seed, count)
    positions += away  # wherever they are
    near = apart_ms(positions, heights) <= limit
    gangs = [gang for gang in itertools.combinations(range(count), size)
             if all(near[a, b] for a, b in itertools.combinations(gang, 2))]  # fmt: skip
    found = cheapest_gang(costs, positions, heights, size=size, latency_max_ms=limit)
    if not gangs:
        assert found.members == ()
        return
    assert tuple(sorted(found.members)) in gangs
    assert found.cost == sum(costs[list(found.members)]) == min(sum(costs[list(gang)]) for gang in gangs)
    assert found.proved


@pytest.mark.parametrize("seed", range(12))
def test_it_is_within_a_hundredth_of_an_exact_solver(seed: int) -> None:
    costs, positions, heights = drawn(seed, 60)
    limit, size = 30.0, 6
    exact = exact_cost(costs, positions, heights, size, limit)
    found = cheapest_gang(costs, positions, heights, size=size, latency_max_ms=limit)
    assert (exact is not None) == bool(found.members)
    if exact is not None:
        assert found.cost <= 1.01 * exact
        assert found.at_least <= exact + 0.5


@settings(max_examples=20)
@given(st.integers(0, 1 << 30), st.integers(2, 24), st.floats(1, 200))
def test_of_many_candidates_it_is_a_gang_and_no_cheaper_than_said(seed: int, size: int, limit: float) -> None:
    costs, positions, heights = drawn(seed, 3_000)
    found = cheapest_gang(costs, positions, heights, size=size, latency_max_ms=limit)
    if not found.members:
        return
    members = list(found.members)
    assert len(set(members)) == size
    assert (apart_ms(positions[members], heights[members]) <= limit + 1e-9).all()
    assert found.at_least <= found.cost == costs[members].sum()


def test_more_room_costs_no_more() -> None:
    costs, positions, heights = drawn(5, 40)
    found = [cheapest_gang(costs, positions, heights, size=5, latency_max_ms=limit) for limit in (15, 25, 40, 80, 160)]
    prices = [gang.cost for gang in found if gang.members]
    assert prices == sorted(prices, reverse=True)
    assert prices[-1] == np.sort(costs)[:5].sum()


def test_there_may_be_none() -> None:
    costs, positions, heights = drawn(1, 30)
    assert cheapest_gang(costs, positions, heights + 100, size=2, latency_max_ms=50).reason == (
        "There are no 2 of 30 candidates within 50 ms of one another."
    )
    assert cheapest_gang(costs, positions, heights, size=31, latency_max_ms=50).reason == (
        "There are only 30 candidates for a gang of 31."
    )


def test_coordinates_learn_distances_from_measurements() -> None:
    dice = np.random.default_rng(3)
    places = dice.uniform(0, 80, (30, 2))
    links = dice.uniform(1, 10, 30)
    true = np.linalg.norm(places[:, None] - places[None, :], axis=2) + links[:, None] + links[None, :]
    nodes = [Coordinate() for _ in places]
    for _ in range(200):
        for at in range(30):
            other = int(dice.integers(0, 30))
            if other != at:
                nodes[at] = nodes[at].measured(nodes[other], true[at, other], dice.normal(size=DIMENSIONS).tolist())
    off = [
        abs(nodes[a].distance_ms(nodes[b]) - true[a, b]) / true[a, b] for a, b in itertools.combinations(range(30), 2)
    ]
    assert np.median(off) < 0.1
    assert nodes[0].measured(nodes[1], -1.0, (1, 0, 0)) == nodes[0]
    assert nodes[0].measured(nodes[1], float("nan"), (1, 0, 0)) == nodes[0]


@given(
    st.lists(st.tuples(st.integers(0, 3), st.floats(0, 1e9)), max_size=50),
    st.lists(st.floats(-1, 1), min_size=DIMENSIONS, max_size=DIMENSIONS),
)
def test_coordinates_stay_finite_whatever_is_measured(steps: list[tuple[int, float]], direction: list[float]) -> None:
    nodes = [Coordinate() for _ in range(4)]
    for at, took in steps:
        nodes[at] = nodes[at].measured(nodes[(at + 1) % 4], took, direction)
    for node in nodes:
        assert np.isfinite([*node.position_ms, node.height_ms, node.error]).all()
        assert node.height_ms > 0


@given(
    count=st.integers(0, 12),
    seed=st.integers(0, 10_000),
    limit=st.sampled_from([5.0, 20.0, 60.0]),
    at_least=st.integers(1, 6),
)
def test_those_that_measured_to_be_near_are_and_the_advice_does(
    count: int, seed: int, limit: float, at_least: int
) -> None:
    numbers = np.random.default_rng(seed)
    whole = numbers.uniform(1, 100, (count, count))
    whole[numbers.uniform(size=(count, count)) < 0.1] = np.inf
    distances = np.minimum(whole, whole.T)
    costs = numbers.integers(0, 5, count)
    found = near_one_another(distances, costs, limit_ms=limit, at_least=at_least)
    assert all(distances[a, b] <= limit for a, b in itertools.combinations(found.members, 2))
    assert f"{len(found.members)} of {count} nodes are within" in found.reason
    if len(found.members) < at_least and "would be" in found.reason:
        told = float(re.search(r"within ([0-9.]+) ms [0-9]+ would be", found.reason)[1])  # type: ignore[index]
        assert len(near_one_another(distances, costs, limit_ms=told, at_least=at_least).members) >= at_least
    if count and not found.members:
        raise AssertionError("one node alone is near to all others that there are")


def test_the_far_one_is_left_out_and_of_two_alike_the_dearer() -> None:
    distances = np.array([[0.0, 5, 90], [5, 0, 80], [90, 80, 0]])
    free = np.zeros(3, dtype=np.int64)
    assert near_one_another(distances, free, limit_ms=20, at_least=2).members == (0, 1)
    assert near_one_another(distances, free, limit_ms=20, at_least=3).reason == (
        "2 of 3 nodes are within 20 ms of one another, and 3 are needed; within 90 ms 3 would be."
    )
    pair = np.array([[0.0, 50], [50, 0]])
    assert near_one_another(pair, np.array([7, 3]), limit_ms=20, at_least=1).members == (1,)


def test_a_coordinate_is_told_in_an_offer_and_understood() -> None:
    mine = Coordinate((1.23, -4.56, 1e9), 0.01, 0.777)
    told = mine.told()
    assert (told.position_ms, told.height_ms, told.error) == ((1.2, -4.6, 1e5), 0.0, 0.78)
