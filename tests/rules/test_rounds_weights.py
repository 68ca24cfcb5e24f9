"""Weights that a minority cannot steer, and that leave honest rounds alone."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shoal.protocol.training import PARTS_PER_MILLION
from shoal.rounds import weights as room
from shoal.rounds.weights import weigh

WIDTH = 4096


def honest_updates(rng, work, signal, power, jitter=0.1, dense=True):
    """Updates of `work`: a common direction that holds the part `signal` of each squared norm, noise for the rest; norm
    work ** power. Sparse ones have nearly disjoint supports."""
    common = rng.standard_normal(WIDTH)
    common /= np.linalg.norm(common)
    updates = []
    for amount in work:
        noise, shared = rng.standard_normal(WIDTH), common
        if not dense:
            chosen = rng.random(WIDTH) < 0.02
            noise, shared = noise * chosen, common * chosen / math.sqrt(0.02)
        noise /= np.linalg.norm(noise)
        size = (amount / 1000) ** power * math.exp(rng.normal(0, jitter))
        updates.append(size * (math.sqrt(signal) * shared + math.sqrt(1 - signal) * noise))
    return np.array(updates)


def judged(updates, work=None, cap=0.34, ratio=3.0):
    work = work or [1000] * len(updates)
    return weigh(work, (updates @ updates.T).tolist(), weight_cap=cap, norm_ratio_max=ratio)


def parts(result):
    return np.array([member.weight_ppm / 1e6 for member in result.members])


def scaled(result, updates):
    return updates * np.array([member.scale_ppm / 1e6 for member in result.members])[:, None]


HONEST = st.tuples(
    st.integers(0, 2**32),
    st.lists(st.sampled_from([1000, 1000, 500, 250]), min_size=2, max_size=64),
    st.sampled_from([0.0, 0.05, 0.3, 0.7, 0.95, 1.0]),
    st.sampled_from([0.5, 0.75, 1.0]),
    st.booleans(),
)


@settings(max_examples=150, deadline=None)
@given(HONEST)
@example((1287, [500, 1000, 1000, 1000, *[500] * 8, 250], 0.7, 1.0, True))  # the larger ones happen to be long as well
def test_honest_rounds_are_left_alone(case):
    seed, work, signal, power, dense = case
    updates = honest_updates(np.random.default_rng(seed), work, signal, power, dense=dense)
    result = judged(updates, work)
    assert [member.reason for member in result.members] == [""] * len(work)
    assert all(member.scale_ppm == PARTS_PER_MILLION for member in result.members)
    assert sum(member.weight_ppm for member in result.members) == PARTS_PER_MILLION
    capped, _ = room._capped(work, 0.34)
    assert np.allclose(parts(result), capped, atol=2e-6)


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_a_slow_honest_member_is_never_cut(power):
    for seed in range(20):
        updates = honest_updates(np.random.default_rng(seed), [1000, 1000, 1000, 250], 0.1, power, jitter=0.3)
        slow = judged(updates, [1000, 1000, 1000, 250]).members[3]
        assert (slow.scale_ppm, slow.reason) == (PARTS_PER_MILLION, "")


def test_nearly_identical_honest_updates_are_no_collusion():
    rng = np.random.default_rng(1)
    common = rng.standard_normal(WIDTH)
    for members in (2, 3, 5, 8, 33):
        updates = common + 1e-4 * rng.standard_normal((members, WIDTH))
        result = judged(updates)
        assert all(member.reason == "" for member in result.members)
    same = np.tile(common, (6, 1))
    assert all(member.reason == "" for member in judged(same).members)


def attack(kind, rng, honest, count):
    """`count` updates of the honest updates' typical norm, made with knowledge of all of them."""
    mean = honest.mean(0)
    norm = np.linalg.norm(honest, axis=1).mean()
    aim = rng.standard_normal(WIDTH)
    aim /= np.linalg.norm(aim)
    noise = rng.standard_normal((count, WIDTH))
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    if kind == "one direction":
        return np.tile(norm * aim, (count, 1))
    if kind == "against the honest mean":
        return np.tile(-norm * mean / np.linalg.norm(mean), (count, 1))
    if kind == "each a little different":
        return norm * (math.sqrt(0.7) * aim + math.sqrt(0.3) * noise)
    if kind == "mostly noise":
        return norm * (math.sqrt(0.4) * aim + math.sqrt(0.6) * noise)
    assert kind == "near the honest mean"
    return np.tile(mean + 0.9 * norm * aim, (count, 1))


