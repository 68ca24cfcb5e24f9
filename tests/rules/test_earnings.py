"""What a node earns: never more than its price for the time it was kept, and the same however it is reckoned."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shoal.market.earnings import (
    Earnings,
    Serving,
    forecast_micro,
    lasts_s,
    say_dear,
    say_idle,
    say_uncounted,
    say_unpaid,
    say_unpaid_service,
    served_parts,
    token_us,
)
from shoal.quantities.money import owed

HOUR_MS = 3_600_000
PLENTY = 10**15


def test_an_hour_of_work_at_the_measured_speed_earns_the_price() -> None:
    earnings = Earnings().measured(0, samples_per_s=10.0, tokens_per_sample=128).accepted(10 * 128 * 3600)
    assert earnings.earned_micro(350_000, HOUR_MS, PLENTY) == 350_000
    assert earnings.earned_micro(350_000, HOUR_MS // 2, PLENTY) == 175_000, "never more than the price of the time"
    assert earnings.earned_micro(350_000, HOUR_MS, 1000) == 1000, "nor than was set aside"


def test_who_becomes_slower_earns_less_and_what_was_earned_stays() -> None:
    earnings = Earnings().measured(0, 10.0, 100)
    slow = earnings.accepted(500 * 3600)
    assert slow.earned_micro(360_000, HOUR_MS, PLENTY) == 180_000
    again = slow.measured(180_000, 5.0, 100)
    assert again.earned_micro(360_000, HOUR_MS, PLENTY) == 180_000
    assert again.accepted(500 * 1800).earned_micro(360_000, HOUR_MS, PLENTY) == 180_000 + 180_000


def test_a_speed_that_is_absurd_makes_no_token_dearer_than_time() -> None:
    claimed = Earnings().measured(0, 1e-9, 100).accepted(10**9)
    assert claimed.earned_micro(360_000, 1000, PLENTY) == 100
    again = claimed.measured(100, 10.0, 100).accepted(1000)
    assert again.earned_micro(360_000, 5000, PLENTY) == 200, "what was claimed before is no credit"
    away = claimed.measured(100, 1e-9, 100).accepted(10**9)
    assert away.earned_micro(360_000, 1000, PLENTY) == 200, "nor is time away from the job"
    assert Earnings().measured(0, 1e12, 10**6).accepted(10**9).earned_micro(360_000, HOUR_MS, PLENTY) == 0


@given(
    price=st.integers(0, 10**12),
    speed=st.floats(1e-6, 1e9),
    parts=st.lists(st.integers(0, 10**9), max_size=20),
    kept_ms=st.integers(0, 10**11),
    most=st.integers(0, 10**15),
)
def test_parts_do_not_matter_and_bounds_hold(
    price: int, speed: float, parts: list[int], kept_ms: int, most: int
) -> None:
    one = many = Earnings().measured(0, speed, 128)
    last = 0
    for part in parts:
        many = many.accepted(part)
        now = many.earned_micro(price, kept_ms, most)
        assert last <= now <= min(most, owed(price, kept_ms))
        last = now
    assert one.accepted(sum(parts)) == many


def test_unpaid_work_ends() -> None:
    assert say_unpaid(0, 0, 1000) is None
    assert say_unpaid(750, 1000, 1500) is None
    assert "its vouchers are for 0.00" in (say_unpaid(0, 1_000_000, 1_500_000) or "")


def test_a_node_that_comes_later_is_not_dearer_than_those_that_were_chosen() -> None:
    chosen = [(18_000_000, 1e12), (36_000_000, 1e12)]
    assert say_dear(72_000_000, 1e12, chosen) is None
    assert say_dear(720_000_000, 1e13, chosen) is None
    assert say_dear(3_600_000_000, 1e12, []) is None
    assert say_dear(3_600_000_000, 1e12, chosen) == (
        "it costs 3600.00 an hour, and at 2 times what others take it would be 72.00"
    )
    assert say_dear(1, 0.0, chosen) is not None, "who does nothing is worth nothing"


def test_a_node_that_says_it_is_slow_is_not_paid_for_its_time_for_ever() -> None:
    assert say_idle(100_000, 10, 3, 100_000, 100) is None, "ten times as dear"
    assert say_idle(100_000, 9, 3, 100_000, 100) == (
        "it did 9 tokens for 0.10, and others did 100 for 0.10: that is more than 10 times as dear"
    )
    assert say_idle(100_000, 9, 2, 100_000, 100) is None, "it has only begun"
    assert say_idle(9_999, 9, 3, 9_999, 100_000) is None, "it hardly costs anything"
    assert say_idle(10**9, 101, 3, 1, 100) is None, "without it the job would hardly go on"


def test_how_long_money_lasts_and_what_time_costs() -> None:
    assert lasts_s(350_000, 700_000) == 1800
    assert lasts_s(1, 0) == float("inf")
    assert forecast_micro(350_000, 3600) == 350_000
    assert forecast_micro(350_000, 0.001) == 1


STAGE_US = token_us(4, 2.0, 1.5)


def test_an_hour_of_tokens_one_after_the_other_earns_the_price() -> None:
    assert STAGE_US == 9500
    tokens = 3_600_000_000 // STAGE_US
    serving = Serving().served(served_parts(tokens, tokens), STAGE_US)
    assert 349_999 <= serving.earned_micro(350_000, HOUR_MS, PLENTY) <= 350_000
    assert serving.earned_micro(350_000, HOUR_MS // 2, PLENTY) == 175_000, "of several at once each counts, up to that"
    assert serving.earned_micro(350_000, HOUR_MS, 1000) == 1000, "nor more than was set aside"
    assert served_parts(0, 160) == served_parts(10, 10), "positions of a prompt go many at once"


def test_a_stage_that_is_loaded_anew_keeps_what_it_had_and_earns_by_the_time_since() -> None:
    claimed = Serving().served(served_parts(10**9, 10**9), token_us(1, 1e9, 0.0))
    assert claimed.earned_micro(360_000, 1000, PLENTY) == 100, "whatever a token takes by its word"
    again = claimed.ready(100)
    assert again.earned_micro(360_000, HOUR_MS, PLENTY) == 100
    assert again.served(16, 1_000_000).earned_micro(360_000, HOUR_MS, PLENTY) == 200
    assert token_us(1, 0.0, 0.0) == 1


@given(
    price=st.integers(0, 10**12),
    layer_ms=st.floats(0, 1e9),
    sessions=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)), max_size=20),
    ready_ms=st.integers(0, 10**11),
    before=st.integers(0, 10**9),
    most=st.integers(10**9, 10**15),
)
def test_what_is_served_is_paid_alike_in_whatever_parts_and_within_bounds(
    price: int, layer_ms: float, sessions: list[tuple[int, int]], ready_ms: int, before: int, most: int
) -> None:
    us = token_us(3, layer_ms, 0.0)
    serving, last = Serving().ready(before), before
    for generated, more in sessions:
        parts = served_parts(generated, generated + more)
        for part in (parts // 3, parts - parts // 3):  # as it comes
            serving = serving.served(part, us)
            now = serving.earned_micro(price, ready_ms, most)
            assert last <= now <= min(most, before + owed(price, ready_ms))
            last = now
    whole = sum(served_parts(generated, generated + more) for generated, more in sessions)
    assert Serving().ready(before).served(whole, us) == serving
    assert serving.served(-whole, us).earned_micro(price, ready_ms, most) == before, "a receipt that does not count"


def test_serving_that_is_not_paid_ends() -> None:
    minute = owed(3_600_000, 60_000)
    assert say_unpaid_service(0, minute, 3_600_000) is None
    assert say_unpaid_service(10**8, 10**8 + minute + 5_000_000, 3_600_000) is None
    assert "it has earned 0.08 by serving" in (say_unpaid_service(0, minute + 20_000, 3_600_000) or "")


def test_contributions_that_do_not_count_end() -> None:
    price = 3_600_000
    minute = owed(price, 60_000)
    assert say_uncounted(4, 10**9, 0, price) is None
    assert "4 contributions did not count" in (say_uncounted(5, minute + 1, 0, price) or "")
    assert say_uncounted(6, minute, 0, price) is None
    assert say_uncounted(6, 10**9, 10**9, price) is None, "who has paid as much is trusted with it"
    assert "6 contributions did not count" in (say_uncounted(7, 0, 10**9, price) or "")
