"""How many inner steps a round has: the fewest that the link can hide and the budgets allow, with the reason."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from shoal.rounds.length import FRAMING_BYTES, LEAST_STEPS, MOST_STEPS, choose_round_length, members_of_full_speed

HOME: dict[str, Any] = {
    "step_s": 0.1, "update_bytes": 17_000, "members": 2, "round_trip_s": 0.08, "rate_bps": 20e6,
    "bytes_per_s_budget": None, "lag": 1,
}  # fmt: skip


def test_a_fast_link_allows_the_shortest_rounds() -> None:
    chosen = choose_round_length(**{**HOME, "round_trip_s": 0.001, "rate_bps": 1e9})
    assert chosen.inner_steps == LEAST_STEPS
    assert "the link would allow even shorter rounds" in chosen.reason


def test_a_long_round_trip_has_to_hide_behind_computing() -> None:
    chosen = choose_round_length(**{**HOME, "round_trip_s": 0.3})
    assert chosen.inner_steps == 16  # 3 round trips and 16 ms of transfer, in six tenths of the round
    assert "the exchange hides behind that many" in chosen.reason


def test_without_lag_the_exchange_is_a_tenth_of_the_round() -> None:
    assert choose_round_length(**{**HOME, "lag": 0}).inner_steps > 2 * choose_round_length(**HOME).inner_steps


def test_a_budget_per_second_makes_rounds_longer_and_is_named() -> None:
    chosen = choose_round_length(**{**HOME, "bytes_per_s_budget": 40_000})
    assert chosen.inner_steps == 10
    assert "the byte budget allows (39.1 KiB/s)" in chosen.reason


def test_a_budget_per_token_counts_what_all_send_and_all_learn_from() -> None:
    budget = {"bytes_per_token_budget": 3.3, "step_tokens": 2048}
    chosen = choose_round_length(**HOME, **budget)
    assert chosen.inner_steps == 7
    assert "fewer would send more than the 3.3 bytes per token that are allowed" in chosen.reason
    # whatever a step takes: unlike a budget per second it does not depend on a speed that is only estimated
    assert choose_round_length(**{**HOME, "step_s": 0.2}, **budget).inner_steps == 7


@given(
    st.floats(1e-3, 10), st.integers(16, 1 << 30), st.integers(1, 64), st.floats(0, 1),
    st.none() | st.floats(1e4, 1e11), st.none() | st.floats(1, 1e9), st.none() | st.floats(1e-3, 1e9),
    st.floats(1, 1e7), st.integers(0, 1),
)  # fmt: skip
def test_every_budget_is_kept_or_the_reason_says_that_it_cannot_be(
    step_s: float, update: int, members: int, trip_s: float, rate: float | None, per_second: float | None,
    per_token: float | None, step_tokens: float, lag: int,
) -> None:  # fmt: skip
    chosen = choose_round_length(
        step_s=step_s, update_bytes=update, members=members, round_trip_s=trip_s, rate_bps=rate,
        bytes_per_s_budget=per_second, bytes_per_token_budget=per_token, step_tokens=step_tokens, lag=lag,
    )  # fmt: skip
    steps = chosen.inner_steps
    assert LEAST_STEPS <= steps <= MOST_STEPS and chosen.reason.startswith(f"{steps} inner steps a round: ")
    if steps < MOST_STEPS:
        if per_second is not None:
            moved = update * max(2, members) + FRAMING_BYTES
            assert moved / (steps * step_s) <= per_second * (1 + 1e-9)
        if per_token is not None:
            sent = members * (update * max(1, members - 1) + FRAMING_BYTES)
            assert sent / (steps * step_tokens) <= per_token * (1 + 1e-9)


def test_noise_in_a_first_measurement_does_not_make_rounds_longer() -> None:
    assert members_of_full_speed([34.0, 23.0]) == 2
    assert members_of_full_speed([1.0, 0.95, 0.5, 0.25]) == 2.75
    assert members_of_full_speed([0.0, 0.0]) == 2
    assert members_of_full_speed([]) == 1


@given(st.lists(st.floats(0, 1e15), min_size=1, max_size=50))
def test_nobody_counts_for_more_than_the_fastest_nor_for_less_than_measured(speeds: list[float]) -> None:
    found = members_of_full_speed(speeds)
    assert 1 <= found <= len(speeds)
    if max(speeds) > 0:
        assert found >= sum(speed / max(speeds) for speed in speeds) - 1e-9