KINDS = ("one direction", "against the honest mean", "each a little different", "mostly noise", "near the honest mean")


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 2**32),
    st.sampled_from([(4, 1), (7, 2), (10, 3), (16, 5), (25, 8), (40, 13)]),
    st.sampled_from([0.0, 0.05, 0.3, 0.7, 0.99]),
    st.sampled_from(KINDS),
    st.booleans(),
)
@example(7016146, (7, 2), 0.7, "against the honest mean", False)
def test_the_mean_moves_less_than_the_bound(seed, sizes, signal, kind, dense):
    """The theorem of the docstring, with the variance that the final weights really leave."""
    rng = np.random.default_rng(seed)
    members, liars = sizes
    honest = honest_updates(rng, [1000] * (members - liars), signal, 0.75, dense=dense)
    updates = np.concatenate((honest, attack(kind, rng, honest, liars)))
    result = judged(updates)
    weight, updates = parts(result), scaled(result, updates)
    lied = weight[-liars:].sum()
    mean = weight @ updates
    honest_mean = weight[:-liars] @ updates[:-liars] / (1 - lied)
    centred = (updates - mean) * np.sqrt(weight)[:, None]
    variance = np.linalg.svd(centred, compute_uv=False)[0] ** 2
    shift = np.linalg.norm(mean - honest_mean)
    assert shift <= math.sqrt(lied / (1 - lied) * variance) + 1e-9
    # What is left is what is allowed: one member's noise, or a part of the mean's own norm. The rule takes a member's
    # noise from its distance to the mean, this from its norm, which are a tenth apart, rarely a little more.
    typical = np.median(np.linalg.norm(updates, axis=1))
    one = weight.max() * (room.NORM_HEADROOM * typical) ** 2
    assert variance <= 1.2 * max(room.NOISE_FACTOR * one, room.SIGNAL_PART * mean @ mean)
    # And the honest members keep their proportions to one another. One whose update is unusually long makes a direction
    # of its own, which is cut a little when the colluders' comes down to it.
    kept = weight[:-liars] / weight[:-liars].max()
    ordinary = np.linalg.norm(updates[:-liars], axis=1) < 1.25 * typical
    assert kept[ordinary].min() > 0.75
    assert kept.min() > 0.3


@pytest.mark.parametrize("signal", [0.0, 0.05, 0.3, 0.7])
@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize(("members", "liars"), [(16, 5), (32, 10), (64, 21)])
def test_colluders_end_with_the_influence_of_a_few_members_at_most(members, liars, signal, dense):
    rng = np.random.default_rng(members)
    honest = honest_updates(rng, [1000] * (members - liars), signal, 0.75, dense=dense)
    for kind in ("one direction", "against the honest mean"):
        updates = np.concatenate((honest, attack(kind, rng, honest, liars)))
        result = judged(updates)
        lied = parts(result)[-liars:].sum()
        if signal < 0.5 or not dense:  # on disjoint supports even a common signal makes small dot products
            assert lied <= min(4.5 / members, 0.6 * liars / members)
        else:
            # Where a strong common signal is there, the shift is what is bounded.
            mean = parts(result) @ scaled(result, updates)
            assert np.linalg.norm(mean - honest.mean(0)) < 0.4 * np.linalg.norm(honest.mean(0))
        cut = [member for member in result.members[-liars:] if "pushed one direction" in member.reason]
        assert len(cut) == liars
        assert all(member.reason == "" for member in result.members[:-liars])


