"""What a node lends is held, whatever is asked of it and in which order."""

from __future__ import annotations

import asyncio
import contextlib
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.node.lending import ROOM_S, Held, Lending, NotLent, taken_bytes
from shoal.world import HeldClock

LENT = 1000
HELD = st.builds(Held, st.sampled_from([b"a", b"b"]), st.integers(0, 600), st.integers(0, 600))
STEPS = st.lists(
    st.one_of(HELD, st.tuples(st.sampled_from(["use", "give back"]), st.integers(0, 8))), min_size=1, max_size=30
)


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


@given(STEPS)
@settings(deadline=None)
def test_never_more_is_taken_than_lent(steps: list[Held | tuple[str, int]]) -> None:
    async def scene() -> None:
        clock = HeldClock()
        lending = Lending("heron", LENT, clock)
        taking: dict[str, asyncio.Task[None]] = {}
        numbers = itertools.count()
        for step in steps:
            if isinstance(step, Held):
                taking[str(next(numbers))] = asyncio.create_task(lending.take(str(len(taking)), step))
            elif step[0] == "use":
                with contextlib.suppress(NotLent):
                    lending.use(str(step[1]))
            else:
                lending.give_back(str(step[1]))
            await settled()
            assert lending.taken_bytes <= LENT
        await clock.advance(ROOM_S)
        assert all(task.done() for task in taking.values()), "nobody waits for ever"
        await asyncio.gather(*taking.values(), return_exceptions=True)
        for owner in taking:
            lending.give_back(owner)
        assert lending.taken_bytes == 0

    asyncio.run(scene())


@given(st.lists(HELD, min_size=1, max_size=6))
def test_a_plan_that_fits_is_never_refused(stages: list[Held]) -> None:
    """Weights of all stages of a model and sessions of the largest are what the planner counts of a spare node."""
    job = [Held(b"a", one.weights_bytes, one.sessions_bytes) for one in stages]
    needed = sum(one.weights_bytes for one in job) + max(one.sessions_bytes for one in job)

    async def scene() -> None:
        lending = Lending("heron", needed, HeldClock())
        for number, one in enumerate(job):
            await lending.take(str(number), one)
        assert lending.taken_bytes == needed
        lending.use("0")
        assert lending.taken_bytes == needed

    asyncio.run(scene())


def test_layers_wait_for_those_of_the_same_model_that_are_let_go() -> None:
    async def scene() -> None:
        clock = HeldClock()
        lending = Lending("heron", LENT, clock)
        await lending.take("old", Held(b"a", 500, 400))
        new = asyncio.create_task(lending.take("new", Held(b"a", 600, 400)))
        await settled()
        await clock.advance(ROOM_S / 2)
        assert not new.done()
        lending.give_back("old")
        await new
        assert lending.taken_bytes == 1000

        late = asyncio.create_task(lending.take("late", Held(b"a", 1, 400)))
        await settled()
        await clock.advance(ROOM_S)
        with pytest.raises(NotLent, match=r"heron lends 1000 B .* 1000 B of it are taken.* 1 B for weights and 400 B"):
            await late
        with pytest.raises(NotLent, match="1000 B of it are taken"):  # those of another model may stay for days
            lending.refuse(Held(b"b", 0, 1))

    asyncio.run(scene())


def test_sessions_go_through_no_more_stages_than_there_is_memory_for() -> None:
    async def scene() -> None:
        lending = Lending("heron", LENT, HeldClock())
        await lending.take("one", Held(b"a", 100, 500))
        await lending.take("two", Held(b"a", 100, 500))
        assert lending.taken_bytes == 700
        lending.use("one")
        lending.use("one")
        with pytest.raises(NotLent, match="heron lends 1000 B"):
            lending.use("two")
        lending.give_back("one")
        lending.use("two")
        assert lending.taken_bytes == taken_bytes({"two": Held(b"a", 100, 500, True)})

    asyncio.run(scene())
