"""One price for one thing: nobody gains by another limit than the true one, and hardly a trade is lost."""

from __future__ import annotations

import itertools
from fractions import Fraction
from random import Random
from typing import TypeAlias

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from shoal.market.auction import Crossing, Limit, crossed

Said: TypeAlias = tuple[int, int]
"""Blocks, and the limit of each."""


def limits(said: list[Said], lots: list[int]) -> list[Limit]:
    return [Limit(blocks, limit, lot.to_bytes(2)) for (blocks, limit), lot in zip(said, lots, strict=True)]


def market(bids: list[Said], asks: list[Said], lots: list[int] | None = None) -> Crossing:
    drawn = list(range(len(bids) + len(asks))) if lots is None else lots
    return crossed(limits(bids, drawn[: len(bids)]), limits(asks, drawn[len(bids) :]), "USD")


def gain(came: Crossing, bids: list[Said], asks: list[Said]) -> int:
    """Of all together, if limits are what things are worth to them."""
    paid = sum(fill.blocks * limit for fill, (_, limit) in zip(came.bids, bids, strict=True))
    return paid - sum(fill.blocks * limit for fill, (_, limit) in zip(came.asks, asks, strict=True))


@st.composite
def markets(draw: st.DrawFn, blocks: int = 5, most: int = 7) -> tuple[list[Said], list[Said], list[int]]:
    """Bids, asks, and their lots; with limits so near to one another that many are the same."""
    said = st.tuples(st.integers(1, blocks), st.integers(1, 12))
    bids, asks = draw(st.lists(said, max_size=most)), draw(st.lists(said, max_size=most))
    return bids, asks, draw(st.permutations(range(len(bids) + len(asks))))


@settings(max_examples=200)
@given(markets())
def test_all_that_buyers_pay_is_what_sellers_get_and_nobody_goes_beyond_its_limit(
    drawn: tuple[list[Said], list[Said], list[int]],
) -> None:
    bids, asks, lots = drawn
    came = market(bids, asks, lots)
    assert sum(fill.blocks for fill in came.bids) == sum(fill.blocks for fill in came.asks) == came.traded
    assert (came.price_micro is None) == (came.traded == 0)
    for fills, said, side in ((came.bids, bids, 1), (came.asks, asks, -1)):
        for fill, (blocks, limit) in zip(fills, said, strict=True):
            assert 0 <= fill.blocks <= blocks
            assert (fill.why is None) == (fill.blocks == blocks)
            assert fill.reason
            if fill.blocks:
                assert came.price_micro is not None and side * (limit - came.price_micro) >= 0


def worth(bids: list[Said], asks: list[Said], lots: list[int], who: int, value: int) -> int:
    """What the market brings to one of the bids and asks, whose blocks are worth so much to it."""
    came = market(bids, asks, lots)
    if came.price_micro is None:
        return 0
    if who < len(bids):
        return came.bids[who].blocks * (value - came.price_micro)
    return came.asks[who - len(bids)].blocks * (came.price_micro - value)


def gains_by_a_lie(bids: list[Said], asks: list[Said], lots: list[int], who: int, lie: int) -> int:
    """What one gets more by saying `lie`, where what the others say, and the lots, are as they are."""
    said = [*bids, *asks]
    blocks, value = said[who]
    said[who] = (blocks, lie)
    true = worth(bids, asks, lots, who, value)
    return worth(said[: len(bids)], said[len(bids) :], lots, who, value) - true


@settings(max_examples=800)
@given(markets(), st.data())
def test_nobody_gains_by_another_limit_than_what_it_is_worth_to_it(
    drawn: tuple[list[Said], list[Said], list[int]], data: st.DataObject
) -> None:
    bids, asks, lots = drawn
    if bids or asks:
        who, lie = data.draw(st.integers(0, len(lots) - 1)), data.draw(st.integers(1, 14))
        assert gains_by_a_lie(bids, asks, lots, who, lie) <= 0


def test_nobody_gains_in_any_market_of_two_bids_and_two_asks() -> None:
    for values in itertools.product((2, 4, 6), repeat=4):
        bids, asks = [(1, value) for value in values[:2]], [(1, value) for value in values[2:]]
        for lots, who, lie in itertools.product(((0, 1, 2, 3), (3, 2, 1, 0), (1, 0, 3, 2)), range(4), range(1, 8)):
            assert gains_by_a_lie(bids, asks, list(lots), who, lie) <= 0


def exact(bids: list[Said], asks: list[Said]) -> tuple[int, int]:
    """The most that all can gain together, as an exact solver finds it, and by how many trades at most."""
    buy, sell = ([limit for blocks, limit in said for _ in range(blocks)] for said in (bids, asks))
    if not buy or not sell:
        return 0, 0
    # Of two ways to gain as much the one with more trades.
    pairs = 1000 * (np.array(buy)[:, None] - np.array(sell)[None, :]) + 1
    rows, columns = linear_sum_assignment(np.maximum(pairs, 0), maximize=True)
    chosen = pairs[rows, columns]
    return sum((chosen[chosen > 0] - 1).tolist()) // 1000, int((chosen > 0).sum())


@settings(max_examples=200)
@given(markets(blocks=1))
def test_of_single_blocks_at_most_one_trade_is_lost(drawn: tuple[list[Said], list[Said], list[int]]) -> None:
    bids, asks, lots = drawn
    came, (_, trades) = market(bids, asks, lots), exact(bids, asks)
    assert came.would_trade == trades
    assert trades - 1 <= came.traded <= trades


