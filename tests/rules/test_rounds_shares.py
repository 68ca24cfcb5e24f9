"""Shares in proportion to measured speed."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.rounds.shares import (
    CLAIM_RATIO_MAX,
    DEADLINE_PART,
    LEAST_SHARE,
    UNMEASURED_RATIO_MAX,
    Speed,
    credible,
    divide_samples,
    full_round,
    observed,
)

SPEEDS = st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=20)


@given(SPEEDS, st.integers(1, 100_000))
def test_everything_is_divided_and_nobody_is_far_from_proportion(speeds, total):
    division = divide_samples(speeds, total)
    assert sum(division.samples) == total
    working = [at for at, count in enumerate(division.samples) if count]
    together = sum(speeds[at] for at in working)
    for at in working:
        exact = total * speeds[at] / together
        # One more or less by rounding, and one for everybody who was lifted to one sample.
        assert abs(division.samples[at] - exact) <= len(speeds)
    for at, count in enumerate(division.samples):
        if not count and total >= len(speeds):
            assert speeds[at] * total / sum(speeds) < LEAST_SHARE


@given(SPEEDS, st.integers(1, 1000))
def test_the_faster_never_gets_less(speeds, total):
    samples = divide_samples(speeds, total).samples
    ranked = sorted(zip(speeds, samples, strict=True))
    for (slow, few), (fast, many) in pairwise(ranked):
        assert slow == fast or few <= many


def test_a_member_too_slow_for_one_sample_is_left_out_with_numbers():
    division = divide_samples([100.0, 1.0], 20)
    assert division.samples == (20, 0)
    assert division.reason == (
        "20 samples over 1 members at 101 samples/s together; 1 left out: at 1 samples/s the proportional share is "
        "0.2 of a sample, less than one can be given."
    )


def test_the_quickstart_speeds():
    assert divide_samples([1.0, 1.0, 0.5, 0.25], full_round([1.0, 1.0, 0.5, 0.25], 10, 8, 10**6)).samples == (
        80, 80, 40, 20,
    )  # fmt: skip


@pytest.mark.parametrize(("deadline_ms", "expected"), [(10**6, 80), (20_000, round(20 * DEADLINE_PART)), (1, 1)])
def test_a_round_fits_into_its_deadline(deadline_ms, expected):
    assert full_round([1.0], 10, 8, deadline_ms) == expected


@given(st.floats(0.1, 1e4), st.floats(0, 1e9))
def test_one_outlier_changes_nothing(speed, outlier):
    thought = Speed(speed)
    for measured in (speed, speed, outlier, speed, speed):
        thought = thought.measured(measured)
    assert thought.samples_per_s == pytest.approx(speed)


@given(st.floats(0.1, 1e4), st.floats(0.1, 1e4))
def test_a_lasting_change_is_followed(before, after):
    thought = Speed(before)
    for _ in range(14):
        thought = thought.measured(after)
    assert thought.samples_per_s == pytest.approx(after, rel=0.01, abs=abs(before - after) * 0.01)


def test_a_late_member_is_thought_slower_at_once():
    assert Speed(10.0, (10.0,)).late(100, 5.0).samples_per_s == pytest.approx(7.0)
    assert Speed(10.0, (10.0,)).late(10, 5.0).samples_per_s == pytest.approx(2.0)
    assert Speed(10.0).late(10, 0.0).samples_per_s == pytest.approx(7.0)


@pytest.mark.parametrize("nonsense", [0.0, -1.0, float("nan"), float("inf")])
def test_nonsense_is_no_measurement(nonsense):
    assert Speed(2.0).measured(nonsense) == Speed(2.0)


def test_a_claim_does_not_starve_the_others():
    honest = [Speed(10.0, (10.0,)), Speed(12.0, (12.0,)), Speed(8.0, (8.0,))]
    speeds = credible([*honest, Speed(1e12)])
    assert speeds == [10.0, 12.0, 8.0, 10.0 * UNMEASURED_RATIO_MAX]
    assert all(divide_samples(speeds, full_round(speeds, 10, 8, 10**6)).samples)
    assert credible([]) == []


def test_a_members_own_account_is_bounded_by_what_is_seen():
    assert observed(100, 1_000, 1_500) == 100.0  # computing took 1 s of 1.5
    assert observed(100, 1, 1_000) == 100.0 * CLAIM_RATIO_MAX
    assert observed(100, 0, 1_000) == 100.0
    assert observed(100, 1_000, 0) == 100.0
    assert observed(100, 0, 0) == 0.0
