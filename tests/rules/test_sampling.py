"""Tokens from logits: what the settings mean, and that nothing else decides."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.inference.masks import allow, packed, unpacked
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


def test_a_bias_is_added_and_may_all_but_ban_a_token() -> None:
    greedy = Choosing(temperature=0, logit_bias=((1, -100.0), (2, 1.0)))
    assert choose(LOGITS, greedy, 0).token == 3
    assert choose(LOGITS, Choosing(temperature=0, logit_bias=((2, 100.0),)), 0).token == 2
    drawn = {choose(LOGITS, Choosing(logit_bias=((1, -100.0),)), at).token for at in range(2000)}
    assert drawn == {0, 2, 3}
    told = choose(LOGITS, Choosing(temperature=0, top_logprobs=0, logit_bias=((2, 100.0),)), 0)
    assert told.logprob == pytest.approx(math.log(0.05), abs=1e-6), "the model's own"
    with pytest.raises(ValueError, match="no token 4"):
        choose(LOGITS, Choosing(logit_bias=((4, 1.0),)), 0)


@given(st.lists(st.integers(0, (1 << 300) - 1), max_size=6), st.integers(1, 310))
def test_masks_travel_whole(masks: list[int], vocabulary: int) -> None:
    befores = [0, *masks]
    sent = [packed(mask, before) for mask, before in zip(masks, befores, strict=False)]
    got = list(unpacked(sent, vocabulary))
    assert len(got) == len(masks)
    for mask, allowed in zip(masks, got, strict=True):
        assert allowed.tolist() == [bool(mask >> token & 1) for token in range(vocabulary)]
    assert masks == [] or len(packed(masks[0], masks[0])) < 10
    tokens = [mask.bit_length() - 1 if mask else 0 for mask in masks]
    assert allow(sent, tokens) == all(masks)
    assert not allow(sent[:1], [(1 << 31) - 1]) or masks == []


@given(
    st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=40),
    st.data(),
    st.sampled_from([0.0, 1e-4, 0.3, 1.0, 2.0, 10.0]),
    st.floats(0, 1),
    st.integers(0, 1 << 40),
)
def test_what_a_mask_forbids_is_never_chosen(
    logits: list[float], data: st.DataObject, temperature: float, top_p: float, seed: int
) -> None:
    some = data.draw(st.lists(st.booleans(), min_size=len(logits), max_size=len(logits)).filter(any))
    bias = data.draw(st.dictionaries(st.integers(0, len(logits) - 1), st.floats(-100, 100), max_size=5))
    sampling = Choosing(
        temperature=temperature, top_p=top_p, seed=seed, presence_penalty=2.0, logit_bias=tuple(bias.items())
    )
    chosen = choose(np.array(logits, dtype=np.float32), sampling, 3, {0: 2}, np.array(some))
    assert some[chosen.token]


def test_a_mask_that_allows_all_changes_nothing_and_one_that_allows_none_is_an_error() -> None:
    for at in range(200):
        assert choose(LOGITS, Choosing(seed=5), at, None, np.ones(4, bool)) == choose(LOGITS, Choosing(seed=5), at)
    with pytest.raises(ValueError, match="position 7 no token is allowed"):
        choose(LOGITS, Choosing(), 7, None, np.zeros(4, bool))
    with pytest.raises(ValueError, match="not whole"):
        list(unpacked([b"mask"], 4))
    for broken in (b"", packed(15)[:1]):
        assert not any(next(unpacked([broken], 4)))
    assert not any(next(unpacked([packed(1 << (300 << 20))], 4))), "300 million tokens in some kilobytes"
