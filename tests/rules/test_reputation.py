"""What one has seen of a node, as a number, and in a file."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.market.reputation import NEW, REPUTATION_LEAST, Outcome, Seen, after
from shoal.sdk.acquaintances import Acquaintances, AcquaintancesDamaged

counts = st.integers(0, 1000)
some = st.builds(Seen, kept=counts, left=counts, absent=counts, lied=counts)


@given(some)
def test_good_raises_it_and_bad_lowers_it(seen: Seen) -> None:
    assert 0 < seen.score < 1
    assert after(seen, Outcome(kept=True), 0).score > seen.score
    for bad in (Outcome(left=True), Outcome(absent=True), Outcome(lied=True)):
        assert after(seen, bad, 0).score < seen.score
    assert after(seen, Outcome(lied=True), 0).score < after(seen, Outcome(absent=True), 0).score


def test_a_new_node_is_taken_one_that_died_too_and_one_that_lied_is_not() -> None:
    assert after(None, Outcome(), 0).score == NEW > REPUTATION_LEAST
    died = None
    for _ in range(8):
        died = after(died, Outcome(left=True), 0)
    assert died is not None and died.score > REPUTATION_LEAST
    assert after(Seen(), Outcome(lied=True), 0).score < REPUTATION_LEAST


def test_it_is_kept_in_a_file(tmp_path: Path) -> None:
    kept = Acquaintances(tmp_path / "home" / "nodes.json")
    assert kept.scores() == {}
    kept.add({}, 1)
    assert not (tmp_path / "home").exists()
    kept.add({b"a" * 32: Outcome(kept=True), b"b" * 32: Outcome(lied=True)}, 1)
    kept.add({b"a" * 32: Outcome(kept=True)}, 2)
    assert kept.read()[b"a" * 32] == Seen(kept=2, last_ms=2)
    assert kept.scores()[b"b" * 32] < REPUTATION_LEAST


@pytest.mark.parametrize("content", [b"{", b'{"zz": {}}', b'{"ab": {"kept": -1}}', b"[]"])
def test_a_damaged_file_is_told(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "nodes.json").write_bytes(content)
    with pytest.raises(AcquaintancesDamaged, match=r"nodes.json, which says what nodes have done"):
        Acquaintances(tmp_path / "nodes.json").read()
