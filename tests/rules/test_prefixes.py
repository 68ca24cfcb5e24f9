"""What a prompt may take over from earlier sessions of a ring."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shoal.gateway.prefixes import SHORTEST, Prefixes

few = st.lists(st.integers(0, 1), max_size=SHORTEST + 12)


@given(st.lists(st.tuples(few, st.sampled_from(["", "alice"])), max_size=12), few, st.sampled_from(["", "alice"]))
def test_what_is_found_begins_alike_and_is_the_longest_of_its_scope(
    over: list[tuple[list[int], str]], wanted: list[int], scope: str
) -> None:
    prefixes = Prefixes(sessions_max=4)
    kept: dict[int, tuple[list[int], str]] = {}
    for session, (tokens, theirs) in enumerate(over):
        kept[session] = (tokens, theirs)
        for gone in prefixes.add(session, tokens, theirs):
            del kept[gone]
        assert len(prefixes) == len(kept) <= 4

    def alike(tokens: list[int]) -> int:
        return next((at for at, (a, b) in enumerate(zip(tokens, wanted, strict=False)) if a != b),
                    min(len(tokens), len(wanted)))  # fmt: skip

    best = max((alike(tokens) for tokens, theirs in kept.values() if theirs == scope), default=0)
    found = prefixes.find(wanted, scope)
    if best < SHORTEST:
        assert found is None
    else:
        assert found is not None and found.positions == best
        tokens, theirs = kept[found.session]
        assert theirs == scope and tokens[: found.positions] == wanted[: found.positions]
        prefixes.forget(found.session)
        assert (again := prefixes.find(wanted, scope)) is None or again.session != found.session


def test_a_session_that_goes_on_from_another_takes_its_place() -> None:
    prefixes = Prefixes()
    first, second = list(range(50)), list(range(80))
    assert prefixes.add(1, first) == []
    assert prefixes.add(2, second) == [1], "all that it had is in the new one"
    assert prefixes.add(3, first[:40]) == [], "but not the other way round"
    assert prefixes.add(4, first[:40], "alice") == []
    assert prefixes.add(5, [7]) == [5], "too short to be of use"
