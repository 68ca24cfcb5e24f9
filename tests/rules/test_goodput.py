"""Which mix of nodes trains most for its money, beside all mixes there are and beside an exact solver."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

from shoal.market.goodput import SLACK, Amount, TrainingWork, best_mix


def a_work(*, exchange_s: float = 0.0, per_member_bits: float = 0.0, hidden: bool = True) -> TrainingWork:
    """A model of 10 M parameters; a round of 20 steps of 4,096 tokens."""
    return TrainingWork(
        flops_per_token=6e7, efficiency=0.4, step_tokens=4096, inner_steps=20,
        exchange_s=lambda members, rate_bps: exchange_s + per_member_bits * members / rate_bps, hidden=hidden,
    )  # fmt: skip


node = st.tuples(
    st.sampled_from([5e12, 1e13, 4e13, 8e13]),
    st.sampled_from([2e6, 2e7, 1e8]),
    st.just(0) | st.integers(50_000, 900_000),
)


def columns(nodes: list[tuple[float, float, int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    flops, rates, costs = zip(*nodes, strict=True)
    return np.array(flops), np.array(rates), np.array(costs, dtype=np.int64)


def all_mixes(work: TrainingWork, nodes: list[tuple[float, float, int]], least: int, most: int):
    for count in range(least, min(most, len(nodes)) + 1):
        for some in itertools.combinations(range(len(nodes)), count):
            flops, rates, costs = zip(*(nodes[at] for at in some), strict=True)
            yield some, work.tokens_per_s(flops, min(rates)), sum(costs)


@settings(max_examples=150)
@given(st.lists(node, min_size=1, max_size=8), st.integers(1, 3))
def test_no_mix_has_much_more_work_for_its_money(nodes: list[tuple[float, float, int]], least: int) -> None:
    work = a_work()
    found = best_mix(work, *columns(nodes), nodes_min=least, nodes_max=6)
    mixes = list(all_mixes(work, nodes, least, 6))
    if not mixes:
        assert not found.members and "No mix" in found.reason
        return
    assert least <= len(found.members) <= 6
    assert (found.members, found.tokens_per_s, found.micro_per_h) in [(m, pytest.approx(s), c) for m, s, c in mixes]
    best = max(speed / max(1, cost) for _, speed, cost in mixes)
    assert found.tokens_per_s / max(1, found.micro_per_h) >= (1 - SLACK) * best * (1 - 1e-9)


@settings(max_examples=100)
@given(st.lists(node, min_size=1, max_size=9), st.floats(1e4, 1.5e6))
def test_the_cheapest_mix_that_is_fast_enough(nodes: list[tuple[float, float, int]], wanted: float) -> None:
    work = a_work()
    found = best_mix(work, *columns(nodes), nodes_max=6, tokens_per_s_min=wanted)
    enough = [cost for _, speed, cost in all_mixes(work, nodes, 1, 6) if speed >= wanted]
    if not enough:
        assert not found.members
        return
    assert found.tokens_per_s >= wanted
    assert found.micro_per_h == min(enough)


@settings(max_examples=100)
@given(
    st.lists(node, min_size=1, max_size=8),
    st.integers(1, 3),
    st.sampled_from([0.0, 2e5, 1e6]),
    st.floats(0.1, 12),
    st.data(),
)
def test_the_cheapest_of_any_mix_that_has_so_much_together(
    nodes: list[tuple[float, float, int]], least: int, wanted: float, needed: float, data: st.DataObject
) -> None:
    work = a_work()
    each = data.draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.0]), min_size=len(nodes), max_size=len(nodes)))
    found = best_mix(
        work, *columns(nodes), nodes_min=least, nodes_max=6, tokens_per_s_min=wanted,
        together=Amount(np.array(each), needed, "so much"),
    )  # fmt: skip
    enough = [
        cost
        for some, speed, cost in all_mixes(work, nodes, least, 6)
        if speed >= wanted and sum(each[at] for at in some) >= needed
    ]
    if not enough:
        why = "fast enough" if found.fastest_per_s else "so much together"
        assert not found.members and why in found.reason
        return
    assert sum(each[at] for at in found.members) >= needed and found.tokens_per_s >= wanted
    assert found.micro_per_h == min(enough)


@pytest.mark.parametrize("seed", range(10))
def test_it_is_within_a_hundredth_of_an_exact_solver(seed: int) -> None:
    dice = np.random.default_rng(seed)
    flops, costs = dice.uniform(5e12, 3e14, 60), dice.integers(50_000, 900_000, 60)
    work, wanted = a_work(), 4e6
    exact = milp(
        costs, integrality=np.ones(60), bounds=Bounds(0, 1),
        constraints=[LinearConstraint(flops * work.efficiency / work.flops_per_token, lb=wanted)],
    )  # fmt: skip
    found = best_mix(work, flops, np.full(60, 1e8), costs, nodes_max=60, tokens_per_s_min=wanted)
    assert found.tokens_per_s >= wanted and found.micro_per_h <= 1.01 * exact.fun
    half = dice.uniform(5e12, 6e14, 60)
    both = milp(
        costs, integrality=np.ones(60), bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(flops * work.efficiency / work.flops_per_token, lb=wanted),
            LinearConstraint(half, lb=2e15),
        ],
    )  # fmt: skip
    found = best_mix(
        work, flops, np.full(60, 1e8), costs, nodes_max=60, tokens_per_s_min=wanted, together=Amount(half, 2e15)
    )
    assert half[list(found.members)].sum() >= 2e15 and found.micro_per_h <= 1.01 * both.fun


def test_many_cheap_nodes_may_beat_a_large_one_and_a_poor_link_may_spoil_it() -> None:
    flops = np.array([3e14, *[1.5e14] * 4])
    costs = np.array([1_200_000, *[250_000] * 4])
    rates = np.array([1e9, 1e8, 1e8, 1e8, 1e6])
    work = a_work(per_member_bits=2e5)
    assert best_mix(work, flops, rates, costs, nodes_max=8).members == (1, 2, 3)  # not 4, whose link all would wait for
    assert best_mix(work, flops, rates, costs, nodes_max=1).members == (1,)
    assert best_mix(work, flops, rates, costs, nodes_max=8, micro_per_h_max=600_000).members in ((1, 2), (1, 3), (2, 3))
    fast = best_mix(work, flops, rates, costs, nodes_max=8, tokens_per_s_min=3.5e6)
    assert 0 in fast.members
    none = best_mix(work, flops, rates, costs, nodes_max=8, tokens_per_s_min=1e9, micro_per_h_max=600_000)
    assert none.reason.startswith("No mix of 5 measured nodes is fast enough: 1.0 G tokens/s are needed; the fastest")
    enough = best_mix(
        work, flops, rates, costs, nodes_max=8, tokens_per_s_min=none.fastest_per_s, micro_per_h_max=600_000
    )
    assert enough.members and enough.micro_per_h <= 600_000
    few = best_mix(work, flops, rates, costs, nodes_min=6, nodes_max=8, micro_per_h_max=600_000)
    assert few.reason == "No mix of 5 measured nodes has at least 6 and at most 8 nodes for at most 0.60/h together."


def test_what_a_mix_costs() -> None:
    mix = best_mix(a_work(), np.array([1.5e14]), np.array([1e8]), np.array([360_000]), nodes_max=1)
    assert mix.tokens_per_s == pytest.approx(1e6)
    assert mix.micro_per_million == pytest.approx(100)  # 360,000 an hour are 100 a second
    assert mix.cost_micro(10_000_001) == 1001
    assert mix.reason == "1 of 1 nodes: 1.0 M tokens/s for 0.36/h, a million tokens for 0.0001."


def test_exchange_that_is_not_hidden_takes_its_time() -> None:
    hidden, open_one = a_work(exchange_s=1.0), a_work(exchange_s=1.0, hidden=False)
    computing_s = 20 * 4096 * 6e7 / (0.4 * 1e14)
    both = [1e14, 1e14]
    assert hidden.tokens_per_s(both, 1e8) == pytest.approx(2e14 * 0.4 / 6e7 * computing_s / max(1.0, computing_s))
    assert open_one.tokens_per_s(both, 1e8) == pytest.approx(2e14 * 0.4 / 6e7 * computing_s / (1 + computing_s))
    assert open_one.tokens_per_s([1e14], 1e8) == pytest.approx(1e14 * 0.4 / 6e7), "one has nobody to exchange with"
