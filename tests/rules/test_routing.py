"""To which replica a stream goes, and what a replica is thought to have of its prompt."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from shoal.gateway.routing import LIKELY_TOKENS, POSITION_SHARE, Candidate, cheapest, choose

NEAR = Candidate("near", token_ms=10.0, start_ms=1.0)
FAR = Candidate("far", token_ms=10.0, start_ms=160.0)
QUICK = Candidate("quick", token_ms=4.0, start_ms=160.0)


def test_the_figures_stand_in_the_reason() -> None:
    best, reason = choose([FAR, replace(NEAR, streams=1, held=64)], prompt=96, tokens=10)
    assert best == 1
    assert reason == (
        "near is expected to answer in 241 ms: 10.0 ms a token, 1 streams, 1 ms away, 64 of 96 positions there; "
        "next far in 320 ms."
    )


def test_a_queue_a_link_and_a_prefix_each_decide() -> None:
    def best(*candidates: Candidate, prompt: int = 100, tokens: int = 100) -> str:
        return candidates[choose(candidates, prompt, tokens)[0]].name

    assert best(FAR, NEAR) == "near"
    assert best(FAR, replace(NEAR, streams=1)) == "far", "a queue outweighs a link"
    assert best(NEAR, QUICK) == "quick", "a quick token outweighs a link, where many are asked for"
    assert best(NEAR, QUICK, prompt=1, tokens=2) == "near", "and not where few are"
    assert best(NEAR, replace(FAR, held=8000), prompt=8000, tokens=10) == "far", "what is there need not be computed"
    assert best(NEAR, replace(FAR, held=800), prompt=8000, tokens=10) == "far"
    assert best(NEAR, replace(FAR, held=64), prompt=8000, tokens=10) == "near"
    assert best(replace(NEAR, name="b"), replace(NEAR, name="a")) == "a", "the same for every gateway"


def test_what_is_cheapest_is_taken_unless_it_is_slow_beside_others() -> None:
    cheap, quick = (36, 39.0), (72, 10.0)
    assert cheapest([quick, cheap]) == 1
    assert cheapest([quick, (36, 41.0)]) == 0, "more than four times as slow"
    assert cheapest([(72, 0.5), (36, 3.0)]) == 1, "what no measurement tells apart"
    assert cheapest([(36, 9.0), (36, 8.0), (36, 8.0)]) == 1, "of one price the quicker"
    assert cheapest([(36, 1e6)]) == 0


@given(
    st.lists(
        st.builds(
            Candidate,
            name=st.sampled_from("abc"),
            token_ms=st.floats(0.01, 1e4),
            streams=st.integers(0, 40),
            start_ms=st.floats(0, 1e3),
            held=st.integers(0, 10_000),
        ),
        min_size=1,
        max_size=6,
    ),
    st.integers(1, 8000),
    st.integers(1, 8000),
)
def test_nothing_else_would_be_sooner(candidates: list[Candidate], prompt: int, tokens: int) -> None:
    best, reason = choose(candidates, prompt, tokens)
    chosen = candidates[best]
    assert chosen.expected_ms(prompt, tokens) == min(one.expected_ms(prompt, tokens) for one in candidates)
    assert chosen.name in reason
    more = replace(chosen, streams=chosen.streams + 1)
    assert more.expected_ms(prompt, tokens) > chosen.expected_ms(prompt, tokens)
    assert replace(chosen, held=chosen.held + 64).expected_ms(prompt, tokens) <= chosen.expected_ms(prompt, tokens)


def test_an_answer_is_taken_to_have_a_likely_length() -> None:
    assert NEAR.expected_ms(16, 100_000) == 1 + 10 * (16 * POSITION_SHARE + LIKELY_TOKENS)
