"""Tokens from logits: what the settings mean, and that nothing else decides."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.inference.sampling import choose, uniform
from shoal.protocol.serving import Choosing, Chosen

LOGITS = np.log(np.array([0.1, 0.5, 0.05, 0.35], dtype=np.float32))


def test_without_temperature_the_likeliest_is_taken() -> None:
    assert choose(LOGITS, Choosing(temperature=0), 3) == Chosen(1)
    assert choose(np.zeros(5, dtype=np.float32), Choosing(temperature=0), 3).token == 0


def test_draws_follow_the_distribution() -> None:
    counts = np.zeros(4)
    for position in range(20_000):
        counts[choose(LOGITS, Choosing(seed=7), position).token] += 1
    assert np.abs(counts / 20_000 - [0.1, 0.5, 0.05, 0.35]).max() < 0.012


def test_a_temperature_sharpens_or_flattens() -> None:
    def share(temperature: float) -> float:
        drawn = [choose(LOGITS, Choosing(temperature=temperature), at).token == 1 for at in range(4000)]
        return sum(drawn) / 4000

    sharp, flat = 0.5**2 / (0.01 + 0.25 + 0.0025 + 0.1225), 0.5**0.5 / sum(p**0.5 for p in (0.1, 0.5, 0.05, 0.35))
    assert share(0.5) == pytest.approx(sharp, abs=0.03) and share(2.0) == pytest.approx(flat, abs=0.03)


@pytest.mark.parametrize(
    ("top_p", "allowed"), [(0.0, {1}), (0.4, {1}), (0.6, {1, 3}), (0.9, {0, 1, 3}), (1.0, {0, 1, 2, 3})]
)
def test_a_nucleus_is_all_that_is_drawn_from(top_p: float, allowed: set[int]) -> None:
    assert {choose(LOGITS, Choosing(top_p=top_p), at).token for at in range(2000)} == allowed


def test_penalties_turn_away_from_what_was_said() -> None:
    greedy = Choosing(temperature=0, presence_penalty=1.0)
    assert choose(LOGITS, greedy, 0, {1: 1}).token == 3
    assert choose(LOGITS, Choosing(temperature=0, frequency_penalty=0.2), 0, {1: 1}).token == 1
    assert choose(LOGITS, Choosing(temperature=0, frequency_penalty=0.2), 0, {1: 5}).token == 3


def test_log_probabilities_are_the_models_own() -> None:
    chosen = choose(LOGITS, Choosing(temperature=0, presence_penalty=2.0, top_logprobs=2), 0, {1: 1})
    assert chosen.token == 3 and chosen.logprob == pytest.approx(math.log(0.35), abs=1e-6)
    assert [token for token, _ in chosen.top] == [1, 3]
    assert choose(LOGITS, Choosing(temperature=0, top_logprobs=0), 0).logprob == pytest.approx(math.log(0.5), abs=1e-6)


@given(st.integers(0, 2**64 - 1), st.integers(0, 7), st.integers(0, 1 << 20))
def test_a_draw_follows_from_seed_choice_and_position(seed: int, choice: int, position: int) -> None:
    number = uniform(seed, choice, position)
    assert 0 <= number < 1
    assert number == uniform(seed, choice, position)
    assert number != uniform(seed, choice, position + 1)
    assert number != uniform(seed, choice + 1, position)


def test_logits_that_are_no_numbers_choose_nothing() -> None:
    with pytest.raises(ValueError, match="position 4 are not finite"):
        choose(np.array([0, math.nan], dtype=np.float32), Choosing(), 4)
