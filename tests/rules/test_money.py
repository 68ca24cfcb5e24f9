"""Amounts and prices: as people write them, and as whole millionths."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.quantities import BadQuantity
from shoal.quantities.money import (
    AMOUNT_MAX,
    MICRO,
    format_money,
    format_price,
    owed,
    parse_money,
    parse_price,
    places_for,
    share,
)

AMOUNTS = st.integers(0, AMOUNT_MAX)


@given(AMOUNTS)
def test_what_is_written_is_read_again(micro: int) -> None:
    assert parse_money(format_money(micro)) == micro
    assert parse_price(format_price(micro)) == micro
    assert Decimal(format_money(micro)) * MICRO == micro


@pytest.mark.parametrize(
    ("text", "micro"),
    [("0.35", 350_000), ("1", MICRO), (7, 7 * MICRO), ("0", 0), ("12.000001", 12_000_001), (" 3.5 ", 3_500_000)],
)
def test_amounts_are_read(text: str | int, micro: int) -> None:
    assert parse_money(text) == micro


@pytest.mark.parametrize(
    "text", ["-1", "-0.5", "1e3", "0.0000001", "1,5", "1.", ".5", "", "nan", "inf", "٣", True, 0.1 + 0.2, "1 EUR", -3]
)
def test_what_is_no_amount_is_refused(text: str | int) -> None:
    with pytest.raises(BadQuantity, match="is no amount of money"):
        parse_money(text)


def test_more_than_can_be_counted_is_refused() -> None:
    with pytest.raises(BadQuantity, match="more money than can be counted"):
        parse_money("9223372036854.775808")
    with pytest.raises(BadQuantity, match="more money than can be counted"):
        parse_money(10**20)
    assert parse_money("9223372036854.775807") == AMOUNT_MAX
    with pytest.raises(BadQuantity, match="more money than can be counted"):
        parse_price("9223372036854/s")


def test_prices_are_read_per_hour() -> None:
    assert parse_price("0.35/h") == 350_000 == parse_price(" 0.35 / hour ")
    assert parse_price("0.0001/s") == 360_000 and parse_price("24/day") == MICRO
    for text in ("0.35", "0.35/week", "/h", "-1/h", "x/h"):
        with pytest.raises(BadQuantity, match=r"is no price|is no amount"):
            parse_price(text)
    with pytest.raises(BadQuantity, match="no whole number of millionths an hour"):
        parse_price("0.00001/d")


def test_money_is_written_as_people_read_it() -> None:
    assert [format_money(one) for one in (0, 350_000, -1_500_000, 1, 123_456_789_000)] == [
        "0.00", "0.35", "-1.50", "0.000001", "123456.789",
    ]  # fmt: skip
    amounts = (20 * MICRO, -497_040, 350_000)
    assert [format_money(one, places_for(amounts)) for one in amounts] == ["20.00000", "-0.49704", "0.35000"]
    assert places_for(()) == places_for((MICRO,)) == 2


@given(st.integers(0, 10**15), st.lists(st.integers(0, 10**10), min_size=1, max_size=20))
def test_what_is_owed_does_not_depend_on_how_often_it_is_looked_at(price: int, steps: list[int]) -> None:
    passed, paid = 0, 0
    for step in steps:
        passed += step
        paid += owed(price, passed) - paid
    assert paid == owed(price, sum(steps)) <= Decimal(price) * sum(steps) / 3_600_000


@given(AMOUNTS, st.integers(0, MICRO))
def test_a_share_is_never_more_than_its_part(micro: int, parts: int) -> None:
    assert 0 <= micro * parts - share(micro, parts) * MICRO < MICRO
