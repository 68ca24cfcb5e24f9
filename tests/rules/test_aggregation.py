"""The outer step and its measures: the documented arithmetic and no other, so that members agree to the last bit."""

from __future__ import annotations

import math
import os
import struct
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from shoal.protocol.training import PARTS_PER_MILLION, Codec, Outer, RoundSettings
from shoal.rounds.weights import weigh
from shoal.training.outer import OuterStep, WeighedUpdate, ahead, measure, tree_sum
from shoal.training.state import BadState, Layout, SharedState
from shoal.training.updates import BadUpdate, Update, decode_update, encode_update

Floats = NDArray[np.float32]
PLAIN = RoundSettings(outer_learning_rate=0.7)
NESTEROV = RoundSettings(outer=Outer.NESTEROV, outer_learning_rate=0.7, outer_momentum=0.9)


def numbers(size: int, seed: int = 1) -> Floats:
    """The same numbers on every machine: from integers alone."""
    state = np.arange(1, size + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
    state ^= state >> np.uint64(31)
    state *= np.uint64(0xBF58476D1CE4E5B9)
    state ^= state >> np.uint64(27)
    return ((state >> np.uint64(40)).astype(np.float32) - np.float32(1 << 23)) * np.float32(2.0**-30)


def a_state(size: int, *, momentum: bool = False) -> SharedState:
    return SharedState.start(Layout.of({"weight": (size,)}), numbers(size, 99), momentum=momentum)


def sparse(size: int, seed: int) -> Update:
    return decode_update(encode_update(numbers(size, seed), Codec.SPARSE2), Codec.SPARSE2, size)


def dense(size: int, seed: int) -> Update:
    return Update(size, numbers(size, seed))


def single(value: float) -> float:
    """Rounded to binary32."""
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def by_hand(
    settings: RoundSettings, parameters: list[float], momentum: list[float], accepted: list[WeighedUpdate]
) -> tuple[list[float], list[float]]:
    """The docstring's arithmetic, one number at a time, in Python's floats (binary64, each operation rounded once)."""
    rows = [(item.factor, item.update.dense().tolist()) for item in accepted]
    new_parameters, new_momentum = [], []
    for at, parameter in enumerate(parameters):
        gradient = 0.0
        for factor, row in rows:
            gradient = gradient + factor * row[at]
        step = gradient
        if settings.outer is Outer.NESTEROV:
            new_momentum.append(single(settings.outer_momentum * momentum[at] + gradient))
            step = gradient + settings.outer_momentum * new_momentum[at]
        new_parameters.append(single(parameter - settings.outer_learning_rate * step))
    return new_parameters, new_momentum


@given(st.integers(1, 300), st.integers(1, 4), st.sampled_from([PLAIN, NESTEROV]), st.booleans(), st.data())
def test_the_outer_step_is_the_documented_arithmetic_to_the_last_bit(
    size: int, members: int, settings: RoundSettings, mixed: bool, data: st.DataObject
) -> None:
    state = a_state(size, momentum=settings.outer is Outer.NESTEROV)
    outer = OuterStep(settings)
    for round_number in range(2):
        accepted = [
            WeighedUpdate(
                dense(size, seed) if mixed and seed % 2 else sparse(size, seed),
                data.draw(st.integers(0, PARTS_PER_MILLION)),
                data.draw(st.integers(0, PARTS_PER_MILLION)),
            )
            for seed in range(round_number, round_number + members)
        ]
        momentum = [] if state.momentum is None else state.momentum.tolist()
        parameters, momentum = by_hand(settings, state.parameters.tolist(), momentum, accepted)
        state = outer.apply(state, accepted)
        assert state.parameters.tolist() == parameters
        assert state.momentum is None or state.momentum.tolist() == momentum


def golden_run(settings: RoundSettings) -> SharedState:
    size = 9000
    state = a_state(size, momentum=settings.outer is Outer.NESTEROV)
    outer = OuterStep(settings)
    for number in range(3):
        updates = [sparse(size, 10 * number + 1), dense(size, 10 * number + 2), sparse(size, 10 * number + 3)]
        weighed = [WeighedUpdate(update, 333_333 + at, 900_001) for at, update in enumerate(updates)]
        state = outer.apply(state, weighed)
    return state


GOLDEN = {Outer.PLAIN: "30867fa9a5be2104", Outer.NESTEROV: "321f984c2f3a4cbb"}


@pytest.mark.parametrize("settings", [PLAIN, NESTEROV], ids=["plain", "nesterov"])
def test_three_rounds_end_on_the_state_hash_of_every_other_machine(settings: RoundSettings) -> None:
    """A change here means that members of two versions no longer agree."""
    assert golden_run(settings).hash.hex()[:16] == GOLDEN[settings.outer]


def test_thread_counts_change_nothing() -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import test_aggregation as t; "
        "print(t.golden_run(t.PLAIN).hash.hex(), t.golden_run(t.NESTEROV).hash.hex(), "
        "t.measure([t.dense(9000, 1), t.sparse(9000, 2), t.sparse(9000, 3)]).gram)"
    )
    said = set()
    for threads in ("1", "4"):
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
        here = os.path.dirname(__file__)  # noqa: PTH120
        result = subprocess.run(
            [sys.executable, "-c", code, here], env=environment, capture_output=True, text=True, check=True
        )
        said.add(result.stdout)
    assert len(said) == 1