def test_a_single_attacker_has_at_most_the_cap():
    rng = np.random.default_rng(3)
    honest = honest_updates(rng, [1000] * 5, 0.1, 0.75)
    updates = np.concatenate((honest, attack("one direction", rng, honest, 1)))
    result = judged(updates, [1000] * 5 + [100_000])  # it says that it did a hundred times the work
    assert parts(result)[5] <= 0.34 + 1e-6
    assert all(member.weight_ppm > 0 for member in result.members)


def test_more_than_a_third_is_said_and_not_acted_on():
    rng = np.random.default_rng(4)
    left, right = rng.standard_normal(WIDTH), rng.standard_normal(WIDTH)
    result = judged(np.array([left, left, left, right, right, right]))
    assert "robustness rests on replay" in result.reason
    assert np.allclose(parts(result), 1 / 6, atol=2e-6)


def test_a_long_update_is_shortened_with_numbers():
    rng = np.random.default_rng(5)
    updates = honest_updates(rng, [1000] * 5, 0.1, 0.75, jitter=0.0)
    updates[2] *= 30
    result = judged(updates)
    member = result.members[2]
    assert member.scale_ppm == pytest.approx(100_000, rel=0.02)
    assert member.reason.startswith("Its update is ")
    assert "times as long as the median for its work; it was shortened to 3 times." in member.reason


def test_an_absurdly_long_update_counts_nothing():
    updates = honest_updates(np.random.default_rng(6), [1000] * 4, 0.1, 0.75)
    gram = (updates @ updates.T).tolist()
    gram[0][0] = 1e300
    result = weigh([1000] * 4, gram, weight_cap=0.34, norm_ratio_max=3.0)
    assert result.members[0].weight_ppm == 0
    assert "times as long as the median" in result.members[0].reason
    assert sum(member.weight_ppm for member in result.members) == PARTS_PER_MILLION


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (math.nan, "Its update's norm is not a finite number; it does not count."),
        (math.inf, "Its update's norm is not a finite number; it does not count."),
        (-1.0, "Its update's norm is not a finite number; it does not count."),
        (0.0, "Its update is zero; it does not count."),
    ],
)
def test_what_is_no_update_does_not_count(value, sentence):
    updates = honest_updates(np.random.default_rng(7), [1000] * 4, 0.1, 0.75)
    gram = (updates @ updates.T).tolist()
    gram[1] = [value] * 4
    for row in gram:
        row[1] = value
    result = weigh([1000] * 4, gram, weight_cap=0.34, norm_ratio_max=3.0)
    assert result.members[1] == room.Weight(0, PARTS_PER_MILLION, sentence)
    assert np.allclose(parts(result)[[0, 2, 3]], 1 / 3, atol=1e-6)


def test_zero_updates_all_around_keep_their_weights_and_no_work_has_none():
    zeros = [[0.0] * 3] * 3
    assert [member.weight_ppm for member in weigh([2, 1, 1], zeros, weight_cap=0.6, norm_ratio_max=3.0).members] == [
        500_000, 250_000, 250_000,
    ]  # fmt: skip
    result = weigh([1000, 0], [[1.0, 0.0], [0.0, 1.0]], weight_cap=0.34, norm_ratio_max=3.0)
    assert [member.weight_ppm for member in result.members] == [PARTS_PER_MILLION, 0]
    assert result.members[1].reason == "There is no work behind its update; it does not count."
    nothing = weigh([0], [[1.0]], weight_cap=0.34, norm_ratio_max=3.0)
    assert nothing.members[0].weight_ppm == 0 and nothing.reason == "No update can be used."


def test_below_the_smallest_membership_the_reason_says_so():
    updates = honest_updates(np.random.default_rng(8), [1000] * 2, 0.1, 0.75)
    assert judged(updates).reason == (
        "2 members, fewer than 4: a single one holds a third of the weight or more, and robustness rests on replay "
        "alone. The weight cap of 0.34 cannot hold among 2; it was relaxed to 0.5."
    )


