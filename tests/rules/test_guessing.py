"""Guessed tokens: what is guessed, how many, and how many hold."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shoal.inference.guessing import GUESS_MAX, Guessing, held, look_up


def test_what_followed_the_same_ending_is_guessed() -> None:
    assert look_up([1, 2, 3, 4, 5, 1, 2, 3]) == (4, 5, 1, 2, 3)
    assert look_up([1, 2, 3, 4, 5, 1, 2, 3], most=2) == (4, 5)
    assert look_up([7, 8, 1, 9, 8, 2, 7, 8]) == (1, 9, 8, 2, 7, 8)
    assert look_up([5, 6, 1, 5, 6, 2, 5, 6]) == (2, 5, 6), "the latest place"
    assert look_up([1, 2, 3, 9, 2, 3, 8, 1, 2, 3]) == (9, 2, 3, 8, 1, 2, 3), "the longer ending"
    assert look_up([1, 2, 3, 4]) == ()
    assert look_up([]) == () and look_up([1]) == ()
    assert look_up([4, 4, 4, 4]) == (4,)


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(1, 20))
def test_a_guess_stands_in_the_text(text: list[int], most: int) -> None:
    guess = look_up(text, most)
    assert len(guess) <= most
    if guess:
        places = [text[at : at + len(guess)] for at in range(len(text))]
        assert list(guess) in places


@given(st.lists(st.integers(0, 2), max_size=20), st.lists(st.integers(0, 2), max_size=20))
def test_as_many_hold_as_agree_from_the_start(guess: list[int], chosen: list[int]) -> None:
    count = held(guess, chosen)
    assert guess[:count] == chosen[:count]
    assert count == min(len(guess), len(chosen)) or guess[count] != chosen[count]


def test_guesses_get_longer_where_they_hold_and_shorter_where_not() -> None:
    good, bad = Guessing(), Guessing()
    for _ in range(30):
        good, bad = good.checked(8, 8), bad.checked(8, 0)
    assert good.right > 0.99 and bad.right < 0.05
    assert good.length(ring_ms=100, position_ms=2) == GUESS_MAX
    assert bad.length(ring_ms=50, position_ms=2) == 0
    assert Guessing(0.5).length(ring_ms=100, position_ms=2) == 5
    assert Guessing(0.5).length(ring_ms=1, position_ms=2) == 0
    assert Guessing(0.5).checked(0, 0) == Guessing(0.5)
