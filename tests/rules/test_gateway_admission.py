"""Who waits for room, and whose turn it is."""

from __future__ import annotations

import asyncio

import pytest

from shoal.gateway.admission import Admission
from shoal.gateway.refusals import Overloaded, Stopping


async def turn() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_keys_that_wait_are_let_in_in_turn() -> None:
    async def scene() -> None:
        room = Admission(10)
        await room.enter(10, b"a")
        let_in: list[str] = []

        async def wants(name: str, whose: bytes) -> None:
            await room.enter(10, whose)
            let_in.append(name)

        names = [("a1", b"a"), ("a2", b"a"), ("a3", b"a"), ("b1", b"b"), ("b2", b"b"), ("c1", b"c")]
        tasks = []
        for name, whose in names:
            tasks.append(asyncio.create_task(wants(name, whose)))
            await turn()
        assert room.waiting == 6
        for _ in names:
            room.leave(10, 1.0)
            await turn()
        assert let_in == ["a1", "b1", "c1", "a2", "b2", "a3"]
        room.leave(10, 1.0)
        await asyncio.gather(*tasks)
        assert (room.used, room.waiting) == (0, 0)

    asyncio.run(scene())


def test_a_full_queue_of_one_key_keeps_no_other_out_and_nobody_overtakes() -> None:
    async def scene() -> None:
        room = Admission(10, queue_max=2)
        await room.enter(6, b"a")
        waiting = [asyncio.create_task(room.enter(8, b"a")) for _ in range(2)]
        await turn()
        with pytest.raises(Overloaded, match="2 requests wait already") as refused:
            await room.enter(1, b"a")
        assert 1 <= refused.value.retry_after_s <= 60
        small = asyncio.create_task(room.enter(1, b"b"))
        await turn()
        assert not small.done(), "there is room for it, but a larger one was there before"
        waiting[0].cancel()
        waiting[1].cancel()
        await turn()
        assert small.done() and (room.used, room.waiting) == (7, 0)
        with pytest.raises(Overloaded, match="room for 10 in all"):
            await room.enter(11, b"b")

    asyncio.run(scene())


def test_who_gives_up_as_its_turn_comes_leaves_the_count_right() -> None:
    async def scene() -> None:
        room = Admission(1)
        await room.enter(1, b"a")
        first, second = (asyncio.create_task(room.enter(1, b"a")) for _ in range(2))
        await turn()
        first.cancel()
        room.leave(1, None)  # its turn comes while it is being cancelled
        await turn()
        assert first.cancelled() and second.done() and (room.used, room.waiting) == (1, 0)
        third = asyncio.create_task(room.enter(1, b"a"))
        await turn()
        room.leave(1, None)
        third.cancel()  # after its turn came, before it ran
        await turn()
        assert third.cancelled() and (room.used, room.waiting) == (0, 0)

    asyncio.run(scene())


def test_nobody_is_let_in_when_it_is_closed_and_who_waits_is_told() -> None:
    async def scene() -> None:
        room = Admission(10)
        await room.enter(6)
        waiting = [asyncio.create_task(room.enter(5, whose)) for whose in (b"a", b"a", b"b", b"c")]
        await turn()
        room.leave(6, 1.0)
        await turn()
        assert (room.used, room.waiting) == (10, 2)
        waiting[3].cancel()
        room.close()
        with pytest.raises(Stopping):
            await room.enter(1)
        told = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(one) for one in told] == [type(None), Stopping, type(None), asyncio.CancelledError]
        room.leave(10, 1.0)
        assert (room.used, room.waiting) == (0, 0)

    asyncio.run(scene())