@settings(max_examples=200)
@given(markets())
def test_of_several_blocks_at_most_those_of_one_order_are_lost(
    drawn: tuple[list[Said], list[Said], list[int]],
) -> None:
    bids, asks, lots = drawn
    came, (_, trades) = market(bids, asks, lots), exact(bids, asks)
    setting = [
        blocks
        for fills, said in ((came.bids, bids), (came.asks, asks))
        for fill, (blocks, _) in zip(fills, said, strict=True)
        if fill.why == "sets-price"
    ]
    assert came.would_trade == trades
    assert len(setting) == (trades > 0)
    assert came.traded >= trades - sum(setting)


@settings(max_examples=40)
@given(markets(blocks=1, most=3))
def test_of_k_trades_all_together_lose_one_kth_of_their_gain_on_average_over_the_lots(
    drawn: tuple[list[Said], list[Said], list[int]],
) -> None:
    bids, asks, lots = drawn
    most, trades = exact(bids, asks)
    gains = [gain(market(bids, asks, list(some)), bids, asks) for some in itertools.permutations(sorted(lots))]
    if trades:
        assert Fraction(sum(gains), len(gains)) >= most - Fraction(most, trades)


@settings(max_examples=100)
@given(markets(), st.randoms(use_true_random=False))
def test_the_order_in_which_they_come_changes_nothing(
    drawn: tuple[list[Said], list[Said], list[int]], dice: Random
) -> None:
    bids, asks, lots = drawn
    some_bids, some_asks = limits(bids, lots[: len(bids)]), limits(asks, lots[len(bids) :])
    came = crossed(some_bids, some_asks, "USD")
    fills = dict(zip([*some_bids, *some_asks], [*came.bids, *came.asks], strict=True))
    dice.shuffle(some_bids)
    dice.shuffle(some_asks)
    again = crossed(some_bids, some_asks, "USD")
    assert dict(zip([*some_bids, *some_asks], [*again.bids, *again.asks], strict=True)) == fills
    assert (again.price_micro, again.reason) == (came.price_micro, came.reason)


@settings(max_examples=100)
@given(markets(most=3))
def test_lots_decide_who_trades_and_never_at_what_price(drawn: tuple[list[Said], list[Said], list[int]]) -> None:
    bids, asks, lots = drawn
    came = [market(bids, asks, list(some)) for some in itertools.islice(itertools.permutations(lots), 120)]
    assert len({one.price_micro for one in came} - {None}) <= 1


def test_the_decision_says_its_figures() -> None:
    came = market([(1, 500_000), (1, 450_000), (1, 200_000)], [(1, 100_000), (1, 300_000), (1, 400_000)])
    assert came.reason == (
        "3 bids for 3 blocks, 3 asks of 3; 2 would trade. The price is 0.40 USD, taken from the ask that would come "
        "next, and this order is left out, so that nobody who trades sets the price: 2 are traded."
    )
    assert came.price_micro == 400_000
    assert [fill.reason for fill in (*came.bids[1:], came.asks[2])] == [
        "The price is 0.40 USD.",
        "The price is 0.40 USD, and this order pays at most 0.20 USD.",
        "The price is 0.40 USD, taken from this order, which is therefore left out.",
    ]
    came = market([(1, 500_000), (1, 450_000)], [(1, 100_000), (1, 300_000), (1, 460_000)])
    assert came.reason == (
        "2 bids for 2 blocks, 3 asks of 3; 2 would trade. The price is 0.45 USD, taken from the last bid that would "
        "trade, and this order is left out, so that nobody who trades sets the price: 1 are traded."
    )
    assert came.asks[1].reason == (
        "The price is 0.45 USD. Buyers take 1 at that and sellers have 2: lots decide who of them goes without."
    )
    came = market([(1, 300_000), (1, 300_000), (1, 900_000)], [(1, 200_000)])
    assert came.reason == (
        "3 bids for 3 blocks, 1 ask of 1; 1 would trade. The price is 0.30 USD, taken from the bid that would come "
        "next, and this order is left out, so that nobody who trades sets the price: 1 are traded."
    )
    assert came.bids[1].reason == (
        "The price is 0.30 USD, and this order pays at most 0.30 USD: of equal limits lots decide which comes first."
    )
    assert market([(1, 100_000)], [(1, 100_001)]).reason == (
        "1 bid for 1 block, 1 ask of 1. Nothing is traded: the highest bid is 0.10 USD, the lowest ask is 0.100001 USD."
    )
    lone = market([(1, 400_000)], [(1, 100_000)])
    assert lone.bids[0].reason == "The price is 0.40 USD, taken from this order, which is therefore left out."
    assert lone.asks[0].reason == (
        "The price is 0.40 USD, and nobody else buys at that: who gives the price is left out."
    )
    assert market([], []).reason == "0 bids for 0 blocks, 0 asks of 0. Nothing is traded: nobody bids, nobody asks."


def test_whoever_stands_alone_on_its_side_gets_the_price_of_the_other_sides_next() -> None:
    assert market([(1, 10), (1, 9), (1, 7)], [(1, 1)]).price_micro == 9
    assert market([(8, 10)], [(1, limit) for limit in range(1, 12)]).price_micro == 9


def test_what_no_such_auction_can_do_it_does_not() -> None:
    # One buyer and one seller alone: Myerson and Satterthwaite.
    assert market([(1, 10)], [(1, 1)]).traded == 0
    # Who takes fewer blocks than it has use for may get them for less.
    asks = [(1, 1), (1, 2), (1, 9)]
    assert [worth([(blocks, 10)], asks, [0, 1, 2, 3], 0, 10) for blocks in (2, 1)] == [2, 8]
    # Who sends an order under another key may set the price at which it trades.
    bids = [(1, 10), (1, 9)]
    assert worth(bids, [(1, 1), (1, 2)], [0, 1, 2, 3], 0, 10) == 1
    assert worth(bids, [(1, 1), (1, 2), (1, 3)], [0, 1, 2, 3, 4], 0, 10) == 7
