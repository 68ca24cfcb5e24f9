import asyncio

import pytest

from shoal.world import Clock, HeldClock, SeededDice, SystemClock, SystemDice
from shoal.world.dice import Dice


@pytest.mark.parametrize("clock", [SystemClock(), HeldClock()], ids=["system", "held"])
def test_time_never_runs_backwards(clock: Clock) -> None:
    assert clock.monotonic() <= clock.monotonic()
    assert clock.now_ms() > 1_600_000_000_000
    asyncio.run(clock.sleep(0))


def test_a_held_clock_wakes_sleepers_in_order_and_only_when_moved() -> None:
    async def scene() -> None:
        clock, woken = HeldClock(), []

        async def sleeper(seconds: float) -> None:
            await clock.sleep(seconds)
            woken.append((seconds, clock.monotonic()))

        async with asyncio.TaskGroup() as group:
            for seconds in (3.0, 1.0, 2.0):
                group.create_task(sleeper(seconds))
            await asyncio.sleep(0)
            assert woken == []
            await clock.advance(2.5)
            assert woken == [(1.0, 1.0), (2.0, 2.0)]
            await clock.advance(1)
        assert woken[-1] == (3.0, 3.0)
        assert clock.monotonic() == 3.5

    asyncio.run(scene())


@pytest.mark.parametrize("dice", [SystemDice(), SeededDice(1)], ids=["system", "seeded"])
def test_dice_throw_what_is_asked(dice: Dice) -> None:
    assert len(dice.bytes(32)) == 32
    assert all(0 <= dice.uniform() < 1 for _ in range(100))


def test_seeded_dice_repeat_themselves() -> None:
    one, two = SeededDice(7), SeededDice(7)
    assert [one.bytes(4), one.uniform()] == [two.bytes(4), two.uniform()]
    assert SeededDice(8).bytes(4) != SeededDice(7).bytes(4)
