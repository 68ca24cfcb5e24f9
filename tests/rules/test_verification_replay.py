"""Verdicts on replays, and the choice of audits."""

import struct

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.protocol.blobs import BlobRef
from shoal.protocol.training import SKETCH_WIDTH, Contribution, Engine, NodeWork
from shoal.verification.audits import audited, rate_needed, secret_commitment
from shoal.verification.replay import Outcome, Recomputed, Thresholds, compare_sketches, judge, not_replayable

HERE = Engine("torch 2.13.0", "cpu", 1, 1)
ELSEWHERE = Engine("torch 2.13.0", "cpu", 2, 1)


def sketches(steps=4, factor=1.0, altered=None, by=0.0):
    rows = []
    for step in range(steps):
        values = [3.0 - step * 0.1] + [factor * (bucket - 3.5) * (step + 1) for bucket in range(SKETCH_WIDTH)]
        if step == altered:
            values[1 + step % SKETCH_WIDTH] += by
        rows.append(struct.pack(f"<{1 + SKETCH_WIDTH}f", *values))
    return b"".join(rows)


CLAIMED = Contribution(
    job=b"j" * 32,
    round=3,
    term=1,
    assignment=b"a" * 32,
    member=b"m" * 32,
    base_state=b"b" * 32,
    update=BlobRef(b"u" * 32, 10),
    work=(NodeWork(b"n" * 32, 4, 12, 100),),
    private_before=b"p" * 32,
    private_after=b"q" * 32,
    loss_first=3.0,
    loss_last=2.5,
    sketches=sketches(),
    engine=HERE,
)
SAME = Recomputed(
    private_before=b"p" * 32,
    private_after=b"q" * 32,
    update_hash=b"u" * 32,
    update_distance=0.0,
    sketches=sketches(),
    loss_first=3.0,
    loss_last=2.5,
    engine=HERE,
)


def replayed(**changes):
    from dataclasses import replace

    return replace(SAME, **changes)


def test_the_same_bytes_on_the_same_engine_match():
    verdict = judge(CLAIMED, SAME)
    assert verdict.outcome is Outcome.MATCH
    assert verdict.sentence == "Match: every byte is the same, on the same engine."
    assert (verdict.measured, verdict.threshold, verdict.measure) == (0.0, 0.0, "claims")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"private_before": b"x" * 32}, "the private state before the round"),
        ({"private_after": b"x" * 32}, "the private state after the round"),
        ({"update_hash": b"x" * 32}, "the update"),
        ({"loss_first": 3.0000001}, "the first loss"),
        ({"loss_last": float("nan")}, "the last loss"),
        ({"sketches": sketches(altered=2, by=1e-6)}, "the sketches"),
        ({"sketches": sketches(steps=3)}, "the sketches"),
    ],
)
def test_on_the_same_engine_every_byte_counts(change, named):
    verdict = judge(CLAIMED, replayed(**change))
    assert verdict.outcome is Outcome.MISMATCH
    assert named in verdict.sentence
    assert (verdict.measured, verdict.threshold) == (1.0, 0.0)


def test_on_another_engine_rounding_is_no_lie():
    other = replayed(
        engine=ELSEWHERE, private_before=b"x" * 32, private_after=b"y" * 32, update_hash=b"z" * 32,
        update_distance=0.05, sketches=sketches(factor=1.0001), loss_last=2.50001,
    )  # fmt: skip
    verdict = judge(CLAIMED, other)
    assert verdict.outcome is Outcome.MATCH
    assert (verdict.measure, verdict.measured, verdict.threshold) == ("update", 0.05, Thresholds().update)
    assert "replayed on another engine (torch 2.13.0, cpu, 2 threads" in verdict.sentence


def test_on_another_engine_one_altered_step_is_found_and_named():
    other = replayed(engine=ELSEWHERE, sketches=sketches(altered=2, by=2.0))
    verdict = judge(CLAIMED, other)
    assert verdict.outcome is Outcome.MISMATCH
    assert verdict.measure == "sketch" and verdict.measured > verdict.threshold == Thresholds().sketch
    assert "at step 2 is off by" in verdict.sentence


@pytest.mark.parametrize(
    ("change", "measure"),
    [
        ({"update_distance": 0.3}, "update"),
        ({"update_distance": float("nan")}, "update"),
        ({"sketches": sketches(steps=5)}, "steps"),
        ({"sketches": b"xyz"}, "steps"),
    ],
)
def test_on_another_engine_the_update_and_the_number_of_steps_count_too(change, measure):
    verdict = judge(CLAIMED, replayed(engine=ELSEWHERE, **change))
    assert (verdict.outcome, verdict.measure) == (Outcome.MISMATCH, measure)


def test_a_nan_in_a_sketch_is_never_a_match():
    for poisoned in (CLAIMED, msgspec.structs.replace(CLAIMED, sketches=b"\xff" * len(CLAIMED.sketches))):
        other = replayed(engine=ELSEWHERE, sketches=sketches() if poisoned is not CLAIMED else b"\xff" * 144)
        assert judge(poisoned, other).outcome is Outcome.MISMATCH


def test_what_cannot_be_replayed_is_never_honest():
    verdict = not_replayable("node a has not kept the state of round 3.")
    assert verdict.outcome is Outcome.NOT_REPLAYABLE
    assert verdict.sentence == "Not replayable: node a has not kept the state of round 3."


@given(st.binary(max_size=200), st.binary(max_size=200))
def test_any_bytes_can_be_compared(left, right):
    difference = compare_sketches(left, right)
    if difference is None:
        assert len(left) != len(right) or len(left) % (4 * (1 + SKETCH_WIDTH))
    else:
        assert difference.worst >= 0 and difference.worst_loss >= 0


@given(st.binary(min_size=32, max_size=32), st.binary(min_size=32, max_size=32))
def test_audits_follow_from_secret_and_contribution_alone(secret, contribution):
    assert audited(secret, contribution, 1.0)
    assert not audited(secret, contribution, 0.0)
    chosen = [rate for rate in (0.1, 0.3, 0.6, 0.9) if audited(secret, contribution, rate)]
    assert chosen == [rate for rate in (0.1, 0.3, 0.6, 0.9) if rate >= min(chosen, default=2)]


def test_audits_hit_the_rate_and_differ_with_the_secret():
    names = [number.to_bytes(32, "big") for number in range(4000)]
    hits = [{name for name in names if audited(secret, name, 0.05)} for secret in (b"a" * 32, b"b" * 32)]
    assert all(140 <= len(hit) <= 260 for hit in hits)
    assert len(hits[0] & hits[1]) < 40
    assert secret_commitment(b"a" * 32) != secret_commitment(b"b" * 32)


@given(st.floats(0.01, 1e6), st.floats(0, 1e6), st.floats(0.01, 1))
def test_at_the_rate_needed_cheating_earns_nothing(gain, loss, power):
    rate = rate_needed(gain, loss, power)
    if rate <= 1:
        profit = (1 - rate * power) * gain - rate * power * loss
        assert profit == pytest.approx(0, abs=1e-6 * (gain + loss))
        more = min(1.0, rate * 1.1)
        assert (1 - more * power) * gain - more * power * loss <= profit + 1e-6 * (gain + loss)


def test_without_power_no_rate_is_enough():
    assert rate_needed(1.0, 10.0, 0.0) == float("inf")
    assert rate_needed(0.0, 10.0, 0.5) == 0.0
    assert rate_needed(1.0, 0.0, 0.5) == 2.0