def test_memory_layout_changes_nothing() -> None:
    size = 5000
    plain = [dense(size, 1), sparse(size, 2)]
    every_other = np.zeros(2 * size, dtype=np.float32)
    every_other[::2] = plain[0].values
    backwards = plain[1].values[::-1].copy()[::-1]
    shifted = np.zeros(4 * size + 1, dtype=np.uint8)[1:].view("<f4")  # unaligned
    shifted[:] = numbers(size, 99)
    twisted = [Update(size, every_other[::2]), Update(size, backwards, plain[1].indices)]
    states = []
    for updates, parameters in ((plain, numbers(size, 99)), (twisted, shifted)):
        state = SharedState.start(Layout.of({"weight": (size,)}), parameters, momentum=True)
        weighed = [WeighedUpdate(update, 400_000) for update in updates]
        states.append(OuterStep(NESTEROV).apply(state, weighed).hash)
    assert states[0] == states[1]
    assert measure(plain) == measure(twisted)


def test_a_scratch_buffer_used_before_leaves_no_trace() -> None:
    size = 5000
    outer = OuterStep(PLAIN)
    state = a_state(size)
    outer.apply(state, [WeighedUpdate(dense(size, 5), 500_000)])
    outer.apply(state, [WeighedUpdate(sparse(size, 6), 500_000)])
    again = outer.apply(state, [WeighedUpdate(sparse(size, 7), 500_000)])
    assert again.hash == OuterStep(PLAIN).apply(state, [WeighedUpdate(sparse(size, 7), 500_000)]).hash


def test_a_commit_that_accepted_nothing_changes_nothing() -> None:
    state = a_state(100, momentum=True)
    assert OuterStep(NESTEROV).apply(state, []).hash == state.hash


def test_an_update_of_another_size_or_a_result_that_is_not_finite_is_refused() -> None:
    state = a_state(100)
    with pytest.raises(BadUpdate, match="over 101 numbers"):
        OuterStep(PLAIN).apply(state, [WeighedUpdate(dense(101, 1), 1)])
    huge = Update(100, np.full(100, np.finfo(np.float32).max, dtype=np.float32))
    with pytest.raises(BadState, match="not finite"):
        OuterStep(RoundSettings(outer_learning_rate=10)).apply(state, [WeighedUpdate(huge, PARTS_PER_MILLION)])
    with pytest.raises(BadState, match="momentum"):
        OuterStep(NESTEROV).apply(state, [WeighedUpdate(dense(100, 1), 1)])
    assert a_state(100).hash == state.hash


