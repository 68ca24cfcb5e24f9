"""Who makes way when places run short."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from shoal.transport.places import CROWDED, RESERVE, SHARE, HeldLink, handshake_to_end, plenty, room_for

PLACES = 16
MOST_OF_ONE = int(CROWDED * PLACES)


def links(source: str, count: int, idle_since: float | None = 0.0, wanted: bool = False) -> list[HeldLink]:
    return [HeldLink(f"{source} {number}".encode(), source, wanted, idle_since) for number in range(count)]


def test_while_there_is_room_one_address_may_have_it_all() -> None:
    for count in range(MOST_OF_ONE):
        assert plenty(count, PLACES)
        for wanted in (False, True):
            assert room_for("nat", wanted, links("nat", count, None), PLACES) == (True, None)
    assert not plenty(MOST_OF_ONE, PLACES)


def test_when_it_is_crowded_an_address_with_its_share_makes_way_for_itself() -> None:
    flood = links("flood", MOST_OF_ONE)
    assert room_for("flood", False, flood, PLACES) == (True, b"flood 7")
    assert room_for("flood", False, links("flood", MOST_OF_ONE, None), PLACES) == (False, None)
    for _ in range(int(SHARE * PLACES)):
        assert room_for("honest", False, flood, PLACES) == (True, None)
        flood += links("honest", 1, None)


def test_a_full_endpoint_takes_from_who_holds_most_and_there_from_who_was_idle_longest() -> None:
    full = [*links("a", 3, 1.0), *links("flood", 8, 5.0), HeldLink(b"old", "flood", False, 4.0), *links("b", 2, 0.0)]
    assert len(full) == PLACES - RESERVE * PLACES
    assert room_for("new", False, full, PLACES) == (True, b"old")
    in_use = [*links("a", 3, 1.0), *links("flood", 11, None)]
    assert room_for("new", False, in_use, PLACES) == (True, b"a 2")
    assert room_for("new", False, links("flood", 14, None), PLACES) == (False, None)


def test_places_are_kept_for_links_that_this_side_opens_and_those_make_way_last() -> None:
    strangers = links("a", 7, None) + links("b", 7, None)
    for own in range(2):
        assert room_for("peer", True, strangers + links("peer", own, 0.0, True), PLACES) == (True, None)
    own_ones = links("peer", 2, 0.0, True)
    assert room_for("peer", True, strangers + own_ones, PLACES) == (True, b"peer 1")
    assert room_for("new", False, strangers + own_ones, PLACES) == (False, None)
    idle = links("a", 7, 9.0) + links("b", 7, None)
    assert room_for("peer", True, idle + own_ones, PLACES) == (True, b"a 6")


@given(
    st.lists(st.tuples(st.sampled_from("abcde"), st.booleans(), st.none() | st.floats(0, 100)), max_size=200),
    st.integers(4, 32),
)
def test_places_are_never_more_than_there_are_and_what_strangers_use_or_the_node_wants_stays(
    newcomers: list[tuple[str, bool, float | None]], places: int
) -> None:
    held: dict[bytes, HeldLink] = {}
    for number, (source, wanted, idle_since) in enumerate(newcomers):
        admitted, leaving = room_for(source, wanted, list(held.values()), places)
        if leaving is not None:
            gone = held.pop(leaving)
            assert gone.idle_since is not None and (wanted or not gone.wanted)
        if admitted:
            held[str(number).encode()] = HeldLink(str(number).encode(), source, wanted, idle_since)
        assert len(held) <= places
        per_source = Counter(link.source for link in held.values() if not link.wanted)
        assert sum(per_source.values()) <= places - int(RESERVE * places)


def test_of_handshakes_the_oldest_of_the_address_with_most_makes_way_at_once_for_another() -> None:
    held = [("honest", 0.0), ("flood", 1.0), ("flood", 2.0), ("flood", 3.0)]
    assert handshake_to_end("new", held, 3.0, grace_s=10) == 1
    assert handshake_to_end("honest", held, 3.0, grace_s=10) == 1


def test_among_equals_a_handshake_has_its_time_and_newcomers_are_turned_away() -> None:
    for held in ([("flood", float(n)) for n in range(4)], [(f"bot {n}", float(n)) for n in range(4)]):
        assert handshake_to_end("flood", held, 9.9, grace_s=10) is None
        assert handshake_to_end("flood", held, 10.0, grace_s=10) == 0
