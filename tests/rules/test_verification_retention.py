"""Which private states a member keeps."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shoal.protocol.blobs import BlobRef
from shoal.verification.retention import Retention


def ref(number: int, size: int) -> BlobRef:
    return BlobRef(number.to_bytes(32, "big"), size)


def test_a_state_is_let_go_once_it_is_older_than_the_window() -> None:
    retention = Retention(3, 1000)
    assert retention.advance(10, ref(10, 1)) == []
    assert retention.advance(13, None) == []
    assert retention.advance(14, None) == [ref(10, 1)]


@given(
    st.integers(0, 20),
    st.integers(0, 100),
    st.lists(st.tuples(st.integers(1, 5), st.none() | st.integers(1, 60)), max_size=40),
)
def test_what_is_kept_is_new_enough_and_fits_and_the_newest_stays(
    rounds: int, bytes_max: int, steps: list[tuple[int, int | None]]
) -> None:
    retention, number = Retention(rounds, bytes_max), 0
    made: dict[int, BlobRef] = {}
    let_go: set[bytes] = set()
    for passed, size in steps:
        number += passed
        if size is not None:
            made[number] = ref(number, size)
        let_go |= {one.hash for one in retention.advance(number, made.get(number))}
        kept = retention.kept
        assert {one.hash for one in kept} | let_go == {one.hash for one in made.values()}
        assert not {one.hash for one in kept} & let_go
        assert all(at >= number - rounds for at, one in made.items() if one in kept)
        assert len(kept) <= 1 or sum(one.size for one in kept) <= bytes_max
        if size is not None:
            assert made[number] in kept
