"""How likely a node stays, by what was seen of it."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from shoal.sharding import Presence

HOUR_S = 3600.0


def test_a_stranger_is_lost_once_a_day() -> None:
    assert Presence().survival() == round(math.exp(-1 / 24), 2) == 0.96


def test_hours_without_a_loss_speak_for_a_node_and_losses_against_it() -> None:
    assert Presence(seen_s=1000 * HOUR_S).survival() == 1.0
    assert Presence(seen_s=HOUR_S, losses=10).survival() == round(math.exp(-11 / 25), 2) == 0.64
    assert Presence(losses=100).survival(HOUR_S) == Presence(HOUR_S, 100).survival()


@given(st.floats(0, 1e9), st.integers(0, 10**6), st.floats(0, 1e6))
def test_it_is_a_chance_and_goes_with_what_was_seen(seen_s: float, losses: int, more_s: float) -> None:
    one = Presence(seen_s, losses).survival()
    assert 0 < one <= 1
    assert Presence(seen_s + more_s, losses).survival() >= one >= Presence(seen_s, losses + 1).survival()