def test_going_ahead_by_an_update_is_the_plain_step_with_its_whole_weight() -> None:
    state = a_state(5000)
    own = sparse(5000, 3)
    stepped = OuterStep(PLAIN).apply(state, [WeighedUpdate(own, PARTS_PER_MILLION)])
    assert ahead(state, own, PLAIN.outer_learning_rate).tobytes() == stepped.parameters.tobytes()


# --- measuring -----------------------------------------------------------------------------------------------------


def tree_by_hand(values: list[float]) -> float:
    width = 1
    while width < len(values):
        width *= 2
    values = values + [0.0] * (width - len(values))
    while len(values) > 1:
        half = len(values) // 2
        values = [left + right for left, right in zip(values[:half], values[half:], strict=True)]
    return values[0]


@given(st.lists(st.floats(-1e30, 1e30), min_size=1, max_size=70))
def test_a_tree_sum_adds_in_the_documented_order(values: list[float]) -> None:
    assert tree_sum(np.array(values)) == tree_by_hand(values)


def test_measures_are_the_inner_products_whether_updates_are_sparse_or_dense() -> None:
    size = 3 * 4096 + 17
    updates = [sparse(size, 1), dense(size, 2), sparse(size, 1), sparse(size, 4)]
    found = measure(updates)
    rows = [update.dense().astype(np.float64).tolist() for update in updates]
    for i, one in enumerate(rows):
        for j, other in enumerate(rows):
            exact = math.fsum(left * right for left, right in zip(one, other, strict=True))
            assert found.gram[i][j] == pytest.approx(exact, rel=1e-12, abs=1e-12)
            assert found.gram[i][j] == found.gram[j][i]
        assert found.norms[i] == math.sqrt(found.gram[i][i])
    assert found.gram[0][0] == found.gram[0][2]
    assert measure([]).gram == ()


def test_updates_of_two_models_are_not_compared() -> None:
    with pytest.raises(BadUpdate, match="different sizes"):
        measure([dense(10, 1), dense(11, 1)])


# --- a minority that steers ----------------------------------------------------------------------------------------


def test_a_minority_with_steered_updates_of_honest_norm_does_not_turn_the_step() -> None:
    """Two of seven push together against the others, on the same sparse coordinates, with an ordinary norm."""
    size, noise = 40 * 4096, 2.0
    signal = np.random.default_rng(0).standard_normal(size).astype(np.float32)
    updates = []
    for member in range(7):
        own = np.random.default_rng(member + 1).standard_normal(size).astype(np.float32)
        pushed = -signal * np.float32(1 + noise) if member >= 5 else signal + np.float32(noise) * own
        updates.append(decode_update(encode_update(pushed, Codec.SPARSE2), Codec.SPARSE2, size))
    honest_norm = measure(updates[:1]).norms[0]
    for at in (5, 6):
        update = updates[at]
        factor = np.float32(honest_norm / measure([update]).norms[0])
        updates[at] = Update(size, update.values * factor, update.indices)
    weights = weigh([1000] * 7, measure(updates).gram, weight_cap=0.34, norm_ratio_max=3.0)
    state = SharedState.start(Layout.of({"weight": (size,)}), np.zeros(size, dtype=np.float32), momentum=False)

    def progress(items: list[WeighedUpdate]) -> float:
        return -float(OuterStep(PLAIN).apply(state, items).parameters @ signal)

    everyone = [
        WeighedUpdate(update, weight.weight_ppm, weight.scale_ppm)
        for update, weight in zip(updates, weights.members, strict=True)
    ]
    honest = [WeighedUpdate(update, PARTS_PER_MILLION // 5) for update in updates[:5]]
    unguarded = [WeighedUpdate(update, PARTS_PER_MILLION // 7) for update in updates]
    assert progress(unguarded) < 0.1 * progress(honest)  # the attack is a real one: it all but stops a plain mean
    assert progress(everyone) > 0.35 * progress(honest)
