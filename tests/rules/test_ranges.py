"""Ranges of bytes: joined, few, and the pieces that they lie in."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from shoal.protocol.blobs import CHUNK_BYTES
from shoal.quantities import Range, are_in_order, covered, joined
from shoal.storage.pieces import PieceSet, bytes_in, piece_bounds, piece_count, pieces_in

SIZE = 40 * CHUNK_BYTES + 1234
EDGE = st.one_of(
    st.integers(0, SIZE),
    st.builds(lambda piece, off: min(SIZE, max(0, piece * CHUNK_BYTES + off)), st.integers(0, 41), st.integers(-2, 2)),
)
RANGES = st.lists(st.tuples(EDGE, EDGE).map(lambda two: (min(two), max(two))), max_size=30)


def touched(ranges: list[Range]) -> set[int]:
    """The pieces that have a byte of a range, looked at one by one."""
    bounds = [(index, *piece_bounds(index, SIZE)) for index in range(piece_count(SIZE))]
    return {n for n, at, length in bounds for a, b in ranges if a < b and max(a, at) < min(b, at + length)}


@given(ranges=RANGES)
def test_ranges_are_exactly_the_pieces_that_they_touch(ranges: list[Range]) -> None:
    few = joined(ranges)
    assert are_in_order(few, SIZE)
    pieces = pieces_in(few, SIZE)
    assert set(pieces) == (touched(ranges) or set(range(piece_count(SIZE)))), "no range means all of it"
    assert len(pieces) == len(set(pieces))
    assert bytes_in(pieces, SIZE) == sum(piece_bounds(index, SIZE)[1] for index in pieces)


@given(ranges=RANGES, most=st.integers(1, 6))
def test_joined_ranges_are_few_and_lose_nothing(ranges: list[Range], most: int) -> None:
    exact, bridged = joined(ranges), joined(ranges, gap=CHUNK_BYTES)
    assert joined(exact) == exact
    assert pieces_in(bridged, SIZE).count == pieces_in(exact, SIZE).count
    assert set(pieces_in(bridged, SIZE)) == set(pieces_in(exact, SIZE)), "a gap below a piece costs no piece"
    bounded = joined(ranges, gap=CHUNK_BYTES, most=most)
    assert len(bounded) <= most and are_in_order(bounded, SIZE)
    assert all(covered(*one, bounded) for one in ranges if one[0] < one[1])
    assert {end for one in bounded for end in one} <= {end for one in ranges for end in one}, "nothing at the ends"
    gaps = [after[0] - before[1] for before, after in itertools.pairwise(bridged)]
    kept = [after[0] - before[1] for before, after in itertools.pairwise(bounded)]
    assert sorted(kept) == sorted(gaps, reverse=True)[: len(kept)][::-1], "the largest gaps stay"


@given(one=st.sets(st.integers(0, 40)), other=st.sets(st.integers(0, 40)))
def test_sets_of_pieces_are_sets(one: set[int], other: set[int]) -> None:
    made = []
    for numbers in (one, other):
        made.append(PieceSet(41))
        for number in numbers:
            made[-1].add(number)
    full = PieceSet(41, full=True)
    for found, wanted in (
        (made[0] | made[1], one | other),
        (made[0] - made[1], one - other),
        (full - made[0], set(range(41)) - one),
        (full | made[0], set(range(41))),
    ):
        assert set(found) == wanted and len(found) == len(wanted) and found.complete == (len(wanted) == 41)


def test_what_is_not_in_order_is_noticed() -> None:
    for wrong in ([(5, 5)], [(5, 3)], [(0, 5), (5, 8)], [(0, 5), (4, 8)], [(6, 8), (0, 5)], [(0, 101)], [(-1, 5)]):
        assert not are_in_order(wrong, 100), wrong
    assert are_in_order([], 100) and are_in_order([(0, 5), (6, 100)], 100)
    assert covered(1, 4, [(0, 4)]) and not covered(1, 5, [(0, 4), (4, 9)])
