"""The ledger of samples, and the shuffled order."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from shoal.protocol.training import SampleRange
from shoal.rounds.order import BLOCK_SAMPLES, PassOrder, sample_indices
from shoal.rounds.samples import BadSamples, SampleLedger, divide


def positions(ranges):
    return [(piece.pass_number, at) for piece in ranges for at in range(piece.start, piece.stop)]


class LedgerMachine(RuleBasedStateMachine):
    """Against the plainest model there is: sets of positions."""

    @initialize(samples=st.integers(1, 40))
    def start(self, samples):
        self.ledger = SampleLedger(samples)
        self.shares = []
        self.accepted = set()

    @rule(count=st.integers(0, 60), pieces_max=st.integers(1, 5))
    def allocate(self, count, pieces_max):
        ranges, self.ledger = self.ledger.allocate(count, pieces_max)
        assert len(ranges) <= pieces_max
        got = positions(ranges)
        taken = self.accepted | {where for share in self.shares for where in positions(share)}
        assert len(set(got)) == len(got) <= count
        assert not set(got) & taken
        line, expected = 0, []
        while len(expected) < len(got):
            where = divmod(line, self.ledger.samples)
            if where not in taken:
                expected.append(where)
            line += 1
        assert got == expected  # the lowest free ones: what came back goes out before fresh samples
        if len(got) < count:
            assert len(ranges) == pieces_max
        if ranges:
            self.shares.append(ranges)

    @precondition(lambda self: self.shares)
    @rule(data=st.data())
    def accept(self, data):
        share = self.shares.pop(data.draw(st.integers(0, len(self.shares) - 1)))
        self.ledger = self.ledger.accept(share)
        self.accepted |= set(positions(share))
        with pytest.raises(BadSamples):
            self.ledger.accept(share)
        with pytest.raises(BadSamples):
            self.ledger.claim(share)

    @precondition(lambda self: self.shares)
    @rule(data=st.data())
    def give_back(self, data):
        share = self.shares.pop(data.draw(st.integers(0, len(self.shares) - 1)))
        self.ledger = self.ledger.give_back(share)
        with pytest.raises(BadSamples):
            self.ledger.give_back(share)

    @rule()
    def restart(self):
        """What the Commits accepted is enough to rebuild the ledger."""
        fresh = SampleLedger(self.ledger.samples)
        for where in sorted(self.accepted):
            piece = (SampleRange(where[0], where[1], where[1] + 1),)
            fresh = fresh.claim(piece).accept(piece)
        self.ledger = self.ledger.give_back_all()
        self.shares = []
        assert fresh == self.ledger

    @invariant()
    def counts(self):
        samples = self.ledger.samples
        assert self.ledger.samples_accepted == len(self.accepted)
        assert self.ledger.samples_open == sum(len(positions(share)) for share in self.shares)
        complete = 0
        while all((complete, at) in self.accepted for at in range(samples)):
            complete += 1
        assert self.ledger.passes_complete == complete
        gone = {(complete, at) for at in range(samples)} - self.accepted
        assert set(positions(self.ledger.missing(complete))) == gone


LedgerMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
test_the_ledger_agrees_with_sets_of_positions = LedgerMachine.TestCase


def test_a_range_outside_its_pass_or_named_twice_is_refused():
    ledger = SampleLedger(10)
    for ranges in (
        (SampleRange(0, 5, 11),),
        (SampleRange(0, 3, 3),),
        (SampleRange(0, 1, 4), SampleRange(0, 3, 6)),
    ):
        with pytest.raises(BadSamples):
            ledger.claim(ranges)


@given(st.lists(st.integers(0, 20), max_size=8), st.integers(1, 30), st.integers(0, 90))
def test_dividing_keeps_order_and_loses_nothing(counts, samples, total):
    ranges, _ = SampleLedger(samples).allocate(total)
    shares = divide(ranges, counts)
    flat = [where for share in shares for where in positions(share)]
    assert flat == positions(ranges)[: sum(counts)]
    left = len(positions(ranges))
    for share, count in zip(shares, counts, strict=True):
        assert len(positions(share)) == min(count, left)
        left -= len(positions(share))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**63 - 1), st.integers(0, 2**40))
def test_a_pass_visits_every_sample_once(samples, seed, number):
    order = PassOrder(samples, seed, number)
    everything = order.indices(0, samples)
    assert sorted(everything.tolist()) == list(range(samples))


@pytest.mark.parametrize("samples", [BLOCK_SAMPLES * 16, BLOCK_SAMPLES * 16 + 1, BLOCK_SAMPLES * 37 + 123])
def test_a_large_pass_visits_every_sample_once_and_draws_from_everywhere(samples):
    order = PassOrder(samples, 7, 3)
    everything = order.indices(0, samples)
    assert np.array_equal(np.sort(everything), np.arange(samples))
    first = everything[:256]
    assert len(np.unique(first // (samples // 16 + 1))) > 8
    stretches = np.unique(everything[: BLOCK_SAMPLES * 8] // BLOCK_SAMPLES)
    assert len(stretches) <= 2 * 16 + 2


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 200_000), st.integers(0, 2**63 - 1), st.integers(0, 9), st.data())
def test_one_position_and_many_agree(samples, seed, number, data):
    order = PassOrder(samples, seed, number)
    start = data.draw(st.integers(0, samples - 1))
    stop = min(samples, start + data.draw(st.integers(1, 40)))
    assert order.indices(start, stop).tolist() == [order.index(at) for at in range(start, stop)]


def test_passes_and_seeds_differ_and_stay_as_they_are():
    assert PassOrder(10, 1, 0).indices(0, 10).tolist() == [PassOrder(10, 1, 0).index(at) for at in range(10)]
    orders = {tuple(PassOrder(50, seed, number).indices(0, 50)) for seed in range(5) for number in range(5)}
    assert len(orders) == 25
    ranges = (SampleRange(0, 8, 10), SampleRange(1, 0, 3))
    expected = [*PassOrder(10, 1, 0).indices(8, 10), *PassOrder(10, 1, 1).indices(0, 3)]
    assert sample_indices(1, 10, ranges).tolist() == expected
    # Frozen: another order would break the replay of every job that has run.
    assert PassOrder(10, 1, 0).indices(0, 10).tolist() == GOLDEN_SMALL
    assert PassOrder(100_000, 2, 5).indices(65_530, 65_540).tolist() == GOLDEN_LARGE


GOLDEN_SMALL = [8, 4, 7, 2, 5, 9, 0, 3, 1, 6]
GOLDEN_LARGE = [11697, 42133, 24100, 86122, 66346, 38938, 51290, 71611, 12047, 77874]


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, 11)])
def test_positions_outside_a_pass_are_an_error(start, stop):
    with pytest.raises(IndexError):
        PassOrder(10, 0, 0).indices(start, stop)
