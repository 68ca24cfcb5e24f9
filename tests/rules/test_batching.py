"""Which sessions take part in a step."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shoal.inference.batching import PROMPTS, Ask, StepCost, next_step

asks = st.lists(
    st.builds(Ask, st.integers(0, 50), st.integers(1, 256), st.integers(0, 1000), st.booleans()),
    unique_by=lambda ask: ask.session,
    max_size=40,
)
costs = st.builds(StepCost, st.floats(0, 100), st.floats(0, 5))


@given(asks, costs, st.integers(256, 4096))
def test_a_step_is_bounded_and_takes_whoever_waits_longest(waiting: list[Ask], cost: StepCost, most: int) -> None:
    step = next_step(waiting, cost, positions_max=most)
    counts = {ask.session: ask.count for ask in waiting}
    assert sum(counts[session] for session in step.sessions) <= most
    assert bool(step.sessions) == bool(waiting)
    if waiting:
        assert step.sessions[0] == min(waiting, key=lambda ask: (ask.since_ms, ask.session)).session


def test_streams_go_together_and_prompts_as_there_is_room() -> None:
    waiting = [
        Ask(1, 60, 0, fresh=True),
        Ask(2, 1, 5),
        Ask(3, 4, 6),
        Ask(4, 50, 7, fresh=True),
        Ask(5, 4, 8, fresh=True),
    ]
    step = next_step(waiting, StepCost(), positions_max=4096)
    assert step.sessions == (1, 2, 3, 5)
    assert step.reason == "5 positions of streams and 64 of prompts; 1 of 5 sessions wait."


def test_there_is_as_much_room_as_a_step_may_take_longer() -> None:
    waiting = [Ask(2, 1, 5), *(Ask(10 + number, 100, 6 + number, fresh=True) for number in range(20))]
    assert len(next_step(waiting, StepCost(49.9, 0.1), positions_max=4096).sessions) == 1 + 10
    assert len(next_step(waiting, StepCost(10.0, 0.1), positions_max=4096).sessions) == 1 + 2
    assert len(next_step(waiting, StepCost(10.0, 0.1), positions_max=256).sessions) == 1 + 2


def test_everybody_is_served_at_last() -> None:
    left = dict.fromkeys(range(20), 3)
    since = dict.fromkeys(left, 0)
    for turn in range(1, 1000):
        waiting = [Ask(number, PROMPTS, since[number], fresh=True) for number in left if left[number]]
        waiting += [Ask(100 + number, 1, turn) for number in range(8)]
        for session in next_step(waiting, StepCost(), positions_max=72).sessions:
            if session in left:
                left[session] -= 1
                since[session] = turn
        if not any(left.values()):
            return
    raise AssertionError(left)


def test_costs_are_learned_from_steps() -> None:
    cost = StepCost()
    for turn in range(400):
        positions = (1, 4, 200, 400)[turn % 4]
        cost = cost.measured(positions, 10 + 0.5 * positions)
    assert 8 < cost.fixed_ms < 12 and 0.4 < cost.position_ms < 0.6
    assert cost.measured(0, 5) == cost and cost.measured(5, float("nan")) == cost