@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=30), st.floats(0.01, 1.0))
def test_water_filling_keeps_the_cap_and_the_order(work, cap):
    weights, _ = room._capped(work, cap)
    assert math.fsum(weights) == pytest.approx(1)
    assert max(weights) <= max(cap, 1 / len(work)) * (1 + 1e-9)
    ranked = sorted(zip(work, weights, strict=True))
    assert all(left[1] <= right[1] * (1 + 1e-9) for left, right in pairwise(ranked))
    below = [weight / part for part, weight in zip(work, weights, strict=True)
             if weight < max(cap, 1 / len(work)) * (1 - 1e-9)]  # fmt: skip
    assert not below or max(below) == pytest.approx(min(below))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.permutations(range(8)))
def test_the_order_of_members_does_not_matter(seed, order):
    rng = np.random.default_rng(seed)
    honest = honest_updates(rng, [1000] * 6, 0.1, 0.75)
    updates = np.concatenate((honest, attack("one direction", rng, honest, 2)))
    plain = parts(judged(updates))
    mixed = parts(judged(updates[order]))
    assert np.allclose(mixed, plain[order], atol=2e-3)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 2**32),
    st.integers(4, 13),
    st.integers(1, 4),
    st.sampled_from([0.08, 0.2, 0.25, 0.3, 0.34]),
    st.sampled_from([0.0, 0.3, 1.0, 3.0]),
    st.sampled_from([1.0, 2.0, 3.0]),
)
def test_no_weight_is_above_the_cap_whatever_was_filtered(seed, count, spread, cap, signal, push):
    rng = np.random.default_rng(seed)
    work = [int(1000 * 2.0 ** rng.integers(0, spread)) for _ in range(count)]
    common, pushed = signal * rng.standard_normal(2000), push * rng.standard_normal(2000)
    liars = int(rng.integers(0, count // 3 + 1))
    updates = np.array([
        (pushed + 0.05 * rng.standard_normal(2000) if at < liars else common + rng.standard_normal(2000)) * part**0.75
        for at, part in enumerate(work)
    ])  # fmt: skip
    result = judged(updates, work, cap)
    given_ppm = [member.weight_ppm for member in result.members]
    assert max(given_ppm) <= max(cap, 1 / count) * PARTS_PER_MILLION + 1
    nobodys = PARTS_PER_MILLION - sum(given_ppm)
    assert nobodys >= 0 and (nobodys <= 1 or "nobody's" in result.reason)
    full = max(cap, 1 / count) * PARTS_PER_MILLION - 2
    uncut = [member.weight_ppm for member in result.members if "was cut" not in member.reason]
    assert nobodys <= 1 or min(uncut, default=full) >= full  # only what there is no room for
    assert cap * count >= 1 or "it was relaxed" in result.reason


def test_weights_stay_as_they_are():
    """Frozen: the driver's weights are part of the Commit, and anyone may compute them again."""
    liars = {7, 8, 9}
    gram = [[float((i * j) % 5) for j in range(10)] for i in range(10)]
    for i in range(10):
        gram[i][i] = 40.0 + i
        for j in liars - {i}:
            gram[i][j] = gram[j][i] = 44.0 if i in liars else -1.0
    gram[4][4] = 500.0
    work = [1000, 1000, 990, 980, 1000, 1400, 1000, 990, 1000, 980]
    result = weigh(work, gram, weight_cap=0.17, norm_ratio_max=3.0)
    assert [(member.weight_ppm, member.scale_ppm) for member in result.members] == GOLDEN


GOLDEN = [
    (114586, 1000000), (114586, 1000000), (113440, 1000000), (112294, 1000000), (19093, 893204),
    (160420, 1000000), (114586, 1000000), (84751, 1000000), (84464, 1000000), (81780, 1000000),
]  # fmt: skip
